"""A prepared dataset, open for reading: block arrays in memory maps, shards by descriptor, every byte checked.

Nothing is used before its digest was compared: the block and row arrays when they are opened, the two members
of a block each time it is read from its shard. Files are opened when first needed.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DamagedDataError, DataConfigurationError
from data_pipeline.manifest import (
    BLOCK_DTYPE,
    MANIFEST_FILE,
    FileRecord,
    Manifest,
    SplitManifest,
    check_file,
    digest_hex,
    pair_hex,
)
from data_pipeline.order import RowAddress
from data_pipeline.packing import Pack, pack_arrays
from data_pipeline.shards import LENGTH_DTYPE, read_index

_OPEN_SHARDS: Final = 128


@dataclass(frozen=True, slots=True)
class Block:
    """One verified block."""

    tokens: NDArray[Any]
    """(tokens,) uint16 or uint32, read-only: the stored documents one after the other."""
    lengths: NDArray[np.uint32]
    """(documents,): tokens of each."""


@dataclass(frozen=True, slots=True)
class PackedBlock:
    """One verified block with its rows for one (sequence_tokens, packing)."""

    block: Block
    pack: Pack
    pieces: NDArray[np.int64]
    """(P, 2): first token within the block, and positions, of each piece."""

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return self.block.tokens.nbytes + self.block.lengths.nbytes + self.pack.nbytes + self.pieces.nbytes


class Dataset:
    """The manifest of a dataset folder and its open files; usable from several threads.

    Use `Dataset.open(folder)`, as a context manager or with `close()`.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._root = manifest.folder.resolve()
        self._splits = {(s.name, name): split for s in manifest.sources for name, split in s.splits()}
        self._lock = Lock()
        self._arrays: dict[str, NDArray[Any]] = {}
        self._shards: OrderedDict[str, _Descriptor] = OrderedDict()
        self._token_dtype = np.dtype("<u2" if manifest.token_dtype == "uint16" else "<u4")
        self._closed = False

    @classmethod
    def open(cls, folder: Path | str) -> Dataset:
        """Loads the manifest of a folder (presence and size of every file are checked).

        Raises:
            DataConfigurationError: there is no dataset, or its manifest cannot be used.
            DamagedDataError: a file is missing or has another size.
        """
        return cls(Manifest.load(folder))

    def close(self) -> None:
        """Forgets open files; reading afterwards is a mistake of the caller."""
        with self._lock:
            self._closed = True
            self._arrays.clear()
            self._shards.clear()

    def __enter__(self) -> Dataset:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def split(self, source: str, split: str) -> SplitManifest:
        """The manifest's entry of a split (`train` or `held_out`) of a source.

        Raises:
            DataConfigurationError: there is no such source, or it has no such split.
        """
        found = self._splits.get((source, split))
        if found is None:
            raise DataConfigurationError(
                f"The dataset in {self.manifest.folder} has no {split} split of source {source!r}.",
                got=f"source {source!r}, split {split!r}",
                rule=f"one of {', '.join('/'.join(key) for key in self._splits)}",
                remedy="correct data.sources, or run `solomonov prepare` again",
            )
        return found

    def blocks(self, source: str, split: str) -> NDArray[Any]:
        """The (blocks,) array of BLOCK_DTYPE of a split, memory-mapped, its digest checked once."""
        entry = self.split(source, split)
        return self._array(entry.blocks, BLOCK_DTYPE, entry.block_count)

    def rows(self, source: str, split: str, sequence_tokens: int, packing: str) -> NDArray[np.int64]:
        """The (blocks,) array of rows per block, memory-mapped, its digest checked once.

        Raises:
            DataConfigurationError: prepare made none for this row length and packing.
        """
        entry = self.split(source, split)
        record = entry.rows_record(sequence_tokens, packing)
        if record is None:
            have = ", ".join(f"T={row.sequence_tokens} {row.packing}" for row in entry.rows)
            raise DataConfigurationError(
                f"The dataset in {self.manifest.folder} was not prepared for this row length and packing.",
                got=f"sequence_tokens {sequence_tokens}, packing {packing!r}; source {source!r}, {split}",
                rule=f"prepared are: {have or 'none'}",
                remedy="run `solomonov prepare` with this configuration: it adds what is missing",
            )
        return self._array(record, np.dtype("<i8"), entry.block_count)

    def read_block(self, source: str, split: str, block: int) -> Block:
        """Reads one block from its shard and checks both members.

        Raises:
            DamagedDataError: the shard is missing or short, or a digest differs.
            ValueError: there is no such block.
        """
        record = self._record(source, split, block)
        shard = self.split(source, split).shards[int(record["shard"])]
        key = f"{self._number_in_shard(source, split, block):06d}"
        parts = {}
        for what in ("lengths", "tokens"):
            high, low = record[f"digest_{what}"].tolist()
            parts[what] = self._member(
                shard,
                f"{key}.{what}.bin",
                int(record[f"{what}_offset"]),
                int(record[f"{what}_size"]),
                pair_hex((high, low)),
            )
        lengths = np.frombuffer(parts["lengths"], dtype=LENGTH_DTYPE)
        tokens = np.frombuffer(parts["tokens"], dtype=self._token_dtype)
        counts = (len(lengths), int(lengths.sum(dtype=np.int64)), len(tokens))
        if counts != (int(record["documents"]), int(record["tokens"]), int(record["tokens"])):
            raise _damaged(
                self._root / shard.file,
                key,
                got=f"{counts[0]} documents of {counts[1]} tokens in lengths.bin, {counts[2]} in tokens.bin",
                rule=f"{record['documents']} documents of {record['tokens']} tokens, says the block array",
            )
        return Block(tokens, lengths)

    def packed_block(self, source: str, split: str, block: int, sequence_tokens: int, packing: str) -> PackedBlock:
        """`read_block` and its rows; checks that there are as many as `prepare` counted."""
        counted = int(self.rows(source, split, sequence_tokens, packing)[block])
        content = self.read_block(source, split, block)
        pack = pack_arrays(content.lengths, sequence_tokens, packing)
        if pack.rows != counted:
            record = self.split(source, split).rows_record(sequence_tokens, packing)
            assert record is not None, "rows() found it"
            raise DamagedDataError(
                f"Block {block} of {source}/{split} gives another number of rows than was prepared.",
                got=f"{pack.rows} rows",
                rule=f"{counted} rows, says {record.file}",
                remedy="run `solomonov prepare` again with this version",
            )
        first_token = np.cumsum(content.lengths, dtype=np.int64) - content.lengths
        pieces = np.stack([first_token[pack.document] + pack.start, pack.positions], axis=1)
        return PackedBlock(content, pack, pieces)

    def documents_of(
        self, address: RowAddress, packing: str, sequence_tokens: int, *, split: str = "train"
    ) -> list[dict[str, Any]]:
        """Where the pieces of a row come from, in the order of the row.

        Each is the stored provenance (`source`, `path`, `index`, and `part` where a document was cut at
        preparation) with `first_position` within the stored document (or part) and `positions` in this row.

        Raises:
            DamagedDataError: the block, the shard's index or the provenance member is damaged.
        """
        source, block = address.source, address.block
        pack = self.packed_block(source, split, block, sequence_tokens, packing).pack
        if not 0 <= address.row_in_block < pack.rows:
            raise ValueError(f"block {block} has {pack.rows} rows, asked for row {address.row_in_block}")
        provenance = self._provenance(source, split, block)
        first, end = pack.row_offsets[address.row_in_block : address.row_in_block + 2].tolist()
        return [
            {**provenance[document], "first_position": start, "positions": positions}
            for document, start, positions in zip(
                pack.document[first:end].tolist(),
                pack.start[first:end].tolist(),
                pack.positions[first:end].tolist(),
                strict=True,
            )
        ]

    def _provenance(self, source: str, split: str, block: int) -> list[dict[str, Any]]:
        shard = self.split(source, split).shards[int(self._record(source, split, block)["shard"])]
        name = f"{self._number_in_shard(source, split, block):06d}.documents.json"
        index = read_index(check_file(self._root, shard.index))
        member = next(member for member in index["members"] if member["name"] == name)
        raw = self._member(shard, name, member["offset"], member["size"], member["xxh3_128"])
        documents: list[dict[str, Any]] = json.loads(raw)
        return documents

    def _record(self, source: str, split: str, block: int) -> Any:
        blocks = self.blocks(source, split)
        if not 0 <= block < len(blocks):
            raise ValueError(f"{source}/{split} has {len(blocks)} blocks, asked for block {block}")
        return blocks[block]

    def _number_in_shard(self, source: str, split: str, block: int) -> int:
        shards = self.blocks(source, split)["shard"]
        return block - int(np.searchsorted(shards, shards[block]))

    def _array(self, record: FileRecord, dtype: np.dtype[Any], length: int) -> NDArray[Any]:
        with self._lock:
            array = self._arrays.get(record.file)
            if array is None:
                self._check_open()
                array = self._open_array(record, dtype, length)
                self._arrays[record.file] = array
            return array

    def _open_array(self, record: FileRecord, dtype: np.dtype[Any], length: int) -> NDArray[Any]:
        path = check_file(self._root, record)
        try:
            # An empty array has no bytes to map.
            array: NDArray[Any] = np.load(path, mmap_mode="r" if length else None, allow_pickle=False)
        except ValueError as error:
            raise _damaged(path, None, got=f"{error}", rule=f"a .npy file of {dtype}") from error
        if array.dtype != dtype or array.shape != (length,):
            rule = f"{length} records of {dtype}, says {MANIFEST_FILE}"
            raise _damaged(path, None, got=f"{array.shape} records of {array.dtype}", rule=rule)
        return array

    def _member(self, shard: FileRecord, member: str, offset: int, size: int, digest: str) -> bytes:
        """Bytes of a member of a shard, checked."""
        path = self._root / shard.file
        try:
            descriptor = self._descriptor(shard.file)
            data = _pread(descriptor.number, size, offset)
        except OSError as error:
            raise _damaged(path, member, got=f"{error.strerror}", rule=f"digest {digest}") from error
        found = digest_hex(data)
        if len(data) != size or found != digest:
            short = f" ({len(data)} of {size} bytes)" if len(data) != size else ""
            raise _damaged(path, member, got=f"digest {found}{short}", rule=f"digest {digest}")
        return data

    def _descriptor(self, file: str) -> _Descriptor:
        with self._lock:
            self._check_open()
            descriptor = self._shards.pop(file, None)
            if descriptor is None:
                descriptor = _Descriptor(os.open(self._root / file, os.O_RDONLY | os.O_CLOEXEC))
                if len(self._shards) >= _OPEN_SHARDS:
                    self._shards.popitem(last=False)
            self._shards[file] = descriptor
            return descriptor

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"the dataset in {self.manifest.folder} was closed")


class BlockCache:
    """Packed blocks that were used last, at most `limit_bytes` of them (one, if it alone is larger)."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self._blocks: OrderedDict[Hashable, PackedBlock] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable) -> PackedBlock | None:
        """The block of a key, if it is here; it is then the youngest."""
        with self._lock:
            block = self._blocks.get(key)
            if block is not None:
                self._blocks.move_to_end(key)
            return block

    def put(self, key: Hashable, block: PackedBlock) -> None:
        """Adds a block and drops the oldest ones over the limit."""
        with self._lock:
            replaced = self._blocks.pop(key, None)
            self.bytes += block.nbytes - (replaced.nbytes if replaced else 0)
            self._blocks[key] = block
            while self.bytes > self.limit_bytes and len(self._blocks) > 1:
                _, dropped = self._blocks.popitem(last=False)
                self.bytes -= dropped.nbytes


class _Descriptor:
    """A file descriptor that closes when nobody holds it: a thread may read while another drops it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


def _pread(descriptor: int, size: int, offset: int) -> bytes:
    """`size` bytes at `offset`, fewer only where the file ends."""
    data = os.pread(descriptor, size, offset)
    while 0 < len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def _damaged(path: Path, member: str | None, *, got: str, rule: str) -> DamagedDataError:
    place = f"member {member} of {path}" if member else f"{path}"
    return DamagedDataError(
        f"{place} is damaged: its bytes are not those that were prepared.",
        got=got,
        rule=rule,
        remedy="restore the file from a copy, or delete it and run `solomonov prepare` again to rebuild it",
    )
