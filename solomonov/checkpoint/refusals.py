"""What the checkpointer says when it cannot go on: each refusal once, the same text on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from solomonov.checkpoint.agreement import SystemFailure
from solomonov.errors import ConfigurationError, DamagedCheckpointError

_SHARED = "the run folder lies on a file system that all ranks share, under the same path"
_MOVE = "move the run folder to a shared file system, or correct its path on those machines"


def not_writable(folder: Path, failure: SystemFailure) -> ConfigurationError:
    """A rank cannot write where checkpoints are to go."""
    return ConfigurationError(
        f"no checkpoint can be written to {folder}",
        got=f"rank {failure.rank}: {failure.message} ({failure.path})",
        rule="every rank can create, sync, rename and delete files there",
        remedy="change the folder's owner or mode, free space, or choose another folder for runs",
    )


def ranks_disagree(claims: Sequence[tuple[str, int, int, int]]) -> ConfigurationError:
    """The ranks mean different runs, attempts or steps."""
    return ConfigurationError(
        "the ranks do not mean the same checkpoint",
        got="; ".join(f"rank {r}: run {c[0]}, attempt {c[1]}, step {c[2]}" for r, c in enumerate(claims)),
        rule="all ranks save the same step of the same attempt of the same run",
        remedy="start all ranks from the same run folder",
    )


def not_shared(seen: Sequence[tuple[str, bool]]) -> ConfigurationError:
    """Some ranks do not see a folder that others see; (path, seen) by rank."""
    blind = [rank for rank, (_, visible) in enumerate(seen) if not visible]
    return ConfigurationError(
        f"ranks {blind} do not see the checkpoint folder of the others",
        got="; ".join(f"rank {rank}: no {seen[rank][0]}" for rank in blind),
        rule=_SHARED,
        remedy=_MOVE,
    )


def different_bytes(name: str, digests: Iterable[str]) -> ConfigurationError:
    """The ranks read different manifests under the same name."""
    return ConfigurationError(
        f"the ranks see different checkpoints named {name}",
        got="; ".join(f"rank {rank}: manifest {digest}" for rank, digest in enumerate(digests)),
        rule=_SHARED,
        remedy=_MOVE,
    )


def superseded(folder: Path, newest: int, attempt: int) -> ConfigurationError:
    """A later attempt has started: this one must not go on."""
    return ConfigurationError(
        f"a later attempt of this run uses {folder}",
        got=f"attempt {newest} there, attempt {attempt} here",
        rule="one attempt of a run at a time, each with a higher number than those before",
        remedy="nothing is lost: leave the run to the later attempt; where none lives and the run's journal was "
        "removed, restore the journal",
    )


def another_run(folder: Path, theirs: str, ours: str) -> ConfigurationError:
    """The checkpoint is not of this run."""
    return ConfigurationError(
        f"{folder} is a checkpoint of another run",
        got=f"run id {theirs}",
        rule=f"run id {ours}, as this run's folder says",
        remedy="give this run a folder of its own, or move the other run's checkpoints away",
    )


def nothing_left(folder: Path, reasons: Iterable[str]) -> DamagedCheckpointError:
    """There are checkpoints, and none can be used."""
    return DamagedCheckpointError(
        f"none of the checkpoints in {folder} can be used",
        got="; ".join(reasons),
        rule="a run goes on from its newest intact checkpoint, and never silently from step 0",
        remedy="restore one of them from a copy, or begin anew with `solomonov train --fresh`, which sets them aside",
    )
