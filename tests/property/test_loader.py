"""The loader for any world, batch, micro-batch, prefetch and start: the ranks share out the same rows."""

from __future__ import annotations

from itertools import islice

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_pipeline.batches import BatchRows
from data_pipeline.loader import Loader
from data_pipeline.rows import RowBatch


class Numbers:
    """A stream whose rows hold their own numbers."""

    def rows(self, indices: NDArray[np.int64], /) -> RowBatch:
        ids = indices[:, None].astype(np.int32)
        return RowBatch(indices, ids, ids, ids)


def steps(
    world: int, first: int, count: int, batch: BatchRows, micro: int, prefetch: int
) -> list[list[list[list[int]]]]:
    """[step][rank][micro-batch] -> row numbers."""
    per_rank = []
    for rank in range(world):
        with Loader(
            Numbers(),
            batches=batch,
            dp_rank=rank,
            dp_size=world,
            micro_batch_rows=micro,
            first_step=first,
            prefetch_steps=prefetch,
        ) as loader:
            per_rank.append([[part.row_ids.tolist() for part in step] for step in islice(loader, count)])
    return [[rank[step] for rank in per_rank] for step in range(count)]


worlds, micros, prefetches = st.integers(1, 9), st.integers(1, 12), st.integers(0, 4)
batches = st.integers(1, 40).flatmap(
    lambda full: st.builds(BatchRows, st.just(full), st.integers(1, full), st.sampled_from([0, 1, 30, 200]))
)
"""Of one size, or growing over the first steps."""


@settings(max_examples=60)
@given(worlds, st.one_of(st.integers(0, 9), st.integers(0, 10**9)), batches, micros, prefetches)
def test_the_ranks_partition_each_batch(world: int, first: int, batch: BatchRows, micro: int, prefetch: int) -> None:
    for number, step in enumerate(steps(world, first, 3, batch, micro, prefetch)):
        rows = sorted(row for rank in step for part in rank for row in part)
        assert rows == list(batch.rows(first + number))
        for rank, parts in enumerate(step):
            mine = [row for part in parts for row in part]
            assert mine == sorted(mine)
            assert all(row % world == rank for row in mine)
            assert all(len(part) == micro for part in parts[:-1])
            assert all(1 <= len(part) <= micro for part in parts)


@settings(max_examples=40)
@given(worlds, worlds, st.integers(0, 5), st.integers(1, 4), batches, micros, prefetches)
def test_stopping_and_going_on_with_another_world_gives_the_same_rest(
    before: int, after: int, stopped: int, more: int, batch: BatchRows, micro: int, prefetch: int
) -> None:
    whole = steps(1, 0, stopped + more, batch, batch.full, 0)
    first = steps(before, 0, stopped, batch, micro, prefetch)
    rest = steps(after, stopped, more, batch, micro, prefetch)
    assert [sorted(row for rank in step for part in rank for row in part) for step in first + rest] == [
        row for [[row]] in whole
    ]
