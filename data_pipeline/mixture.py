"""The mixture: which source each row of the stream comes from, and which of its rows it is.

Weights are rounded to multiples of 1/65,536. The source of row i is entry i mod 65,536 of one table, in which
at every prefix of k entries each source has its share k * weight to within less than one row. So the mixture
is right not on average but everywhere, and a seek is a look-up. A phase is a change of weights at a row: it
starts its table at its first row, and each source goes on where it was.

Source: the quota method of Balinski and Young 1975, seen as earliest-deadline-first scheduling of unit jobs.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

TABLE_ROWS = 65_536
"""Entries of a table, and parts that a weight is a whole number of."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Weights that hold from a row on."""

    first_row: int
    """Row of the stream at which the phase begins; the first phase begins at 0."""
    weights: Mapping[str, float]
    """Weight of every source, relative to each other; 0 leaves a source out."""


def quantise(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as whole parts of 65,536 that sum to it, by largest remainder; exact, ties to the earlier.

    A weight above 0 gets at least one part.

    Raises:
        ValueError: a weight is negative or not finite, all are 0, or there are over 65,536 sources.
    """
    if not all(0 <= weight < float("inf") for weight in weights):
        raise ValueError(f"weights must be finite and at least 0, got {list(weights)}")
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact)
    if total == 0 or len(weights) > TABLE_ROWS:
        raise ValueError(f"{len(weights)} weights with sum {float(total)}: need 1 to {TABLE_ROWS}, one above 0")
    shares = [weight * TABLE_ROWS / total for weight in exact]
    parts = [max(int(share), 1 if share else 0) for share in shares]
    while (missing := TABLE_ROWS - sum(parts)) != 0:
        step = 1 if missing > 0 else -1
        # Towards the sum by the entry that is furthest on the wrong side; a part of 1 is not taken away.
        open_to_change = [s for s in range(len(parts)) if shares[s] and parts[s] + step >= 1]
        best = max(open_to_change, key=lambda s: (step * (shares[s] - parts[s]), -s))
        parts[best] += step
    return tuple(parts)


@lru_cache(maxsize=16)
def quota_table(parts: tuple[int, ...]) -> NDArray[np.uint16]:
    """The (65,536,) table of source numbers for parts that sum to 65,536; read-only.

    After k entries a source with q parts has floor(kq/65,536) or ceil(kq/65,536) of them. Entry a of a source
    may not come before position floor(a * 65,536 / q), else it would be ahead of its upper bound, and not
    after position ceil((a+1) * 65,536 / q) - 1, else it would be behind its lower bound; of those that may
    come, the one with the earliest deadline does.
    """
    assert sum(parts) == TABLE_ROWS, f"parts sum to {sum(parts)}, not {TABLE_ROWS}"
    table = np.zeros(TABLE_ROWS, dtype=np.uint16)
    used = [source for source, q in enumerate(parts) if q]
    if len(used) == 1:
        table[:] = used[0]
    else:
        waiting = [(0, source, 0) for source in used]
        ready: list[tuple[int, int, int]] = []
        for position in range(TABLE_ROWS):
            while waiting and waiting[0][0] <= position:
                _, source, entry = heapq.heappop(waiting)
                deadline = -(-(entry + 1) * TABLE_ROWS // parts[source]) - 1
                heapq.heappush(ready, (deadline, source, entry))
            deadline, source, entry = heapq.heappop(ready)
            assert deadline >= position, f"source {source} is late at position {position}"
            table[position] = source
            if entry + 1 < parts[source]:
                release = (entry + 1) * TABLE_ROWS // parts[source]
                heapq.heappush(waiting, (release, source, entry + 1))
    table.setflags(write=False)
    return table


@lru_cache(maxsize=16)
def _ordinals(parts: tuple[int, ...]) -> NDArray[np.int32]:
    """(65,536,): how many earlier entries of the table name the same source."""
    table = quota_table(parts)
    order = np.argsort(table, kind="stable")
    ordinals = np.empty(TABLE_ROWS, dtype=np.int32)
    first = np.concatenate([np.arange(q, dtype=np.int32) for q in parts])
    ordinals[order] = first
    ordinals.setflags(write=False)
    return ordinals


class Mixture:
    """Maps rows of the stream to (source, row within the source).

    Args:
        sources: names of the sources, in manifest order.
        phases: weights from a row on, in order of rows; the first begins at row 0.

    Raises:
        ValueError: phases out of order, names that differ from `sources`, or unusable weights.
    """

    def __init__(self, sources: Sequence[str], phases: Sequence[Phase]) -> None:
        self.sources = tuple(sources)
        self._first_rows = [phase.first_row for phase in phases]
        rising = all(a < b for a, b in zip(self._first_rows, self._first_rows[1:], strict=False))
        if not phases or self._first_rows[0] != 0 or not rising:
            raise ValueError(f"phases must begin at row 0 and rise, got {self._first_rows}")
        for phase in phases:
            if set(phase.weights) != set(sources):
                raise ValueError(f"weights for {sorted(phase.weights)}, sources are {sorted(sources)}")
        self.parts = tuple(quantise([phase.weights[name] for name in sources]) for phase in phases)
        # Rows of each source before each phase.
        self._before = [np.zeros(len(self.sources), dtype=np.int64)]
        for number in range(1, len(phases)):
            length = self._first_rows[number] - self._first_rows[number - 1]
            self._before.append(self._before[-1] + _counts(self.parts[number - 1], length))

    def locate(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source number and row within the source of each row (any shape)."""
        if rows.size and int(rows.min()) < 0:
            raise ValueError(f"row {rows.min()} is below 0")
        sources, within = np.empty(rows.shape, np.int64), np.empty(rows.shape, np.int64)
        phase_of = np.searchsorted(self._first_rows, rows, side="right") - 1
        for phase in np.unique(phase_of):
            here = phase_of == phase
            cycle, entry = np.divmod(rows[here] - self._first_rows[phase], TABLE_ROWS)
            parts = self.parts[phase]
            source = quota_table(parts)[entry].astype(np.int64)
            sources[here] = source
            whole = cycle * np.array(parts, dtype=np.int64)[source]
            within[here] = self._before[phase][source] + whole + _ordinals(parts)[entry]
        return sources, within

    def counts_before(self, row: int) -> tuple[int, ...]:
        """How many of the rows before `row` come from each source."""
        if row < 0:
            raise ValueError(f"row {row} is below 0")
        phase = bisect_right(self._first_rows, row) - 1
        counts = self._before[phase] + _counts(self.parts[phase], row - self._first_rows[phase])
        return tuple(int(count) for count in counts)


def _counts(parts: tuple[int, ...], rows: int) -> NDArray[np.int64]:
    cycles, rest = divmod(rows, TABLE_ROWS)
    in_rest = np.bincount(quota_table(parts)[:rest], minlength=len(parts)).astype(np.int64)
    return cycles * np.array(parts, dtype=np.int64) + in_rest
