"""`prepare`: raw text in, a dataset folder out.

Tasks run in phases; between phases this process computes the layout, which follows from the documents'
hashes and lengths alone. MANIFEST.json is written last: a folder with a manifest is a whole dataset, one
without is not.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np

from data_pipeline.assemble import (
    Spills,
    SplitLayout,
    assemble_splits,
    build_manifest,
    lay_out,
    source_block_tokens,
    token_dtype,
)
from data_pipeline.choose import Chosen, choose_documents, tokenizer_task
from data_pipeline.config import DataConfig, TokenizerConfig, resolve_path
from data_pipeline.errors import DataConfigurationError
from data_pipeline.files import explained_os_errors, write_array, write_bytes, write_json
from data_pipeline.manifest import MANIFEST_FILE, Manifest
from data_pipeline.plan import Plan, check_same, make_plan
from data_pipeline.progress import Progress
from data_pipeline.repair import Repair, read_manifest
from data_pipeline.stages import paths_file, selection_file, tokenise
from data_pipeline.tasks import WORK, Runner, Task, work_lock

_OUTPUTS: Final = ("tokenizer", "shards", "blocks", "rows")
_SPILL_BYTES: Final = 2 << 20
_SPILLS: Final = 512
"""Upper bound on the spills of a source: a shard task maps all of them at once."""


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What `prepare` did.

    Attributes:
        folder: the dataset folder.
        manifest: the dataset's manifest.
        redone: tasks that ran because their output was missing or damaged; 0 where all was there.
        seconds: wall time of each phase that ran.
    """

    folder: Path
    manifest: Manifest
    redone: int
    seconds: dict[str, float]

    def summary(self) -> list[tuple[str, str]]:
        """(label, value) lines for a person."""
        manifest = self.manifest
        lines = [("dataset", str(self.folder)), ("manifest digest", manifest.digest)]
        for source in manifest.sources:
            inputs = source.inputs
            read = f"{inputs.files:,} files, {inputs.documents:,} documents, {inputs.bytes:,} bytes"
            lines.append((f"source {source.name}", read))
            for split, each in source.splits():
                value = (
                    f"{each.documents:,} documents, {each.tokens:,} tokens, {each.block_count:,} blocks "
                    f"in {len(each.shards):,} shards"
                )
                lines.append((f"  {split.replace('_', '-')}", value))
        if manifest.tokenizer.report is not None:
            report = json.loads((self.folder / manifest.tokenizer.report.file).read_bytes())
            quality = (
                f"{report['kind']}, {report['vocab_size']:,} pieces, "
                f"{report['sample']['bytes_per_token']:.2f} bytes a token, "
                f"{report['sample']['fertility_tokens_per_word']:.2f} tokens a word"
            )
            lines.append(("tokenizer", quality))
        lines.append(("lanes", str(manifest.lanes)))
        lines.append(("tasks run", f"{self.redone:,} in {sum(self.seconds.values()):.1f} s"))
        return lines


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    *,
    base_folder: Path,
    show_progress: bool = True,
    cluster: str | None = None,
) -> PrepareReport:
    """Makes the dataset that `data` describes, or completes or checks the one that is there.

    The bytes depend on the input texts, the settings and the seed: not on workers, backend, interruptions or reruns.

    Args:
        data: the data section; `data.prepare.seed` is the seed.
        tokenizer: the tokenizer section.
        base_folder: what relative paths count from.
        show_progress: bars on a terminal, plain lines elsewhere, on stderr.
        cluster: host:port of the head of the Ray that runs the tasks, where `data.prepare.backend` is `ray`. It is
            joined only if there is a task to run.

    Raises:
        DataConfigurationError: the config or the input text cannot work, the folder holds another dataset,
            the disk is full, or a permission is missing. Finished tasks are kept.
        DamagedDataError: a damaged file cannot be made again as it was.
        DataError: the cluster cannot be joined, or a task's process died again and again.
    """
    address = _address(cluster) if data.prepare.backend == "ray" else None
    folder = resolve_path(data.folder, base_folder)
    with (
        explained_os_errors(folder),
        Progress(show=show_progress) as progress,
        Runner(folder, data.prepare.workers, progress, address) as runner,
    ):
        plan = make_plan(data, tokenizer, base_folder, runner)
        manifest = _whole_dataset(plan)
        if manifest is None:
            with work_lock(folder):
                manifest = _complete(plan, runner)
                # Last: until here a kill leaves everything that a rerun needs.
                shutil.rmtree(folder / WORK)
        return PrepareReport(folder, manifest, runner.redone, dict(progress.seconds))


def _address(cluster: str | None) -> str:
    host, _, port = (cluster or "").rpartition(":")
    if cluster is None or not host or not port.isdigit() or "/" in host:
        raise DataConfigurationError(
            "There is no Ray cluster to prepare the dataset on.",
            got="data.prepare.backend: ray without an address" if cluster is None else f"the address {cluster!r}",
            rule="the address of the head of a Ray that runs, as host:port",
            remedy="start Ray and give its address, or set data.prepare.backend: local",
        )
    return cluster


def _whole_dataset(plan: Plan) -> Manifest | None:
    """The dataset in the folder, if it is whole and what the plan asks for; nothing is written."""
    manifest = read_manifest(plan.folder)
    if manifest is None or (plan.folder / WORK).exists():
        return None
    check_same(plan, manifest.prepare["settings"])
    return None if Repair(plan, manifest).needed else Manifest.load(plan.folder)


def _complete(plan: Plan, runner: Runner) -> Manifest:
    manifest = read_manifest(plan.folder)
    if manifest is not None:
        check_same(plan, manifest.prepare["settings"])
        repair = Repair(plan, manifest)
        if not repair.needed:
            return Manifest.load(plan.folder)
        for name in sorted(repair.damaged):
            runner.progress.line(f"missing or damaged: {name}")
        _start_work(plan, runner)
        repair.run(runner)
        return Manifest.load(plan.folder)
    _check_folder(plan.folder)
    _start_work(plan, runner)
    return _build(plan, runner)


def _check_folder(folder: Path) -> None:
    """Refuses a folder in which there is anything but our own work."""
    known = {MANIFEST_FILE, WORK, *_OUTPUTS}
    aside = f".{MANIFEST_FILE}."
    foreign = sorted(
        path.name for path in folder.iterdir() if path.name not in known and not path.name.startswith(aside)
    )
    if foreign:
        raise DataConfigurationError(
            f"{folder} is not empty, and what it holds is not a dataset.",
            got=", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""),
            rule="data.folder names an empty or new folder, or one that `prepare` made",
            remedy="set data.folder to another folder",
        )


def _start_work(plan: Plan, runner: Runner) -> None:
    """Keeps the unfinished work of the same plan, clears that of another one."""
    work = plan.folder / WORK
    identity = work / "plan.json"
    if identity.is_file() and identity.read_bytes() == plan.work_bytes:
        shutil.rmtree(work / "tmp", ignore_errors=True)
        return
    if identity.is_file():
        runner.progress.line("the text or the settings changed since the unfinished preparation: starting anew")
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()
    write_bytes(identity, work / "tmp", plan.work_bytes)


def _build(plan: Plan, runner: Runner) -> Manifest:
    chosen = choose_documents(plan, runner, counted=True)
    [tokenizer] = runner.run("train tokenizer", [tokenizer_task(plan, chosen)])
    spills = _tokenise(plan, runner, chosen)
    block_tokens: dict[str, int] = {}
    layouts: list[SplitLayout] = []
    tasks: list[Task] = []
    for each, spilled in zip(chosen, spills, strict=True):
        size = block_tokens[each.source.config.name] = source_block_tokens(plan, each, spilled)
        for split in each.splits:
            layout, shard_tasks = lay_out(plan, each, spilled, split, size)
            layouts.append(layout)
            tasks += shard_tasks
    shards = runner.run("write shards", tasks)
    splits = assemble_splits(plan, runner, layouts, shards)
    build_manifest(plan, tokenizer, chosen, block_tokens, splits).write(plan.folder)
    return Manifest.load(plan.folder)


def _tokenise(plan: Plan, runner: Runner, chosen: list[Chosen]) -> list[Spills]:
    """Writes the tokens of all chosen documents, source by source in file order."""
    tasks: list[Task] = []
    names: list[list[str]] = []
    aside = plan.folder / WORK / "tmp"
    for each in chosen:
        source = each.source.config.name
        write_array(plan.folder / selection_file(source), aside, each.rows)
        write_json(plan.folder / paths_file(source), aside, each.source.paths)
        names.append([])
        for number, part in enumerate(_spill_slices(each)):
            name = f"tokens-{source}-{number:05d}"
            output = f"{WORK}/tokens/{name}"
            arguments = {
                "folder": plan.folder,
                "documents": each.documents(part),
                "token_dtype": token_dtype(plan),
                "output": output,
            }
            tasks.append(Task(name, tokenise, arguments))
            names[-1].append(output)
    runner.run("tokenise", tasks)
    return [Spills.load(plan, files) for files in names]


def _spill_slices(chosen: Chosen) -> list[slice]:
    """Consecutive documents of about 2 MiB of text, more where there would be more than 512 slices."""
    ends = np.cumsum(chosen.rows["text_bytes"].astype(np.int64))
    size = max(_SPILL_BYTES, -(-int(ends[-1]) // _SPILLS))
    cuts = np.flatnonzero(np.diff(ends // size)) + 1
    bounds = [0, *cuts.tolist(), len(ends)]
    return [slice(first, end) for first, end in pairwise(bounds)]
