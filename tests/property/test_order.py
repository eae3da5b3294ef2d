"""The order for any rows per block, lanes, windows and seeds, against the slow list-based one."""

from __future__ import annotations

from itertools import islice

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order import SourceOrder
from data_pipeline.permutation import Permutation
from tests.support.naive_order import naive_permutation, naive_source


@given(st.binary(max_size=20), st.integers(1, 400))
def test_the_permutation_is_the_naive_bijection(key: bytes, n: int) -> None:
    table = Permutation(key, n).table().tolist()
    assert table == naive_permutation(key, n)
    assert sorted(table) == list(range(n))


@settings(max_examples=60)
@given(
    rows=st.lists(st.integers(1, 6), min_size=8, max_size=40),
    lanes=st.sampled_from([1, 2, 4, 8]),
    window_blocks=st.integers(1, 6),
    seed=st.integers(0, 2**63 - 1),
    data=st.data(),
)
def test_any_rows_in_any_order_are_those_of_the_naive_walk(
    rows: list[int], lanes: int, window_blocks: int, seed: int, data: st.DataObject
) -> None:
    count = 3 * sum(rows)
    naive = list(islice(naive_source("s", rows, lanes=lanes, window_blocks=window_blocks, seed=seed), count))
    order = SourceOrder("s", np.array(rows), lanes=lanes, window_blocks=window_blocks, seed=seed)
    asked = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=50)))
    places = order.locate(asked)
    columns = (places.lane, places.epoch, places.block, places.row_in_block)
    assert list(zip(*(c.tolist() for c in columns), strict=True)) == [naive[row] for row in asked.tolist()]


@settings(max_examples=60)
@given(
    rows=st.lists(st.integers(0, 6), min_size=4, max_size=30),
    lanes=st.sampled_from([1, 2, 4]),
    window_blocks=st.integers(1, 5),
    seed=st.integers(0, 1000),
    epoch=st.integers(0, 10**6),
)
def test_every_row_of_every_epoch_of_a_lane_comes_exactly_once(
    rows: list[int], lanes: int, window_blocks: int, seed: int, epoch: int
) -> None:
    n = len(rows)
    lane_blocks = [range(lane * n // lanes, (lane + 1) * n // lanes) for lane in range(lanes)]
    expected = [[(block, row) for block in blocks for row in range(rows[block])] for blocks in lane_blocks]
    if not all(expected):
        return
    order = SourceOrder("s", np.array(rows), lanes=lanes, window_blocks=window_blocks, seed=seed)
    for lane, all_rows in enumerate(expected):
        in_lane = epoch * len(all_rows) + np.arange(len(all_rows))
        places = order.locate(in_lane * lanes + lane)
        assert (places.lane == lane).all()
        assert (places.epoch == epoch).all()
        assert sorted(zip(places.block.tolist(), places.row_in_block.tolist(), strict=True)) == all_rows
