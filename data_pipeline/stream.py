"""Streams of rows: the training stream, without end, and the held-out rows, one after the other.

Any row can be asked for at any time, and depends on nothing that was asked before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.dataset import BlockCache, Dataset, PackedBlock
from data_pipeline.errors import DataConfigurationError
from data_pipeline.manifest import BOS_ID, PAD_ID, digest_hex
from data_pipeline.mixture import Mixture, Phase
from data_pipeline.order import ORDER_VERSION, Order, RowAddress, SourceOrder
from data_pipeline.packing import check_packing
from data_pipeline.rows import IGNORE_LABEL, PAD_DOCUMENT, RowBatch

DEFAULT_CACHE_BYTES = 256 << 20

Indices = Sequence[int] | NDArray[Any]


class Stream:
    """The training rows of a dataset in the order that a seed gives them.

    Args:
        dataset: an open dataset.
        sequence_tokens: positions in a row (T); prepared for this T and packing.
        packing: `concat` or `best_fit`.
        seed: seed of the order, any integer.
        weights: weight of every source by name, or phases of them; None takes the manifest's.
        cache_bytes: memory for blocks that will be needed again. Without reads from the shards again and
            again it takes window_blocks blocks for each lane that is read (all, or 1 in dp where dp divides
            the lanes).

    Raises:
        DataConfigurationError: not prepared for this row length and packing, or unusable weights.
        DamagedDataError: an array of the dataset is damaged.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        sequence_tokens: int,
        packing: str,
        seed: int,
        weights: Mapping[str, float] | Sequence[Phase] | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        manifest = dataset.manifest
        self.dataset, self.sequence_tokens, self.packing, self.seed = dataset, sequence_tokens, packing, seed
        if weights is None:
            weights = {source.name: source.weight for source in manifest.sources}
        phases = [Phase(0, weights)] if isinstance(weights, Mapping) else list(weights)
        self.source_names = manifest.source_names
        orders = [
            SourceOrder(
                name,
                dataset.rows(name, "train", sequence_tokens, packing),
                lanes=manifest.lanes,
                window_blocks=manifest.window_blocks,
                seed=seed,
            )
            for name in self.source_names
        ]
        self.order = Order(orders, _mixture(self.source_names, phases))
        self._cache = BlockCache(cache_bytes)
        self.blocks_read = 0
        """Blocks that were read from shards; one that the cache has dropped counts again."""
        self.identity = digest_hex(
            json.dumps(
                {
                    "order": ORDER_VERSION,
                    "manifest": manifest.content_digest,
                    "seed": seed,
                    "sequence_tokens": sequence_tokens,
                    "packing": packing,
                    "phases": [
                        [phase.first_row, *parts] for phase, parts in zip(phases, self.order.mixture.parts, strict=True)
                    ],
                },
                sort_keys=True,
            ).encode()
        )
        """Digest of what decides the order: the data, seed, T, packing, quantised weights."""

    def rows(self, indices: Indices) -> RowBatch:
        """Rows of the stream by number, in the order asked for; a pure function of (manifest, seed, i).

        Args:
            indices: (B,) row numbers from 0, in any order, also repeated.

        Raises:
            DamagedDataError: a block's bytes are not those that the manifest vouches for.
        """
        row_ids = _row_numbers(indices)
        source, places = self.order.locate(row_ids)
        batch = empty_batch(row_ids, self.sequence_tokens)
        # All rows of a block together: each block is looked up once.
        order = np.lexsort((places.block, source))
        bounds = np.flatnonzero((np.diff(source[order]) != 0) | (np.diff(places.block[order]) != 0)) + 1
        for members in np.split(order, bounds) if len(order) else ():
            first = members[0]
            block = self._block(int(source[first]), int(places.block[first]))
            _fill(batch, block, members.tolist(), places.row_in_block[members].tolist())
        return batch

    def locate(self, index: int) -> RowAddress:
        """Where row `index` lies in the dataset."""
        return self.order.address(index)

    def lanes_of(self, indices: Indices) -> NDArray[np.int64]:
        """Lane of each row (B,) within its source: rows of other lanes lie in other blocks."""
        source, within = self.order.mixture.locate(_row_numbers(indices))
        lanes = np.array([order.lanes for order in self.order.sources], dtype=np.int64)
        return within % lanes[source]

    def rows_before(self, index: int) -> dict[str, int]:
        """How many of the rows before `index` come from each source."""
        return dict(zip(self.source_names, self.order.mixture.counts_before(index), strict=True))

    def _block(self, source: int, block: int) -> PackedBlock:
        packed = self._cache.get((source, block))
        if packed is None:
            name = self.source_names[source]
            packed = self.dataset.packed_block(name, "train", block, self.sequence_tokens, self.packing)
            self.blocks_read += 1
            self._cache.put((source, block), packed)
        return packed


class HeldOutRows:
    """The held-out rows of all sources, in manifest order, block by block, row by row.

    Args:
        dataset: an open dataset; where no source held anything out there are 0 rows.
        sequence_tokens: positions in a row (T).
        packing: `concat` or `best_fit`.
        documents_only: rows are not asked for, so that the dataset need not be prepared for T and packing.
        cache_bytes: memory for blocks that will be needed again.

    Raises:
        DataConfigurationError: not prepared for this row length and packing.
        DamagedDataError: an array of the dataset is damaged.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        sequence_tokens: int,
        packing: str,
        documents_only: bool = False,
        cache_bytes: int = 64 << 20,
    ) -> None:
        check_packing(packing)
        self.dataset, self.sequence_tokens, self.packing = dataset, sequence_tokens, packing
        held_out = [(source.name, source.held_out) for source in dataset.manifest.sources if source.held_out]
        self._sources = [name for name, _ in held_out]
        counts = [split.block_count for _, split in held_out]
        self._source_of = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        self._block_of = np.concatenate([np.zeros(0, np.int64), *map(np.arange, counts)]).astype(np.int64)
        rows = [np.zeros(1, dtype=np.int64)]
        if not documents_only:
            rows += [dataset.rows(name, "held_out", sequence_tokens, packing) for name in self._sources]
        self._rows_before = np.cumsum(np.concatenate(rows))
        self._cache = BlockCache(cache_bytes)
        self.text_bytes = sum(split.text_bytes for _, split in held_out)
        """UTF-8 bytes of the held-out text."""
        entries = sum(int(dataset.blocks(name, "held_out")["documents"].sum(dtype=np.int64)) for name in self._sources)
        self.tokens = sum(split.tokens for _, split in held_out) - entries
        """Tokens that are predicted: labels in all rows together."""

    def __len__(self) -> int:
        return int(self._rows_before[-1])

    def rows(self, indices: Indices) -> RowBatch:
        """Rows by number, in the order asked for.

        Raises:
            ValueError: a number is not in [0, len).
            DamagedDataError: a block's bytes are not those that the manifest vouches for.
        """
        row_ids = _row_numbers(indices)
        if row_ids.size and not 0 <= int(row_ids.min()) <= int(row_ids.max()) < len(self):
            raise ValueError(f"rows {row_ids.min()}..{row_ids.max()}, there are {len(self)} held-out rows")
        batch = empty_batch(row_ids, self.sequence_tokens)
        block_of = np.searchsorted(self._rows_before, row_ids, side="right") - 1
        row_in_block = row_ids - self._rows_before[block_of]
        for block in np.unique(block_of).tolist():
            members = np.flatnonzero(block_of == block)
            _fill(batch, self._block(block), members.tolist(), row_in_block[members].tolist())
        return batch

    def documents(self) -> Iterator[NDArray[Any]]:
        """Whole stored documents (BOS, ids, EOS) in order; parts of a cut one are joined again.

        Raises:
            DamagedDataError: a block's bytes are not those that the manifest vouches for.
        """
        parts: list[NDArray[Any]] = []
        for source, block in zip(self._source_of.tolist(), self._block_of.tolist(), strict=True):
            content = self.dataset.read_block(self._sources[source], "held_out", block)
            for entry in np.split(content.tokens, np.cumsum(content.lengths, dtype=np.int64)[:-1]):
                if entry[0] == BOS_ID or not parts:
                    if parts:
                        yield np.concatenate(parts)
                    parts = [entry]
                else:
                    # A later part begins with the token that ended the one before.
                    parts.append(entry[1:])
        if parts:
            yield np.concatenate(parts)

    def _block(self, number: int) -> PackedBlock:
        packed = self._cache.get(number)
        if packed is None:
            packed = self.dataset.packed_block(
                self._sources[int(self._source_of[number])],
                "held_out",
                int(self._block_of[number]),
                self.sequence_tokens,
                self.packing,
            )
            self._cache.put(number, packed)
        return packed


def _mixture(names: Sequence[str], phases: Sequence[Phase]) -> Mixture:
    for phase in phases:
        if set(phase.weights) != set(names):
            raise DataConfigurationError(
                "The weights do not name the sources of the dataset.",
                got=f"weights for {', '.join(sorted(phase.weights)) or 'nothing'}",
                rule=f"a weight for each of {', '.join(names)}",
                remedy="correct data.sources, or run `solomonov prepare` with it",
            )
    try:
        return Mixture(names, phases)
    except ValueError as error:
        raise DataConfigurationError(
            "The mixture of sources cannot be made.",
            got=f"{error}",
            rule="finite weights of at least 0, one above 0; phases that begin at row 0 and rise",
            remedy="correct the weights in data.sources",
        ) from error


def _row_numbers(indices: Indices) -> NDArray[np.int64]:
    numbers = np.asarray(indices, dtype=np.int64 if len(indices) == 0 else None)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        raise ValueError(f"row numbers are a list of integers, got {numbers.dtype} of shape {numbers.shape}")
    return numbers.astype(np.int64)


def empty_batch(row_ids: NDArray[np.int64], length: int) -> RowBatch:
    """Rows (B,) of `length` positions of padding, to be filled."""
    shape = (len(row_ids), length)
    return RowBatch(
        row_ids,
        np.full(shape, PAD_ID, dtype=np.int32),
        np.full(shape, IGNORE_LABEL, dtype=np.int32),
        np.full(shape, PAD_DOCUMENT, dtype=np.int32),
    )


def _fill(batch: RowBatch, packed: PackedBlock, members: list[int], rows: list[int]) -> None:
    """Writes rows of one block into the batch: row `rows[k]` of the block becomes row `members[k]`."""
    tokens, offsets = packed.block.tokens, packed.pack.row_offsets
    for member, row in zip(members, rows, strict=True):
        input_ids, labels = batch.input_ids[member], batch.labels[member]
        document_ids = batch.document_ids[member]
        pieces = packed.pieces[offsets[row] : offsets[row + 1]].tolist()
        at = 0
        for number, (first, positions) in enumerate(pieces):
            end = at + positions
            input_ids[at:end] = tokens[first : first + positions]
            labels[at:end] = tokens[first + 1 : first + positions + 1]
            document_ids[at:end] = number
            at = end
