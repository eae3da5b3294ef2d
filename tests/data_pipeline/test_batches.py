"""Batches by hand, and for any numbers against their definition, step by step."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.batches import BatchRows


def test_by_hand() -> None:
    """From 2 to 8 rows over 12: 2 + n/2, so 4 from row 4 on, 6 from row 8 on, 8 from row 12 on."""
    batches = BatchRows(8, 2, 12)
    begins = [0, 2, 4, 8, 14, 22, 30]
    assert [batches.rows(step) for step in range(6)] == [range(*ends) for ends in pairwise(begins)]
    assert batches.warmup_steps == 4
    assert [batches.steps(rows) for rows in (0, 1, 2, 3, 4, 5, 8, 9, 14, 15, 22, 23)] == [
        0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6,
    ]  # fmt: skip


def test_without_a_warm_up_all_are_equal() -> None:
    batches = BatchRows(5)
    assert [batches.rows(step) for step in (0, 1, 10**9)] == [
        range(0, 5),
        range(5, 10),
        range(5 * 10**9, 5 * 10**9 + 5),
    ]
    assert batches.warmup_steps == 0
    assert [batches.steps(rows) for rows in (0, 1, 5, 6)] == [0, 1, 1, 2]


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 3000), st.integers(0, 10**12))
def test_they_tile_the_rows_and_grow_to_the_full_size(one: int, other: int, over: int, far: int) -> None:
    full, first = max(one, other), min(one, other)
    batches = BatchRows(full, first, over)
    row = 0
    for step in range(200):
        if row >= over or full == first:
            size = full
        else:
            allowed = range(first, full, first)
            size = max(rows for rows in allowed if (rows - first) * over <= (full - first) * row)
        assert batches.rows(step) == range(row, row + size)
        assert batches.before(step) == row
        assert (size == full) == (step >= batches.warmup_steps) or first == full
        assert batches.steps(row) == step
        assert batches.steps(row + 1) == batches.steps(row + size) == step + 1
        row += size
    assert len(batches.rows(batches.warmup_steps + far)) == full
    assert batches.before(far + 1) == batches.before(far) + len(batches.rows(far))


@pytest.mark.parametrize(
    "wrong", [{"full": 0}, {"full": 4, "first": 5}, {"full": 4, "over": 3}, {"full": 4, "first": 2, "over": -1}]
)
def test_numbers_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least 1 row"):
        BatchRows(**wrong)
