"""From tokens to a dataset: the layout of each split, its shards and arrays, and the manifest over all."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from data_pipeline.choose import Chosen
from data_pipeline.errors import DataConfigurationError
from data_pipeline.files import open_array, write_array
from data_pipeline.layout import (
    MIN_BLOCKS,
    Integers,
    choose_block_tokens,
    choose_lanes,
    choose_window_blocks,
    cut_blocks,
    cut_documents,
    cut_shards,
    part_bytes,
)
from data_pipeline.manifest import Manifest
from data_pipeline.plan import Plan
from data_pipeline.shards import shard_name
from data_pipeline.stages import ENTRY_DTYPE, MODEL_FILE, REPORT_FILE, make_blocks, make_rows, make_shard
from data_pipeline.tasks import WORK, Result, Runner, Task

_ORIGIN_BYTES: Final = 64
"""What the origin of a document takes in a shard, beside the names of its source and file."""


@dataclass(frozen=True, slots=True)
class Spills:
    """The tokens of one source's chosen documents, in file order.

    Attributes:
        names: paths below the folder, without suffix.
        lengths: (documents,) tokens of each.
        spill: (documents,) number of the spill that holds it.
        offset: (documents,) its first token within the spill.
    """

    names: list[str]
    lengths: Integers
    spill: Integers
    offset: Integers

    @classmethod
    def load(cls, plan: Plan, names: list[str]) -> Spills:
        """Opens the spills of a source."""
        parts = [open_array(plan.folder / f"{name}.lengths.npy").astype(np.int64) for name in names]
        numbers = [np.full(len(part), number, dtype=np.int64) for number, part in enumerate(parts)]
        offsets = [np.cumsum(part) - part for part in parts]
        return cls(names, np.concatenate(parts), np.concatenate(numbers), np.concatenate(offsets))


@dataclass(frozen=True, slots=True)
class SplitLayout:
    """Where the documents of one split lie.

    Attributes:
        shards: paths of the shards.
        starts: for each shard its first document (in shuffled order) and the first token of it that it holds.
        blocks: blocks in all.
        documents: documents in the split.
    """

    source: str
    split: str
    shards: list[str]
    starts: list[tuple[int, int]]
    blocks: int
    documents: int

    @property
    def key(self) -> str:
        """SOURCE-SPLIT."""
        return f"{self.source}-{self.split}"


def source_block_tokens(plan: Plan, chosen: Chosen, spills: Spills) -> int:
    """Tokens of a block of this source.

    Raises:
        DataConfigurationError: the train split is too small for 8 blocks of one row.
    """
    lengths = spills.lengths[chosen.splits["train"]]
    name, row = chosen.source.config.name, plan.data.sequence_tokens
    block_tokens = choose_block_tokens(lengths, row)
    if block_tokens is None:
        raise DataConfigurationError(
            f"The corpus is too small: source {name!r} does not fill {MIN_BLOCKS} blocks.",
            got=f"{len(lengths)} training documents of {int(lengths.sum())} tokens in all",
            rule=f"at least {MIN_BLOCKS} blocks of one row of data.sequence_tokens {row}: "
            f"about {MIN_BLOCKS * row} tokens",
            remedy="add text, set data.sequence_tokens or data.prepare.held_out_fraction lower, or join the "
            "source with another",
        )
    return block_tokens


def lay_out(
    plan: Plan, chosen: Chosen, spills: Spills, split: str, block_tokens: int
) -> tuple[SplitLayout, list[Task]]:
    """Cuts a split into blocks and shards; returns the layout and the tasks that write the shards."""
    numbers, source = chosen.splits[split], chosen.source
    lengths = spills.lengths[numbers]
    entries = cut_documents(lengths, block_tokens)
    rows = numbers[entries.document]
    records = np.zeros(len(rows), dtype=ENTRY_DTYPE)
    records["row"], records["part"], records["tokens"] = rows, entries.part, entries.tokens
    records["text_bytes"] = part_bytes(entries, lengths, chosen.rows["text_bytes"][numbers].astype(np.int64))
    records["spill"], records["offset"] = spills.spill[rows], spills.offset[rows] + entries.start
    blocks = cut_blocks(entries.tokens, block_tokens)
    # JSON writes a character outside ASCII as six.
    names = np.array([len(json.dumps(path)) for path in source.paths], dtype=np.int64)
    origins = _ORIGIN_BYTES + len(source.config.name) + names[chosen.rows["file"][rows]]
    entry_bytes = entries.tokens * token_bytes(plan) + 4 + origins
    shards = cut_shards(blocks, entry_bytes, plan.data.prepare.shard_bytes)
    firsts = blocks[shards[:-1]]
    starts = zip(entries.document[firsts].tolist(), entries.start[firsts].tolist(), strict=True)
    count = len(shards) - 1
    layout = SplitLayout(
        source=source.config.name,
        split=split,
        shards=[shard_name(source.config.name, split, number) for number in range(count)],
        starts=list(starts),
        blocks=len(blocks) - 1,
        documents=len(numbers),
    )
    file = f"{WORK}/layout/{layout.key}.npy"
    write_array(plan.folder / file, plan.folder / WORK / "tmp", records)
    tasks = []
    for number, shard in enumerate(layout.shards):
        arguments = {
            "folder": plan.folder,
            "shard": shard,
            "source": layout.source,
            "layout": (file, blocks[shards[number] : shards[number + 1] + 1].tolist()),
            "spills": spills.names,
            "token_dtype": token_dtype(plan),
        }
        tasks.append(Task(f"shard-{layout.key}-{number:06d}", make_shard, arguments))
    return layout, tasks


def token_dtype(plan: Plan) -> str:
    """The stored type of a token."""
    return "uint16" if plan.tokenizer.vocab_size <= 1 << 16 else "uint32"


def token_bytes(plan: Plan) -> int:
    """Bytes of a stored token."""
    return np.dtype(token_dtype(plan)).itemsize


def blocks_file(key: str) -> str:
    """Path of a split's block array."""
    return f"blocks/{key}.npy"


def blocks_task(plan: Plan, key: str, shards: list[str]) -> Task:
    """The task that writes a split's block array."""
    arguments = {"folder": plan.folder, "shards": shards, "output": blocks_file(key)}
    return Task(f"blocks-{key}", make_blocks, arguments)


def rows_task(plan: Plan, key: str, shards: list[str], sequence_tokens: int, packing: str) -> Task:
    """The task that writes a split's rows per block for one row length and packing."""
    name = f"{key}-T{sequence_tokens}-{packing}"
    arguments = {
        "folder": plan.folder,
        "shards": shards,
        "blocks": blocks_file(key),
        "rows": (sequence_tokens, packing),
        "output": f"rows/{name}.npy",
    }
    return Task(f"rows-{name}", make_rows, arguments)


def rows_record(result: Result, sequence_tokens: int, packing: str) -> dict[str, Any]:
    """The manifest's entry for a rows array."""
    return {
        **result["files"][0],
        "sequence_tokens": sequence_tokens,
        "packing": packing,
        "rows": result["rows"],
    }


@dataclass(frozen=True, slots=True)
class Assembled:
    """A split with the results of its tasks."""

    layout: SplitLayout
    shards: list[Result]
    blocks: Result
    rows: Result

    def entry(self, plan: Plan) -> dict[str, Any]:
        """The split in the manifest."""
        return {
            "shards": [
                {**shard["files"][0], "index": shard["files"][1], "blocks": shard["blocks"]} for shard in self.shards
            ],
            "blocks": self.blocks["files"][0],
            "block_count": self.blocks["blocks"],
            "rows": [rows_record(self.rows, plan.data.sequence_tokens, plan.data.packing)],
            "documents": self.layout.documents,
            "tokens": self.blocks["tokens"],
            "text_bytes": self.blocks["text_bytes"],
        }


def assemble_splits(plan: Plan, runner: Runner, layouts: list[SplitLayout], shards: list[Result]) -> list[Assembled]:
    """Writes block and row arrays of all splits; `shards` are the results of the shard tasks in order."""
    results = iter(shards)
    per_split = [[next(results) for _ in layout.shards] for layout in layouts]
    blocks = runner.run("index blocks", [blocks_task(plan, each.key, each.shards) for each in layouts])
    rows = runner.run(
        "pack rows",
        [rows_task(plan, each.key, each.shards, plan.data.sequence_tokens, plan.data.packing) for each in layouts],
    )
    return [Assembled(*parts) for parts in zip(layouts, per_split, blocks, rows, strict=True)]


def build_manifest(
    plan: Plan,
    tokenizer: Result,
    chosen: list[Chosen],
    block_tokens: dict[str, int],
    splits: Iterable[Assembled],
) -> Manifest:
    """The manifest over everything that was written."""
    by_source: dict[str, dict[str, Assembled]] = {}
    for split in splits:
        by_source.setdefault(split.layout.source, {})[split.layout.split] = split
    sources = []
    for each in chosen:
        config, mine = each.source.config, by_source[each.source.config.name]
        inputs = {
            "files": len(each.source.files),
            "documents": each.found,
            "bytes": each.source.bytes,
            "xxh3_128": each.source.digest,
        }
        held_out = mine["held_out"].entry(plan) if "held_out" in mine else None
        sources.append(
            {
                "name": config.name,
                "weight": float(config.weight),
                "inputs": inputs,
                "train": mine["train"].entry(plan),
                "held_out": held_out,
            }
        )
    lanes = choose_lanes(min(parts["train"].layout.blocks for parts in by_source.values()))
    model, report = tokenizer["files"]
    kind, vocab_size = plan.tokenizer.kind, plan.tokenizer.vocab_size
    content = {
        "seed": plan.data.prepare.seed,
        "prepare": {
            "settings": plan.settings,
            "block_tokens": block_tokens,
            "shard_starts": {
                split.layout.key: split.layout.starts for parts in by_source.values() for split in parts.values()
            },
        },
        "tokenizer": {**model, "kind": kind, "vocab_size": vocab_size, "report": report},
        "token_dtype": token_dtype(plan),
        "block_tokens": max(block_tokens.values()),
        "lanes": lanes,
        "window_blocks": choose_window_blocks(lanes, sum(block_tokens.values()) * token_bytes(plan)),
        "sources": sources,
    }
    assert (model["file"], report["file"]) == (MODEL_FILE, REPORT_FILE), "the tokenizer task reports both files"
    return Manifest.model_validate_json(json.dumps(content))
