"""Packing of any block: every position in exactly one row, rows not over-full, the counts agree."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.packing import PACKINGS, pack_arrays, pack_block, rows_per_block

lengths_lists = st.lists(st.integers(0, 70), max_size=60)
sequence_lengths = st.integers(1, 40)
packings = st.sampled_from(PACKINGS)


@given(lengths_lists, sequence_lengths, packings)
def test_every_position_is_used_exactly_once(lengths: list[int], sequence_tokens: int, packing: str) -> None:
    rows = pack_block(lengths, sequence_tokens, packing)
    used = sorted((document, start + k) for row in rows for document, start, positions in row for k in range(positions))
    assert used == [(d, p) for d, length in enumerate(lengths) for p in range(max(length - 1, 0))]
    for row in rows:
        assert all(positions >= 1 for _, _, positions in row)
        assert 1 <= sum(positions for _, _, positions in row) <= sequence_tokens


@given(lengths_lists, sequence_lengths, packings)
def test_the_stored_count_and_both_forms_agree(lengths: list[int], sequence_tokens: int, packing: str) -> None:
    rows = pack_block(lengths, sequence_tokens, packing)
    pack = pack_arrays(np.array(lengths, dtype=np.uint32), sequence_tokens, packing)
    assert rows_per_block(lengths, sequence_tokens, packing) == len(rows) == pack.rows
    assert [len(row) for row in rows] == np.diff(pack.row_offsets).tolist()
    assert rows_per_block(np.array(lengths, dtype=np.uint32), sequence_tokens, packing) == len(rows)


@given(lengths_lists, sequence_lengths)
def test_best_fit_leaves_documents_of_one_row_whole(lengths: list[int], sequence_tokens: int) -> None:
    pieces = [piece for row in pack_block(lengths, sequence_tokens, "best_fit") for piece in row]
    short = [(d, 0, length - 1) for d, length in enumerate(lengths) if 1 <= length - 1 <= sequence_tokens]
    assert sorted(piece for piece in pieces if lengths[piece[0]] - 1 <= sequence_tokens) == short


@given(lengths_lists, sequence_lengths)
def test_concat_pads_the_last_row_only(lengths: list[int], sequence_tokens: int) -> None:
    rows = pack_block(lengths, sequence_tokens, "concat")
    assert all(sum(positions for _, _, positions in row) == sequence_tokens for row in rows[:-1])
    order = [piece for row in rows for piece in row]
    assert order == sorted(order)
