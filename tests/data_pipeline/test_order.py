"""The order of rows against a slow list-based one, against counting, and against itself from any start."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from data_pipeline.mixture import Mixture, Phase, quantise
from data_pipeline.order import Order, RowAddress, SourceOrder
from tests.support.naive_order import naive_mixture, naive_source

FIXED = [(1, 1), (3, 1), (4, 2), (6, 1), (9, 1), (11, 0), (13, 2), (15, 2)]
ROWS = np.random.default_rng(3).integers(1, 9, 45)


def addresses(order: SourceOrder, rows: np.ndarray) -> list[tuple[int, int, int, int]]:
    places = order.locate(rows)
    columns = (places.lane, places.epoch, places.block, places.row_in_block)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@pytest.mark.parametrize("window_blocks", [1, 2, 4, 100])
@pytest.mark.parametrize("lanes", [1, 4, 8])
def test_it_is_the_naive_order(lanes: int, window_blocks: int) -> None:
    order = SourceOrder("own", ROWS, lanes=lanes, window_blocks=window_blocks, seed=11)
    naive = naive_source("own", ROWS.tolist(), lanes=lanes, window_blocks=window_blocks, seed=11)
    assert addresses(order, np.arange(700)) == list(islice(naive, 700)), "700 rows are three epochs and more"


def test_several_sources_are_the_naive_orders_mixed() -> None:
    parts = quantise([0.6, 0.1, 0.3])
    rows = {"a": ROWS, "b": ROWS[:9], "c": ROWS[5:30]}
    sources = [SourceOrder(name, each, lanes=8, window_blocks=2, seed=5) for name, each in rows.items()]
    order = Order(sources, Mixture(list(rows), [Phase(0, {"a": 0.6, "b": 0.1, "c": 0.3})]))
    naive = [naive_source(name, each.tolist(), lanes=8, window_blocks=2, seed=5) for name, each in rows.items()]
    for row, source in enumerate(naive_mixture(parts, 600)):
        assert order.address(row) == RowAddress(list(rows)[source], *next(naive[source]))


def test_each_row_of_an_epoch_of_a_lane_comes_exactly_once() -> None:
    order = SourceOrder("own", ROWS, lanes=8, window_blocks=4, seed=1)
    found = Counter(addresses(order, np.arange(8 * 3 * int(order.lane_rows.max()))))
    assert set(found.values()) == {1}
    for lane in range(8):
        for epoch in range(3):
            blocks = range(lane * 45 // 8, (lane + 1) * 45 // 8)
            assert {(block, row) for here, when, block, row in found if (here, when) == (lane, epoch)} == {
                (block, row) for block in blocks for row in range(ROWS[block])
            }


def test_a_lane_that_ends_early_goes_on_with_its_next_epoch() -> None:
    order = SourceOrder("own", np.array([1, 5]), lanes=2, window_blocks=1, seed=0)
    assert [(lane, epoch) for lane, epoch, _, _ in addresses(order, np.arange(12))] == [
        pair for m in range(6) for pair in ((0, m), (1, m // 5))
    ]


def test_rows_stay_within_their_window_of_blocks() -> None:
    order = SourceOrder("own", np.full(64, 10), lanes=8, window_blocks=4, seed=9)
    lane = [place for place in addresses(order, np.arange(640)) if place[0] == 3]
    for window in (lane[:40], lane[40:80]):
        assert len({block for _, _, block, _ in window}) == 4
        assert [place[2:] for place in window] != sorted(place[2:] for place in window)


def test_seeds_sources_lanes_and_epochs_give_other_orders() -> None:
    def first(name: str, seed: int, lane: int, epoch: int) -> list[tuple[int, int]]:
        order = SourceOrder(name, np.full(64, 4), lanes=8, window_blocks=4, seed=seed)
        rows = (epoch * 32 + np.arange(32)) * 8 + lane
        return [(block - lane * 8, row) for _, _, block, row in addresses(order, rows)]

    base = first("own", 1, 0, 0)
    others = [first("own", 2, 0, 0), first("two", 1, 0, 0), first("own", 1, 1, 0), first("own", 1, 0, 1)]
    assert base == first("own", 1, 0, 0)
    assert all(sorted(other) == sorted(base) and other != base for other in others)


def test_a_far_row_is_found_without_walking_there() -> None:
    order = SourceOrder("own", ROWS, lanes=8, window_blocks=4, seed=1)
    far = 8 * int(order.lane_rows[0]) * 10**12
    lane, epoch, block, row = addresses(order, np.array([far]))[0]
    assert (lane, epoch) == (0, 10**12)
    assert 0 <= block < 45 // 8
    assert 0 <= row < ROWS[block]


def test_blocks_without_rows_are_stepped_over() -> None:
    rows = np.array([0, 3, 0, 0, 2, 0, 0, 1])
    order = SourceOrder("own", rows, lanes=2, window_blocks=2, seed=4)
    naive = naive_source("own", rows.tolist(), lanes=2, window_blocks=2, seed=4)
    assert addresses(order, np.arange(30)) == list(islice(naive, 30))


@pytest.mark.parametrize("rows", [[], [3, 3, 3], [1, 0, 0, 1]])
def test_a_lane_without_rows_is_refused(rows: list[int]) -> None:
    with pytest.raises(ValueError, match="lane without rows"):
        SourceOrder("own", np.array(rows, dtype=np.int64), lanes=4, window_blocks=1, seed=0)


@pytest.mark.parametrize(("lanes", "window_blocks"), [(0, 1), (1, 0)])
def test_lanes_and_windows_have_a_size(lanes: int, window_blocks: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        SourceOrder("own", ROWS, lanes=lanes, window_blocks=window_blocks, seed=0)


def test_the_order_is_fixed_for_good() -> None:
    # To change these numbers is to change the order of every run: raise ORDER_VERSION with them.
    order = SourceOrder("own", np.full(16, 3), lanes=8, window_blocks=2, seed=7)
    assert [place[2:] for place in addresses(order, np.arange(40, 48))] == FIXED
