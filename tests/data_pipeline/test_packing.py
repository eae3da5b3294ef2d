"""Packing against rows written out by hand, a naive best-fit-decreasing, and the padding goal."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.packing import pack_arrays, pack_block, rows_per_block


def naive_best_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """Number of rows of the textbook algorithm, with a scan over all bins."""
    full = sum((length - 1) // capacity for length in lengths)
    rests = sorted(((length - 1) % capacity for length in lengths), reverse=True)
    free: list[int] = []
    for rest in rests:
        if rest == 0:
            continue
        fitting = [room for room in free if room >= rest]
        if fitting:
            free.remove(min(fitting))
            free.append(min(fitting) - rest)
        else:
            free.append(capacity - rest)
    return full + len(free)


def test_concat_is_cut_every_t_positions() -> None:
    # Positions 4, 3 and 5: 12 in all, cut every 5.
    assert pack_block([5, 4, 6], 5, "concat") == [
        [(0, 0, 4), (1, 0, 1)],
        [(1, 1, 2), (2, 0, 3)],
        [(2, 3, 2)],
    ]


def test_concat_that_fills_its_rows_has_no_padding() -> None:
    assert pack_block([5, 5], 4, "concat") == [[(0, 0, 4)], [(1, 0, 4)]]


def test_best_fit_takes_the_fullest_row_that_holds_a_document() -> None:
    # Positions 6, 7, 3, 2 into rows of 10: 7, 6 open rows with 3 and 4 free; 3 fills the first; 2 the second.
    assert pack_block([7, 8, 4, 3], 10, "best_fit") == [[(1, 0, 7), (2, 0, 3)], [(0, 0, 6), (3, 0, 2)]]


def test_best_fit_gives_ties_to_the_earlier_document_and_row() -> None:
    assert pack_block([4, 4, 2, 2], 4, "best_fit") == [[(0, 0, 3), (2, 0, 1)], [(1, 0, 3), (3, 0, 1)]]


def test_best_fit_cuts_a_long_document_into_full_rows_and_a_rest() -> None:
    assert pack_block([12, 3], 4, "best_fit") == [
        [(0, 0, 4)],
        [(0, 4, 4)],
        [(0, 8, 3)],
        [(1, 0, 2)],
    ]


def test_best_fit_dissolves_a_row_of_rests_into_the_room_of_others() -> None:
    # Rests of 60, 55 and 50 positions of 100: best fit alone opens three rows with 135 positions free.
    rows = pack_block([161, 156, 151], 100, "best_fit")
    assert rows[3:] == [[(0, 100, 60), (2, 145, 5)], [(1, 100, 55), (2, 100, 45)]]


def test_best_fit_never_cuts_a_document_that_fits_a_row() -> None:
    # The same positions in short documents stay whole, whatever room is left.
    assert pack_block([61, 56, 51], 100, "best_fit") == [[(0, 0, 60)], [(1, 0, 55)], [(2, 0, 50)]]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_documents_without_positions_and_empty_blocks(packing: str) -> None:
    assert pack_block([], 8, packing) == []
    assert pack_block([1, 0, 1], 8, packing) == []
    assert pack_block([1, 3, 1, 3, 1], 8, packing) == [[(1, 0, 2), (3, 0, 2)]]
    assert rows_per_block([], 8, packing) == 0


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_one_position_a_row(packing: str) -> None:
    assert pack_block([3, 2], 1, packing) == [[(0, 0, 1)], [(0, 1, 1)], [(1, 0, 1)]]


@pytest.mark.parametrize("arguments", [((5,), 0, "concat"), ((5,), 4, "first_fit")])
def test_mistakes_of_the_caller(arguments: tuple[tuple[int, ...], int, str]) -> None:
    with pytest.raises(ValueError):
        rows_per_block(*arguments)
    with pytest.raises(ValueError):
        pack_arrays(*arguments)


@pytest.mark.parametrize(("sequence_tokens", "median"), [(512, 90), (512, 250), (512, 400), (512, 3000), (2048, 600)])
def test_padding_is_at_most_half_a_percent_from_256_rows_a_block(sequence_tokens: int, median: int) -> None:
    rng = np.random.default_rng(median)
    used = rows = cut_at_end = 0
    for _ in range(12):
        lengths: list[int] = []
        while sum(lengths) < 256 * sequence_tokens:
            lengths.append(int(np.clip(rng.lognormal(np.log(median), 1.0), 3, 256 * sequence_tokens)))
        positions = sum(length - 1 for length in lengths)
        used += positions
        rows += rows_per_block(lengths, sequence_tokens, "best_fit")
        cut_at_end += rows_per_block(lengths, sequence_tokens, "concat")
        assert rows_per_block(lengths, sequence_tokens, "best_fit") <= naive_best_fit_decreasing(
            lengths, sequence_tokens
        )
    assert 1 - used / (rows * sequence_tokens) <= 0.005
    assert cut_at_end <= rows, "no packing needs fewer rows than cutting everything"
