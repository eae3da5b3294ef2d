"""Which documents a dataset is made of: tables of the inputs, seeded choice and split, tokenizer sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataConfigurationError
from data_pipeline.files import open_array
from data_pipeline.layout import Integers, sample_cap, select
from data_pipeline.plan import Plan, SourceInputs, file_slices
from data_pipeline.stages import Documents, read_table, train
from data_pipeline.tasks import WORK, Runner, Task


@dataclass(frozen=True, slots=True)
class Chosen:
    """The chosen documents of one source.

    Attributes:
        source: the source and its files.
        rows: (documents,) records of TABLE_DTYPE, in file order.
        splits: for each split that is there, its documents in shuffled order as numbers into `rows`.
        found: documents in the files, chosen or not.
    """

    source: SourceInputs
    rows: NDArray[Any]
    splits: dict[str, Integers]
    found: int

    def documents(self, numbers: Integers | slice) -> Documents:
        """Some of the rows, ready to be read."""
        return Documents.of(self.source.config, self.source.files, self.rows[numbers])


def choose_documents(plan: Plan, runner: Runner, *, counted: bool) -> list[Chosen]:
    """Reads the inputs of all sources, and chooses and splits their documents.

    Raises:
        DataConfigurationError: the inputs cannot be read, or a source has too few documents.
    """
    tasks, owners = [], []
    for number, source in enumerate(plan.sources):
        for part, files in enumerate(file_slices(source.files)):
            name = f"table-{source.config.name}-{part:05d}"
            arguments = {
                "folder": plan.folder,
                "source": source.config,
                "files": files,
                "seed": plan.data.prepare.seed,
                "output": f"{WORK}/tables/{name}.npy",
            }
            tasks.append(Task(name, read_table, arguments, counted=counted))
            owners.append(number)
    runner.run("read documents", tasks)
    chosen = []
    for number, source in enumerate(plan.sources):
        tables = [
            open_array(plan.folder / task.arguments["output"])
            for task, owner in zip(tasks, owners, strict=True)
            if owner == number
        ]
        chosen.append(_choose(plan, source, np.concatenate(tables)))
    return chosen


def _choose(plan: Plan, source: SourceInputs, table: NDArray[Any]) -> Chosen:
    prepare, name = plan.data.prepare, source.config.name
    if not len(table):
        raise DataConfigurationError(
            f"Source {name!r} has no text.",
            got=f"{len(source.files)} files of {source.bytes} bytes, all documents empty or blank",
            rule="at least one document that is not blank",
            remedy="correct data.sources path, or add text to the files",
        )
    selection = select(table, prepare.held_out_fraction, prepare.max_source_bytes)
    split_wanted = prepare.held_out_fraction > 0
    if split_wanted and len(selection.train) + len(selection.held_out) < 2:
        raise DataConfigurationError(
            f"Source {name!r} is a single document, so nothing can be held out for evaluation.",
            got=f"1 document in {len(source.files)} files"
            + (f", {len(table)} before data.prepare.max_source_bytes" if len(table) > 1 else ""),
            rule="two documents at least, where data.prepare.held_out_fraction is above 0",
            remedy="set the source's documents to line or blank_line (txt), add files, or set "
            "data.prepare.held_out_fraction to 0",
        )
    splits = {"train": selection.train}
    if split_wanted:
        splits["held_out"] = selection.held_out
    # Tables are in file order, so sorted row numbers are: spills are then read and written front to back.
    kept = np.sort(np.concatenate(list(splits.values())))
    numbers = {split: np.searchsorted(kept, rows) for split, rows in splits.items()}
    return Chosen(source, table[kept], numbers, len(table))


def tokenizer_task(plan: Plan, chosen: list[Chosen]) -> Task:
    """The task that trains the tokenizer on the beginning of each source's shuffled training documents.

    The sample's bytes are shared among the sources by their size, so it does not depend on the weights.
    """
    sizes = [each.rows["text_bytes"][each.splits["train"]].astype(np.int64) for each in chosen]
    total = sum(int(size.sum()) for size in sizes)
    samples = []
    for each, size in zip(chosen, sizes, strict=True):
        budget = plan.data.prepare.tokenizer_sample_bytes * int(size.sum()) // total
        count, size_limit = sample_cap(size, max(budget, 1))
        samples.append((each.documents(each.splits["train"][:count]), size_limit))
    arguments = {
        "folder": plan.folder,
        "samples": samples,
        "kind": plan.tokenizer.kind,
        "vocab_size": plan.tokenizer.vocab_size,
    }
    return Task("tokenizer", train, arguments)
