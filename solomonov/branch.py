"""A run that begins from a checkpoint of another run (`run.branch_of: RUN@STEP`).

It takes over masters, moments, and the position in the stream of rows, so that it goes on exactly where the other one
would: on the same rows, with another schedule, length or optimizer constant. With `schedule.kind: wsd` and
`schedule.decay_steps` that is a decay from any checkpoint. The other run is only read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solomonov.checkpoint import refusals, store
from solomonov.checkpoint.agreement import Collective, raise_failures, together
from solomonov.checkpoint.reader import CheckpointReader
from solomonov.config import Config, flatten
from solomonov.errors import ConfigurationError
from solomonov.plan import BatchPlan
from solomonov.runfolder import RunFolder, find_run, run_folder


@dataclass(frozen=True)
class Branch:
    """Where a run begins."""

    parent: RunFolder
    """The run that is branched from."""
    step: int
    """Updates that it had done."""

    @property
    def folder(self) -> Path:
        """The checkpoint."""
        return self.parent.checkpoints / store.folder_name(self.step)

    def facts(self, reader: CheckpointReader) -> dict[str, Any]:
        """Where it begins, for the journal."""
        return {
            "parent": str(self.parent.path),
            "parent_run_id": self.parent.run_id(),
            "step": self.step,
            "digest": reader.digest,
        }


def branch_of(config: Config) -> Branch | None:
    """Where the run of a configuration begins; None: at step 0.

    Raises:
        ConfigurationError: there is no such run, or it is this one.
    """
    if config.run.branch_of is None:
        return None
    name, _, step = config.run.branch_of.rpartition("@")
    branch = Branch(find_run(name, config.run.folder), int(step))
    if branch.parent.path.resolve() == run_folder(config).path.resolve():
        raise ConfigurationError(
            "a run cannot branch from itself",
            got=f"run.branch_of {config.run.branch_of} in the run {config.run.name}",
            rule="a branch is a run of its own, with its own folder",
            remedy="set run.name to a new name",
        )
    return branch


def check_branch(config: Config, plan: BatchPlan, stream: str) -> None:
    """Refuse a branch that would not go on where its parent was. Reads manifest and state, no tensor.

    A run that has a checkpoint of its own goes on from that, whatever has become of the parent since.

    Args:
        plan: of the branch.
        stream: identity of its stream of rows.

    Raises:
        ConfigurationError: there is no such checkpoint, or the branch has another model, data, seed or batch than it,
            or ends before it begins.
        DamagedCheckpointError: its manifest or state is damaged.
    """
    run = run_folder(config)
    if store.candidates(run.checkpoints) and run.journal.last("branched"):
        return
    branch = branch_of(config)
    if branch is None:
        return
    state = _open(branch).state
    theirs = branch.parent.config()
    before, now = flatten(theirs), flatten(config)
    keys = [key for key in sorted({*before, *now}) if key.startswith(("model.", "objective.")) or key == "run.seed"]
    differ = [f"{key}: {before.get(key)} there, {now.get(key)} here" for key in keys if before.get(key) != now.get(key)]
    if state["stream"] != stream and not differ:
        differ = [f"rows: stream {state['stream']} there, {stream} here"]
    rows = plan.batches.before(branch.step)
    if state["next_row"] != rows:
        differ.append(f"next row: {state['next_row']} there, {rows} after {branch.step} updates here")
    if differ:
        raise ConfigurationError(
            f"{config.run.branch_of} cannot go on with this configuration",
            got="\n          ".join(differ),
            rule="a branch has the model, data, row length, packing, weights, seed and batch of the run it begins from",
            remedy="take these from the other run; schedule, length, optimizer and layout may differ",
        )
    if plan.total_steps <= branch.step:
        raise ConfigurationError(
            "the branch ends before it begins",
            got=f"{plan.total_steps} updates in all, {branch.step} of them done by {config.run.branch_of}",
            rule="training.total_steps counts those of the other run too",
            remedy=f"set training.total_steps to more than {branch.step}",
        )


def open_branch(branch: Branch, collective: Collective) -> CheckpointReader:
    """The checkpoint that a run begins from, every byte of it verified, each by one of the ranks. All call it.

    Raises:
        ConfigurationError: a rank does not find it, or they see different ones; on every rank.
        DamagedCheckpointError: it does not verify; on every rank.
    """

    def verify() -> str:
        reader = _open(branch)
        reader.verify(reader.share(collective.rank, collective.size))
        return reader.digest

    digests, failures = together(collective, verify)
    raise_failures(failures)
    if len(set(digests)) > 1:
        raise refusals.different_bytes(branch.folder.name, digests)
    return CheckpointReader.open(branch.folder)


def _open(branch: Branch) -> CheckpointReader:
    if not branch.folder.is_dir():
        steps = [store.step_of(folder) for folder in reversed(store.candidates(branch.parent.checkpoints))]
        kept = ", ".join(map(str, steps)) or "none"
        raise ConfigurationError(
            "there is no checkpoint to branch from",
            got=f"step {branch.step} of {branch.parent.path}, which has kept: {kept}",
            rule="run.branch_of names a run and a step of which it still has the checkpoint",
            remedy="name one of these steps; checkpoint.keep_last says how many a run keeps",
        )
    reader = CheckpointReader.open(branch.folder)
    if reader.manifest.run_id != branch.parent.run_id() or reader.step != branch.step:
        raise ConfigurationError(
            f"{branch.folder} is not what its place says",
            got=f"step {reader.step} of run id {reader.manifest.run_id}",
            rule=f"step {branch.step} of run id {branch.parent.run_id()}",
            remedy="restore the folder, or branch from another checkpoint",
        )
    return reader
