"""A folder that holds a dataset already: check every byte, make damaged files again, add row lengths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_pipeline.assemble import blocks_task, rows_record, rows_task
from data_pipeline.choose import Chosen, choose_documents, tokenizer_task
from data_pipeline.errors import DamagedDataError, DataConfigurationError
from data_pipeline.manifest import (
    MANIFEST_FILE,
    READABLE_SCHEMA_VERSIONS,
    FileRecord,
    Manifest,
    SplitManifest,
    check_file,
    parse_manifest,
)
from data_pipeline.plan import Plan
from data_pipeline.stages import remake_shard
from data_pipeline.tasks import Result, Runner, Task


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest, without a look at the files it names; None where none is there or it is damaged.

    Raises:
        DataConfigurationError: the manifest is of a schema that this version cannot read.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    raw = path.read_bytes()
    try:
        return parse_manifest(raw, path)
    except DataConfigurationError:
        try:
            content = json.loads(raw)
        except ValueError:
            return None
        version = content.get("schema_version") if isinstance(content, dict) else None
        if isinstance(version, int) and version not in READABLE_SCHEMA_VERSIONS:
            raise
        # Damaged: a folder without a manifest is no dataset; the same plan gives the same bytes again.
        return None


class Repair:
    """What separates a dataset folder from what its manifest and the config say."""

    def __init__(self, plan: Plan, manifest: Manifest) -> None:
        self.plan, self.manifest = plan, manifest
        self.damaged = {record.file for record in manifest.files() if not _intact(plan.folder, record)}
        """Files that are missing or differ from their digest."""
        wanted = (plan.data.sequence_tokens, plan.data.packing)
        self.new_rows = [
            (f"{source.name}-{split}", each)
            for source in manifest.sources
            for split, each in source.splits()
            if each.rows_record(*wanted) is None
        ]
        weights = [float(source.config.weight) for source in plan.sources]
        self.new_weights = weights != [source.weight for source in manifest.sources]

    @property
    def needed(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.damaged or self.new_rows or self.new_weights)

    def run(self, runner: Runner) -> Manifest:
        """Does it; returns the manifest as it then stands in the folder.

        Raises:
            DamagedDataError: a file cannot be made again with the bytes that the manifest vouches for.
        """
        self._tokenizer_and_shards(runner)
        splits = [
            (f"{source.name}-{split}", each) for source in self.manifest.sources for split, each in source.splits()
        ]
        self._check(
            runner.run(
                "repair blocks",
                [
                    blocks_task(self.plan, key, _shards(each))
                    for key, each in splits
                    if each.blocks.file in self.damaged
                ],
            )
        )
        self._check(
            runner.run(
                "repair rows",
                [
                    rows_task(self.plan, key, _shards(each), record.sequence_tokens, record.packing)
                    for key, each in splits
                    for record in each.rows
                    if record.file in self.damaged
                ],
            )
        )
        return self._extended(runner)

    def _tokenizer_and_shards(self, runner: Runner) -> None:
        tokenizer = {record.file for record in _tokenizer_files(self.manifest)} & self.damaged
        shards = {
            f"{source.name}-{split}": [
                number for number, shard in enumerate(each.shards) if {shard.file, shard.index.file} & self.damaged
            ]
            for source in self.manifest.sources
            for split, each in source.splits()
        }
        if not tokenizer and not any(shards.values()):
            return
        chosen = choose_documents(self.plan, runner, counted=False)
        if tokenizer:
            self._check(runner.run("repair tokenizer", [tokenizer_task(self.plan, chosen)]))
        tasks = [
            self._shard_task(each, split, number)
            for each in chosen
            for split in each.splits
            for number in shards[f"{each.source.config.name}-{split}"]
        ]
        self._check(runner.run("repair shards", tasks))

    def _shard_task(self, chosen: Chosen, split: str, number: int) -> Task:
        name = chosen.source.config.name
        prepare = self.manifest.prepare
        starts: list[tuple[int, int]] = [tuple(start) for start in prepare["shard_starts"][f"{name}-{split}"]]
        documents = chosen.splits[split]
        first, start = starts[number]
        last, end = starts[number + 1] if number + 1 < len(starts) else (len(documents), 0)
        shard = dict(next(s for s in self.manifest.sources if s.name == name).splits())[split].shards[number]
        arguments: dict[str, Any] = {
            "folder": self.plan.folder,
            "shard": shard.file,
            # The next shard's first document is also in this one where it was cut.
            "documents": chosen.documents(documents[first : last + (end > 0)]),
            "bounds": (start, end),
            "block_tokens": prepare["block_tokens"][name],
            "token_dtype": self.manifest.token_dtype,
        }
        return Task(f"shard-{name}-{split}-{number:06d}", remake_shard, arguments)

    def _check(self, results: list[Result]) -> None:
        """Compares what was made again with what the manifest vouches for."""
        records = {record.file: record for record in self.manifest.files()}
        for result in results:
            for file in result["files"]:
                record = records[file["file"]]
                if (file["size"], file["xxh3_128"]) != (record.size, record.xxh3_128):
                    raise DamagedDataError(
                        f"{self.plan.folder / record.file} cannot be made again as it was.",
                        got=f"{file['size']} bytes with digest {file['xxh3_128']}",
                        rule=f"{record.size} bytes with digest {record.xxh3_128}, says {MANIFEST_FILE}",
                        remedy="use the versions of this program and of sentencepiece that prepared the "
                        f"dataset, or remove {self.plan.folder} and prepare it anew",
                    )

    def _extended(self, runner: Runner) -> Manifest:
        """Adds rows arrays for another row length or packing, and new weights."""
        if not self.new_rows and not self.new_weights:
            return self.manifest
        sequence_tokens, packing = self.plan.data.sequence_tokens, self.plan.data.packing
        tasks = [rows_task(self.plan, key, _shards(each), sequence_tokens, packing) for key, each in self.new_rows]
        results = dict(zip([key for key, _ in self.new_rows], runner.run("pack rows", tasks), strict=True))
        content = self.manifest.model_dump(mode="json")
        for source, config in zip(content["sources"], self.plan.sources, strict=True):
            source["weight"] = float(config.config.weight)
            for split in ("train", "held_out"):
                if (result := results.get(f"{source['name']}-{split}")) is not None:
                    rows = source[split]["rows"]
                    rows.append(rows_record(result, sequence_tokens, packing))
                    rows.sort(key=lambda record: (record["sequence_tokens"], record["packing"]))
        return Manifest.model_validate_json(json.dumps(content)).write(self.plan.folder)


def _shards(split: SplitManifest) -> list[str]:
    return [shard.file for shard in split.shards]


def _tokenizer_files(manifest: Manifest) -> list[FileRecord]:
    report = manifest.tokenizer.report
    return [manifest.tokenizer] if report is None else [manifest.tokenizer, report]


def _intact(folder: Path, record: FileRecord) -> bool:
    try:
        check_file(folder.resolve(), record)
    except DamagedDataError:
        return False
    return True
