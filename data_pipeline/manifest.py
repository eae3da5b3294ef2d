"""MANIFEST.json: what a prepared dataset folder consists of, and the digest of every file in it.

Training reads nothing that this file does not vouch for. It is written last, atomically, as canonical bytes:
sorted keys, no timestamp, no absolute path, so that equal inputs give equal bytes. `seal` is the digest of
the rest of the file: an altered byte is found before any number in it is believed.

All digests are xxh3-128, 32 lower-case hexadecimal digits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal

import numpy as np
import xxhash
from pydantic import AfterValidator, Field, PrivateAttr, ValidationError, model_validator

from data_pipeline.errors import DamagedDataError, DataConfigurationError
from data_pipeline.packing import Packing
from data_pipeline.section import Section

MANIFEST_FILE: Final = "MANIFEST.json"
SCHEMA_VERSION: Final = 1
READABLE_SCHEMA_VERSIONS: Final = (1,)

UNK_ID: Final = 0
BOS_ID: Final = 1
EOS_ID: Final = 2
PAD_ID: Final = 3

SPLITS: Final = ("train", "held_out")

BLOCK_DTYPE: Final = np.dtype(
    [
        ("shard", "<u4"),
        ("tokens_offset", "<u8"),
        ("tokens_size", "<u8"),
        ("lengths_offset", "<u8"),
        ("lengths_size", "<u8"),
        ("documents", "<u4"),
        ("tokens", "<u8"),
        ("text_bytes", "<u8"),
        ("digest_tokens", "<u8", (2,)),
        ("digest_lengths", "<u8", (2,)),
    ]
)
"""One record a block: offsets and sizes in bytes of the members' data within the shard file; digests as
(high 64 bits, low 64 bits) of xxh3-128. `shard` counts within the split."""

_DIGEST_CHUNK_BYTES = 8 << 20


def digest_hex(data: bytes | memoryview) -> str:
    """xxh3-128 of bytes in memory."""
    return xxhash.xxh3_128_hexdigest(data)


def digest_pair(data: bytes | memoryview) -> tuple[int, int]:
    """xxh3-128 as the two 64-bit words (high, low) that a block record holds."""
    value = xxhash.xxh3_128_intdigest(data)
    return value >> 64, value & 0xFFFFFFFFFFFFFFFF


def pair_hex(pair: tuple[int, int]) -> str:
    """The hexadecimal digest of a (high, low) pair."""
    return f"{int(pair[0]):016x}{int(pair[1]):016x}"


def digest_file(path: Path) -> str:
    """xxh3-128 of a whole file, read in pieces of 8 MiB.

    Raises:
        OSError: the file cannot be read.
    """
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_DIGEST_CHUNK_BYTES):
            state.update(chunk)
    return state.hexdigest()


def _relative_path(value: str) -> str:
    path = PurePosixPath(value)
    inside = bool(value) and not path.is_absolute() and ".." not in path.parts
    if not inside or "\\" in value or "\0" in value or str(path) != value or value == ".":
        raise ValueError(f"{value!r} is not a plain relative path inside the dataset folder")
    return value


RelativePath = Annotated[str, AfterValidator(_relative_path)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Count = Annotated[int, Field(ge=0)]


class FileRecord(Section):
    """A file that the manifest vouches for."""

    file: RelativePath
    """Path below the dataset folder, with forward slashes."""
    size: Count
    """Bytes."""
    xxh3_128: Digest
    """Digest of the whole file."""

    @classmethod
    def of(cls, folder: Path, file: str) -> FileRecord:
        """Reads size and digest of a file that lies below `folder`."""
        path = folder / file
        return cls(file=file, size=path.stat().st_size, xxh3_128=digest_file(path))


class ShardRecord(FileRecord):
    """One shard (a WebDataset tar) and the index beside it."""

    index: FileRecord
    """The shard's index: its members' names, offsets, sizes and digests."""
    blocks: Count
    """Blocks in the shard."""


class RowsRecord(FileRecord):
    """The array of rows per block for one row length and packing."""

    sequence_tokens: Annotated[int, Field(ge=1)]
    """Positions in a row (T)."""
    packing: Packing
    """How documents were placed into rows."""
    rows: Count
    """Rows of all blocks of the split together."""


class SplitManifest(Section):
    """One split (train or held-out) of one source."""

    shards: tuple[ShardRecord, ...] = Field(strict=False)
    """Shards in order; block records count them from 0."""
    blocks: FileRecord
    """The block array: BLOCK_DTYPE, .npy."""
    block_count: Count
    """Blocks in all shards."""
    rows: tuple[RowsRecord, ...] = Field(strict=False)
    """Rows per block, one entry a (sequence_tokens, packing)."""
    documents: Count
    """Documents in the split."""
    tokens: Count
    """Stored tokens, BOS and EOS included."""
    text_bytes: Count
    """UTF-8 bytes of the documents' normalised text."""

    @model_validator(mode="after")
    def _blocks_add_up(self) -> SplitManifest:
        in_shards = sum(shard.blocks for shard in self.shards)
        if in_shards != self.block_count:
            raise ValueError(f"shards hold {in_shards} blocks, block_count is {self.block_count}")
        return self

    def rows_record(self, sequence_tokens: int, packing: str) -> RowsRecord | None:
        """The entry for this row length and packing, if prepare made one."""
        for record in self.rows:
            if record.sequence_tokens == sequence_tokens and record.packing == packing:
                return record
        return None

    def files(self) -> Iterator[FileRecord]:
        """Every file of the split."""
        for shard in self.shards:
            yield shard
            yield shard.index
        yield self.blocks
        yield from self.rows


class InputsSummary(Section):
    """What a source was made from."""

    files: Count
    """Input files read."""
    documents: Count
    """Documents found in them."""
    bytes: Count
    """Bytes of the input files."""
    xxh3_128: Digest
    """Digest of the list of inputs (names, sizes, content digests)."""


class SourceManifest(Section):
    """One source of the mixture."""

    name: str
    """Name from the data section."""
    weight: Annotated[float, Field(gt=0)]
    """Weight from the data section; the stream may be given others."""
    inputs: InputsSummary
    """What was read."""
    train: SplitManifest
    """The training split."""
    held_out: SplitManifest | None = None
    """The held-out split; null where nothing was held out."""

    def splits(self) -> Iterator[tuple[str, SplitManifest]]:
        """(split name, split), train first."""
        yield "train", self.train
        if self.held_out is not None:
            yield "held_out", self.held_out


class TokenizerRecord(FileRecord):
    """The tokenizer model that made the tokens."""

    kind: str
    """SentencePiece model type: unigram or bpe."""
    vocab_size: Annotated[int, Field(ge=4)]
    """Number of ids; tokens are below it."""
    report: FileRecord | None = None
    """The tokenizer's quality report."""


class Manifest(Section):
    """The whole of MANIFEST.json."""

    schema_version: Literal[1] = SCHEMA_VERSION
    """Version of this format."""
    seed: int
    """Seed of the preparation (shuffle, split, samples); not the seed of the training order."""
    prepare: dict[str, Any]
    """Preparation settings that decided the bytes."""
    tokenizer: TokenizerRecord
    """The tokenizer."""
    token_dtype: Literal["uint16", "uint32"]
    """Stored token type, little-endian."""
    block_tokens: Annotated[int, Field(ge=1)]
    """Tokens aimed at in a block."""
    lanes: Annotated[int, Field(ge=1)]
    """Lanes of every source; lane l owns blocks [l*n//lanes, (l+1)*n//lanes)."""
    window_blocks: Annotated[int, Field(ge=1)]
    """Rows are permuted within windows of this many permuted blocks of a lane."""
    sources: tuple[SourceManifest, ...] = Field(strict=False, min_length=1)
    """Sources in the order of the data section."""

    _folder: Path | None = PrivateAttr(default=None)
    _digest: str | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"source names are not unique: {names}")
        if self.lanes & (self.lanes - 1):
            raise ValueError(f"lanes is {self.lanes}, not a power of two")
        for source in self.sources:
            if source.train.block_count < self.lanes:
                raise ValueError(f"source {source.name!r} has {source.train.block_count} blocks for {self.lanes} lanes")
        files = [record.file for record in self.files()]
        if len(set(files)) != len(files):
            raise ValueError("two entries name the same file")
        return self

    @property
    def folder(self) -> Path:
        """The dataset folder that this manifest was loaded from or written to."""
        assert self._folder is not None, "a manifest has a folder only after load() or write()"
        return self._folder

    @property
    def digest(self) -> str:
        """xxh3-128 of the bytes of MANIFEST.json."""
        if self._digest is None:
            self._digest = digest_hex(self.to_bytes())
        return self._digest

    @property
    def content_digest(self) -> str:
        """xxh3-128 of what decides the rows of a stream: all but weights and rows arrays, so that preparing another
        row length, or weighing the sources anew, leaves a run in progress on the data that it knows."""
        content = self.model_dump(mode="json")
        for source in content["sources"]:
            del source["weight"]
            for split in ("train", "held_out"):
                if source[split] is not None:
                    del source[split]["rows"]
        return digest_hex(_canonical(content))

    @property
    def tokenizer_digest(self) -> str:
        """xxh3-128 of the tokenizer model file."""
        return self.tokenizer.xxh3_128

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources, in order."""
        return tuple(source.name for source in self.sources)

    def files(self) -> Iterator[FileRecord]:
        """Every file that the manifest vouches for."""
        yield self.tokenizer
        if self.tokenizer.report is not None:
            yield self.tokenizer.report
        for source in self.sources:
            for _, split in source.splits():
                yield from split.files()

    def to_bytes(self) -> bytes:
        """The canonical bytes of MANIFEST.json."""
        content = self.model_dump(mode="json")
        content["seal"] = digest_hex(_canonical(content))
        return _canonical(content)

    def write(self, folder: Path) -> Manifest:
        """Writes MANIFEST.json into `folder`: aside, fsync, rename, fsync of the folder.

        Raises:
            OSError: the folder cannot be written.
        """
        aside = folder / f".{MANIFEST_FILE}.{os.getpid()}.tmp"
        try:
            with aside.open("wb") as file:
                file.write(self.to_bytes())
                file.flush()
                os.fsync(file.fileno())
            aside.replace(folder / MANIFEST_FILE)
        finally:
            aside.unlink(missing_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._folder = folder
        return self

    @classmethod
    def load(cls, folder: Path | str) -> Manifest:
        """Reads MANIFEST.json and checks that every file it names is there with its size.

        Raises:
            DataConfigurationError: there is no dataset, or the manifest is of another schema or damaged.
            DamagedDataError: a named file is missing or has another size.
        """
        folder = Path(folder)
        raw = _read_manifest(folder)
        manifest = parse_manifest(raw, folder / MANIFEST_FILE)
        manifest._folder, manifest._digest = folder, digest_hex(raw)
        root = folder.resolve()
        for record in manifest.files():
            check_size(root, record)
        return manifest

    def verify(self) -> int:
        """Reads every file whole and compares its digest; returns the bytes read.

        Raises:
            DamagedDataError: the first file whose size or digest differs.
        """
        total = 0
        root = self.folder.resolve()
        for record in self.files():
            check_file(root, record)
            total += record.size
        return total


def parse_manifest(raw: bytes, path: Path) -> Manifest:
    """Parses and checks the bytes of a manifest; `path` is only named in errors.

    Raises:
        DataConfigurationError: not JSON, of an unknown schema, damaged, or inconsistent.
    """
    try:
        content = json.loads(raw)
        canonical = isinstance(content, dict) and _canonical(content) == raw
    except ValueError as error:
        raise _damaged_manifest(path, f"not JSON: {error}") from error
    if not isinstance(content, dict):
        raise _damaged_manifest(path, f"a JSON {type(content).__name__}")
    version = content.get("schema_version")
    if version not in READABLE_SCHEMA_VERSIONS or isinstance(version, bool):
        raise DataConfigurationError(
            f"{path} has a schema that this version cannot read.",
            got=f"schema_version {version!r}",
            rule=f"one of {', '.join(map(str, READABLE_SCHEMA_VERSIONS))}",
            remedy="run `solomonov prepare` again with this version, or use the version that wrote it",
        )
    seal = content.pop("seal", None)
    if not canonical or seal != digest_hex(_canonical(content)):
        raise _damaged_manifest(path, f"content with digest {digest_hex(_canonical(content))}, seal {seal!r}")
    try:
        return Manifest.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "manifest"
        raise DataConfigurationError(
            f"{path} is not a valid manifest.",
            got=f"{place}: {first['msg']}",
            rule="a MANIFEST.json as `solomonov prepare` writes it, every path inside the dataset folder",
            remedy="run `solomonov prepare` again",
        ) from error


def check_size(root: Path, record: FileRecord) -> Path:
    """Checks that a file is there, inside `root` (a resolved path), with its recorded size.

    Raises:
        DataConfigurationError: the path leads out of the folder through a link.
        DamagedDataError: the file is missing or has another size.
    """
    path = root / record.file
    if not path.resolve().is_relative_to(root):
        raise DataConfigurationError(
            f"{path} leads out of the dataset folder.",
            got=f"{path.resolve()}",
            rule=f"every file of a dataset lies below {root}",
            remedy="copy the file into the folder, or run `solomonov prepare` again",
        )
    try:
        size, reason = path.stat().st_size, "not a file"
    except OSError as error:
        size, reason = -1, f"{error.strerror}"
    if size < 0 or not path.is_file():
        raise DamagedDataError(
            f"{path} is missing.",
            got=reason,
            rule=f"{record.size} bytes with digest {record.xxh3_128}, says {MANIFEST_FILE}",
            remedy="restore the file from a copy, or run `solomonov prepare` again to rebuild it",
        )
    if size != record.size:
        raise DamagedDataError(
            f"{path} has another size than when it was prepared.",
            got=f"{size} bytes",
            rule=f"{record.size} bytes with digest {record.xxh3_128}, says {MANIFEST_FILE}",
            remedy="restore the file from a copy, or run `solomonov prepare` again to rebuild it",
        )
    return path


def check_file(root: Path, record: FileRecord) -> Path:
    """Checks size and digest of a file; errors as `check_size`, and DamagedDataError for the digest."""
    path = check_size(root, record)
    try:
        found = digest_file(path)
    except OSError as error:
        found = f"none: {error.strerror}"
    if found != record.xxh3_128:
        raise DamagedDataError(
            f"{path} was changed after it was prepared.",
            got=f"digest {found}",
            rule=f"digest {record.xxh3_128}, says {MANIFEST_FILE}",
            remedy="restore the file from a copy, or run `solomonov prepare` again to rebuild it",
        )
    return path


def _read_manifest(folder: Path) -> bytes:
    path = folder / MANIFEST_FILE
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataConfigurationError(
            f"There is no prepared dataset in {folder}.",
            got=f"{path}: {error.strerror}",
            rule=f"a folder with a {MANIFEST_FILE}, which `solomonov prepare` writes last",
            remedy="run `solomonov prepare CONFIG` first, or correct data.folder",
        ) from error


def _damaged_manifest(path: Path, got: str) -> DataConfigurationError:
    return DataConfigurationError(
        f"{path} is damaged.",
        got=got,
        rule="the bytes that `solomonov prepare` wrote: its seal is the digest of the rest",
        remedy="run `solomonov prepare` again: it keeps the shards that are whole",
    )


def _canonical(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False)
    return text.encode("ascii") + b"\n"
