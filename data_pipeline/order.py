"""The order of rows: row i of the stream -> (source, lane, epoch, block, row in block), a pure function.

    row i --mixture--> source, row j of the source
    lane  = j mod lanes, row m = j // lanes of the lane
    epoch = m // rows of the lane, row r = m mod rows of the lane

A lane owns a contiguous range of its source's blocks. In each epoch a keyed permutation orders the lane's
blocks; consecutive blocks of that order form windows of `window_blocks`, and a keyed permutation orders the
rows of each window. Every row of a lane comes exactly once an epoch; a lane that ends early goes on with its
next epoch, whatever the others do. Prefix sums over rows per block find the block; they are kept per (lane,
epoch), and the permuted rows per window, so that a sequential reader pays for each once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.mixture import Mixture
from data_pipeline.permutation import Permutation

ORDER_VERSION = 1
"""Changes whenever the same (manifest, seed, i) would name another row."""

Integers = NDArray[np.int64]

_KEPT_EPOCHS = 4096
_KEPT_WINDOWS = 4096


class RowAddress(NamedTuple):
    """Where a row of the stream lies in the dataset."""

    source: str
    lane: int
    epoch: int
    """Which pass of the lane over its blocks, from 0."""
    block: int
    """Block of the source's training split."""
    row_in_block: int


@dataclass(frozen=True, slots=True)
class Places:
    """Where rows of one source lie, one entry a row."""

    lane: Integers
    epoch: Integers
    block: Integers
    row_in_block: Integers


@dataclass(frozen=True, slots=True)
class _Epoch:
    """One lane's epoch: its blocks in the order of the epoch, and the rows before each."""

    blocks: Integers
    """(n,) block numbers of the source."""
    rows_before: Integers
    """(n + 1,) rows of the epoch before each of them, and all."""


class SourceOrder:
    """The order of one source's rows.

    Args:
        name: the source's name; part of the keys.
        rows_per_block: (n,) rows of each block of the training split.
        lanes: lanes of the source; lane l owns blocks [l*n//lanes, (l+1)*n//lanes).
        window_blocks: blocks of a window.
        seed: seed of the run.

    Raises:
        ValueError: a lane has no rows.
    """

    def __init__(self, name: str, rows_per_block: NDArray[Any], *, lanes: int, window_blocks: int, seed: int) -> None:
        if lanes < 1 or window_blocks < 1:
            raise ValueError(f"lanes {lanes} and window_blocks {window_blocks} must be at least 1")
        self.name, self.lanes, self.window_blocks, self.seed = name, lanes, window_blocks, seed
        self._rows_per_block = rows_per_block
        n = len(rows_per_block)
        self._first_block = np.arange(lanes + 1, dtype=np.int64) * n // lanes
        rows_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(rows_per_block, dtype=np.int64)])
        self.lane_rows: Integers = np.diff(rows_before[self._first_block])
        """(lanes,) rows of each lane in an epoch."""
        if n < lanes or int(self.lane_rows.min()) < 1:
            raise ValueError(f"source {name!r} has a lane without rows: {n} blocks, {lanes} lanes")
        self._epoch = lru_cache(_KEPT_EPOCHS)(self._make_epoch)
        self._window = lru_cache(_KEPT_WINDOWS)(self._make_window)

    def locate(self, rows: Integers) -> Places:
        """Places of rows (B,) of this source, numbered from 0 without end."""
        lane, lane_row = rows % self.lanes, rows // self.lanes
        epoch, row = np.divmod(lane_row, self.lane_rows[lane])
        block, row_in_block = np.empty_like(rows), np.empty_like(rows)
        # One look-up a (lane, epoch): neighbours in a batch are of different lanes, so sort first.
        order = np.lexsort((epoch, lane))
        sorted_lane, sorted_epoch = lane[order], epoch[order]
        new = np.flatnonzero((np.diff(sorted_lane) != 0) | (np.diff(sorted_epoch) != 0)) + 1
        for members in np.split(order, new) if len(order) else ():
            first = members[0]
            block[members], row_in_block[members] = self._in_epoch(int(lane[first]), int(epoch[first]), row[members])
        return Places(lane, epoch, block, row_in_block)

    def _in_epoch(self, lane: int, epoch: int, rows: Integers) -> tuple[Integers, Integers]:
        rows_before = self._epoch(lane, epoch).rows_before
        window_of = np.searchsorted(rows_before[:: self.window_blocks], rows, side="right") - 1
        # A last window that ends with the epoch: rows are below its end, so no index runs over.
        block, row_in_block = np.empty_like(rows), np.empty_like(rows)
        for window in np.unique(window_of).tolist():
            here = window_of == window
            blocks, rows_in_block = self._window(lane, epoch, window)
            local = rows[here] - rows_before[window * self.window_blocks]
            block[here], row_in_block[here] = blocks[local], rows_in_block[local]
        return block, row_in_block

    def _make_epoch(self, lane: int, epoch: int) -> _Epoch:
        first, end = int(self._first_block[lane]), int(self._first_block[lane + 1])
        order = Permutation(self._key("blocks", lane, epoch), end - first).table()
        rows = np.asarray(self._rows_per_block[first:end], dtype=np.int64)[order]
        return _Epoch(first + order, np.concatenate([np.zeros(1, np.int64), np.cumsum(rows)]))

    def _make_window(self, lane: int, epoch: int, window: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(blocks, rows in block) of the window's rows in the order in which they are read."""
        in_epoch = self._epoch(lane, epoch)
        first = window * self.window_blocks
        end = min(first + self.window_blocks, len(in_epoch.blocks))
        start = int(in_epoch.rows_before[first])
        count = int(in_epoch.rows_before[end]) - start
        rows = start + Permutation(self._key("rows", lane, epoch, window), count).table()
        place = np.searchsorted(in_epoch.rows_before, rows, side="right") - 1
        return (
            in_epoch.blocks[place].astype(np.int32),
            (rows - in_epoch.rows_before[place]).astype(np.int32),
        )

    def _key(self, purpose: str, *numbers: int) -> bytes:
        words = (purpose, str(self.seed), *map(str, numbers), self.name)
        return "\0".join(words).encode()


class Order:
    """The order of all sources' rows together.

    Args:
        sources: one order a source, in the order of the mixture's sources.
        mixture: which source each row comes from.
    """

    def __init__(self, sources: Sequence[SourceOrder], mixture: Mixture) -> None:
        names = tuple(source.name for source in sources)
        assert names == mixture.sources, f"orders of {names}, mixture of {mixture.sources}"
        self.sources, self.mixture = tuple(sources), mixture

    def locate(self, rows: Integers) -> tuple[Integers, Places]:
        """Source numbers and places of rows (B,) of the stream."""
        source, within = self.mixture.locate(rows)
        lane, epoch, block, row_in_block = (np.empty_like(rows) for _ in range(4))
        for number in np.unique(source).tolist():
            here = source == number
            places = self.sources[number].locate(within[here])
            lane[here], epoch[here] = places.lane, places.epoch
            block[here], row_in_block[here] = places.block, places.row_in_block
        return source, Places(lane, epoch, block, row_in_block)

    def address(self, row: int) -> RowAddress:
        """The address of one row."""
        source, places = self.locate(np.array([row], dtype=np.int64))
        return RowAddress(
            self.sources[int(source[0])].name,
            int(places.lane[0]),
            int(places.epoch[0]),
            int(places.block[0]),
            int(places.row_in_block[0]),
        )
