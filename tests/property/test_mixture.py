"""The mixture for any weights and phases, against counting row by row."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.mixture import TABLE_ROWS, Mixture, Phase, quantise, quota_table

weights = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-6, 1e6), st.integers(1, 9).map(float)), min_size=1, max_size=6
).filter(any)


@given(weights)
def test_parts_sum_up_and_keep_what_is_above_zero(values: list[float]) -> None:
    parts = quantise(values)
    assert sum(parts) == TABLE_ROWS
    assert [part > 0 for part in parts] == [value > 0 for value in values]
    assert all(
        a >= b for (a, x) in zip(parts, values, strict=True) for (b, y) in zip(parts, values, strict=True) if x > y
    )


@settings(max_examples=15)
@given(weights)
def test_the_error_is_under_a_row_at_every_prefix(values: list[float]) -> None:
    parts = quantise(values)
    table = quota_table(parts)
    k = np.arange(1, TABLE_ROWS + 1, dtype=np.int64)
    for source, q in enumerate(parts):
        count = np.cumsum(table == source, dtype=np.int64)
        assert int(np.abs(count * TABLE_ROWS - k * q).max()) < TABLE_ROWS


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 5), st.integers(1, 5)), min_size=1, max_size=4))
def test_rows_are_found_as_counting_finds_them(lengths: list[tuple[int, int, int]]) -> None:
    phases, first = [], 0
    for length, a, b in lengths:
        phases.append(Phase(first, {"a": float(a), "b": float(b)}))
        first += length
    mixture = Mixture(["a", "b"], phases)
    source, within = mixture.locate(np.arange(first + 50))
    counts = [0, 0]
    for row, (where, number) in enumerate(zip(source.tolist(), within.tolist(), strict=True)):
        assert mixture.counts_before(row) == tuple(counts)
        assert number == counts[where]
        counts[where] += 1
