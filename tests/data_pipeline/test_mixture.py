"""The mixture: weights in 1/65,536, shares within one row at every prefix, phases, against plain counting."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from data_pipeline.mixture import TABLE_ROWS, Mixture, Phase, quantise, quota_table


def test_weights_are_rounded_to_parts_that_sum_up() -> None:
    assert quantise([1]) == (65_536,)
    assert quantise([1, 1]) == (32_768, 32_768)
    assert quantise([3, 0, 1]) == (49_152, 0, 16_384)
    assert quantise([1, 1, 1]) == (21_846, 21_845, 21_845)
    assert quantise([0.7, 0.2, 0.1]) == (45_875, 13_107, 6_554)


def test_a_weight_above_zero_gets_at_least_one_part() -> None:
    assert quantise([1e9, 1e-9, 0.0]) == (65_535, 1, 0)
    assert quantise([1e12, *[1.0] * 10]) == (65_526, *[1] * 10)


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0], [float("nan")], [float("inf"), 1.0]])
def test_unusable_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError):
        quantise(weights)


def assert_quota(parts: tuple[int, ...]) -> None:
    """At every prefix k, every source has floor(kq/N) or ceil(kq/N) entries: exact integers."""
    table = quota_table(parts)
    k = np.arange(1, TABLE_ROWS + 1, dtype=np.int64)
    for source, q in enumerate(parts):
        count = np.cumsum(table == source, dtype=np.int64)
        assert ((count * TABLE_ROWS - k * q) < TABLE_ROWS).all(), f"{parts}: source {source} is a row ahead"
        assert ((k * q - count * TABLE_ROWS) < TABLE_ROWS).all(), f"{parts}: source {source} is a row behind"
        assert int(count[-1]) == q


@pytest.mark.parametrize("seed", range(8))
def test_shares_are_within_a_row_at_every_prefix_for_random_weights(seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert_quota(quantise(rng.lognormal(0, 2, rng.integers(2, 12)).tolist()))


@pytest.mark.parametrize("weights", [[1, 1], [1, 2, 4], [1, 0, 1], [65_535, 1], [1] * 7, [1e9, 1, 1, 1]])
def test_shares_are_within_a_row_at_every_prefix_for_awkward_weights(weights: list[float]) -> None:
    assert_quota(quantise(weights))


def test_the_table_of_weights_is_fixed_for_good() -> None:
    assert quota_table(quantise([2, 1]))[:9].tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 1]


def test_rows_within_a_source_count_up_without_a_hole() -> None:
    mixture = Mixture(["a", "b", "c"], [Phase(0, {"a": 5.0, "b": 2.0, "c": 0.1})])
    rows = np.arange(3 * TABLE_ROWS - 100, 3 * TABLE_ROWS + 100)
    before = mixture.counts_before(int(rows[0]))
    source, within = mixture.locate(rows)
    for number in range(3):
        mine = within[source == number]
        assert mine.tolist() == list(range(before[number], before[number] + len(mine)))


def test_phases_go_on_where_sources_were_and_start_a_new_table() -> None:
    phases = [
        Phase(0, {"a": 1.0, "b": 1.0}),
        Phase(1001, {"a": 0.0, "b": 1.0}),
        Phase(1500, {"a": 3.0, "b": 1.0}),
    ]
    mixture = Mixture(["a", "b"], phases)
    source, within = mixture.locate(np.arange(70_000))
    for number in range(2):
        mine = within[source == number]
        assert mine.tolist() == list(range(len(mine))), "no row of a source is skipped or repeated"
    assert (source[1001:1500] == 1).all()
    table = quota_table(quantise([3.0, 1.0]))
    assert source[1500:].tolist() == np.resize(table, 70_000 - 1500).tolist()
    for row in (0, 1, 1000, 1001, 1002, 1500, 1501, 69_999):
        assert mixture.counts_before(row) == ((source[:row] == 0).sum(), (source[:row] == 1).sum())


def test_counts_before_a_far_row_are_exact() -> None:
    mixture = Mixture(["a", "b"], [Phase(0, {"a": 2.0, "b": 1.0})])
    row = 10**15 + 7
    counts = mixture.counts_before(row)
    assert sum(counts) == row
    assert abs(counts[0] - Fraction(row * mixture.parts[0][0], TABLE_ROWS)) < 1
    source, within = mixture.locate(np.array([row]))
    assert within[0] == counts[source[0]]


@pytest.mark.parametrize(
    "phases",
    [
        [],
        [Phase(1, {"a": 1.0})],
        [Phase(0, {"a": 1.0}), Phase(0, {"a": 1.0})],
        [Phase(0, {"b": 1.0})],
    ],
)
def test_unusable_phases_are_refused(phases: list[Phase]) -> None:
    with pytest.raises(ValueError):
        Mixture(["a"], phases)


def test_rows_below_zero_are_refused() -> None:
    mixture = Mixture(["a"], [Phase(0, {"a": 1.0})])
    with pytest.raises(ValueError, match="below 0"):
        mixture.locate(np.array([-1]))
    with pytest.raises(ValueError, match="below 0"):
        mixture.counts_before(-1)
