"""The plan of a preparation: the inputs with their digests, and each setting that decides the bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from data_pipeline.config import DataConfig, SourceConfig, TokenizerConfig, resolve_path
from data_pipeline.errors import DataConfigurationError
from data_pipeline.files import json_bytes
from data_pipeline.manifest import digest_file, digest_hex
from data_pipeline.readers import InputFile, find_inputs
from data_pipeline.tasks import Result, Runner, Task

LAYOUT_VERSION: Final = 1
"""Raised when a change of this package changes the bytes that equal inputs give."""

_SLICE_BYTES: Final = 32 << 20
_SLICE_FILES: Final = 1000


@dataclass(frozen=True, slots=True)
class SourceInputs:
    """One source and the files that it consists of now."""

    config: SourceConfig
    files: list[InputFile]
    digest: str
    """xxh3-128 of the list of names, sizes and content digests."""

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def paths(self) -> list[str]:
        """Names of the files, by their number."""
        return [file.name for file in self.files]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be prepared."""

    folder: Path
    data: DataConfig
    tokenizer: TokenizerConfig
    sources: list[SourceInputs]

    @property
    def settings(self) -> dict[str, str | int | float | None]:
        """Everything that a dataset's bytes depend on, by config key, but for the lengths of rows."""
        prepare = self.data.prepare
        settings: dict[str, str | int | float | None] = {
            "layout version": LAYOUT_VERSION,
            "data.prepare.seed": prepare.seed,
            "data.prepare.shard_bytes": prepare.shard_bytes,
            "data.prepare.held_out_fraction": prepare.held_out_fraction,
            "data.prepare.max_source_bytes": prepare.max_source_bytes,
            "data.prepare.tokenizer_sample_bytes": prepare.tokenizer_sample_bytes,
            "tokenizer.kind": self.tokenizer.kind,
            "tokenizer.vocab_size": self.tokenizer.vocab_size,
            "data.sources names": ", ".join(source.config.name for source in self.sources),
        }
        for source in self.sources:
            key = f"data.sources {source.config.name!r}"
            settings[f"{key} documents"] = source.config.documents
            settings[f"{key} text_field"] = source.config.text_field
            settings[f"{key} files"] = f"{len(source.files)} files, {source.bytes} bytes, xxh3-128 {source.digest}"
        return settings

    @property
    def work_bytes(self) -> bytes:
        """What unfinished work belongs to: the settings, and the row length that blocks are made for."""
        return json_bytes({"settings": self.settings, "sequence_tokens": self.data.sequence_tokens})


def make_plan(data: DataConfig, tokenizer: TokenizerConfig, base_folder: Path, runner: Runner) -> Plan:
    """Finds the input files of all sources and digests them.

    Raises:
        DataConfigurationError: a source has no files, or files that cannot be read.
    """
    found = [find_inputs(source, base_folder, runner.folder) for source in data.sources]
    slices = [part for files in found for part in file_slices(files)]
    tasks = [Task("", digest_files, {"paths": [file.path for _, file in part]}, counted=False) for part in slices]
    # A pool takes a second to start: only worth it where there is much to read.
    large = sum(file.size for files in found for file in files) > 4 * _SLICE_BYTES
    results = runner.run("read inputs", tasks) if large else [task.function(**task.arguments) for task in tasks]
    digests = iter([digest for result in results for digest in result["digests"]])
    sources = []
    for config, files in zip(data.sources, found, strict=True):
        rows = [[file.name, file.size, next(digests)] for file in files]
        sources.append(SourceInputs(config, files, digest_hex(json_bytes(rows))))
    return Plan(resolve_path(data.folder, base_folder), data, tokenizer, sources)


def file_slices(files: Sequence[InputFile]) -> list[list[tuple[int, InputFile]]]:
    """Consecutive (number, file) pairs in slices of about 32 MiB, for one task each."""
    slices: list[list[tuple[int, InputFile]]] = []
    size = 0
    for number, file in enumerate(files):
        if not slices or size + file.size > _SLICE_BYTES or len(slices[-1]) >= _SLICE_FILES:
            slices.append([])
            size = 0
        slices[-1].append((number, file))
        size += file.size
    return slices


def digest_files(paths: list[str]) -> Result:
    """Task: xxh3-128 of whole files."""
    return {"digests": [digest_file(Path(path)) for path in paths]}


def check_same(plan: Plan, prepared: dict[str, Any]) -> None:
    """Refuses to touch a dataset that was prepared otherwise; `prepared` is its manifest's settings.

    Raises:
        DataConfigurationError: naming each difference.
    """
    wanted = json.loads(json.dumps(plan.settings))
    keys = sorted(set(wanted) | set(prepared))
    differences = [
        f"{key}: {prepared.get(key, 'absent')} in the dataset, {wanted.get(key, 'absent')} now"
        for key in keys
        if prepared.get(key) != wanted.get(key)
    ]
    if differences:
        raise DataConfigurationError(
            f"{plan.folder} holds a dataset that was prepared from other text or with other settings.",
            got="\n          ".join(differences),
            rule="a dataset is never changed in place: runs that trained on it must find it again",
            remedy=f"set data.folder to another folder; or, if nobody needs the old dataset, remove it: {plan.folder}",
        )
