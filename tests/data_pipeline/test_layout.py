"""The layout against brute force: every document and every label in exactly one place, sizes within bounds."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.document import TABLE_DTYPE, hash_table
from data_pipeline.layout import (
    Selection,
    choose_block_tokens,
    choose_lanes,
    choose_window_blocks,
    cut_blocks,
    cut_documents,
    cut_shards,
    part_bytes,
    sample_cap,
    select,
)

LENGTHS = st.lists(st.integers(2, 300), min_size=1, max_size=60).map(lambda each: np.array(each, dtype=np.int64))


def table(documents: int, seed: int = 0, text_bytes: int = 100) -> np.ndarray:
    rows = np.zeros(documents, dtype=TABLE_DTYPE)
    rows["index"], rows["text_bytes"] = np.arange(documents), text_bytes
    hash_table(seed, "own", {0: "a.txt"}, rows)
    return rows


def split(rows: np.ndarray, fraction: float, max_bytes: int | None = None) -> Selection:
    selection = select(rows, fraction, max_bytes)
    both = np.concatenate([selection.train, selection.held_out])
    assert len(np.unique(both)) == len(both), "no document is in both splits"
    return selection


@pytest.mark.parametrize(
    ("documents", "fraction", "held_out"),
    [(1, 0.0, 0), (1, 0.02, 0), (2, 0.02, 1), (2, 0.5, 1), (3, 0.0, 0), (40, 0.1, 4), (700, 0.02, 14)],
)
def test_the_share_is_held_out_but_at_least_one_and_never_all(documents: int, fraction: float, held_out: int) -> None:
    selection = split(table(documents), fraction)
    assert (len(selection.train), len(selection.held_out)) == (documents - held_out, held_out)


def test_the_choice_follows_from_names_and_seed_alone() -> None:
    rows = table(100)
    first = split(rows, 0.1)
    mixed = np.random.default_rng(0).permutation(100)
    second = split(rows[mixed], 0.1)
    assert (mixed[second.train] == first.train).all()
    assert (mixed[second.held_out] == first.held_out).all()
    other = split(table(100, seed=1), 0.1)
    assert set(other.held_out.tolist()) != set(first.held_out.tolist())
    assert (first.train != np.sort(first.train)).any(), "train documents are shuffled"


def test_a_byte_limit_takes_the_front_of_the_shuffle() -> None:
    rows = table(100)
    few, all_ = split(rows, 0, 950), split(rows, 0)
    assert (few.train == all_.train[:10]).all()


@given(lengths=LENGTHS, block_tokens=st.integers(2, 120), text=st.integers(1, 10_000))
def test_parts_keep_every_label_and_every_byte_once(lengths: np.ndarray, block_tokens: int, text: int) -> None:
    entries = cut_documents(lengths, block_tokens)
    sizes = part_bytes(entries, lengths, np.full(len(lengths), text, dtype=np.int64))
    for document, length in enumerate(lengths):
        mine = np.flatnonzero(entries.document == document)
        labels = [
            position
            for entry in mine
            for position in range(entries.start[entry] + 1, entries.start[entry] + entries.tokens[entry])
        ]
        assert labels == list(range(1, length)), "labels 1..n-1, each once, in order"
        assert entries.part[mine].tolist() == list(range(len(mine)))
        assert sizes[mine].sum() == text
        assert (sizes[mine] >= 0).all()
    assert entries.tokens.max() <= block_tokens
    assert (entries.tokens >= 2).all()
    whole = lengths <= block_tokens
    assert np.isin(np.flatnonzero(whole), entries.document[entries.part == 0]).all()
    assert not np.isin(entries.document[entries.part > 0], np.flatnonzero(whole)).any()


@given(lengths=LENGTHS, block_tokens=st.integers(2, 120))
def test_blocks_are_full_but_never_above_their_size(lengths: np.ndarray, block_tokens: int) -> None:
    tokens = cut_documents(lengths, block_tokens).tokens
    offsets = cut_blocks(tokens, block_tokens)
    assert offsets[0] == 0
    assert offsets[-1] == len(tokens)
    assert (np.diff(offsets) > 0).all()
    sizes = [int(tokens[a:b].sum()) for a, b in pairwise(offsets)]
    assert max(sizes) <= block_tokens
    for size, end in zip(sizes, offsets[1:-1], strict=False):
        assert size + tokens[end] > block_tokens, "the next entry would not have fitted"


@given(lengths=LENGTHS, block_tokens=st.integers(2, 120), cut=st.integers(0, 1000))
def test_cutting_can_start_again_at_any_block(lengths: np.ndarray, block_tokens: int, cut: int) -> None:
    tokens = cut_documents(lengths, block_tokens).tokens
    offsets = cut_blocks(tokens, block_tokens)
    start = cut % (len(offsets) - 1)
    again = cut_blocks(tokens[offsets[start] :], block_tokens) + offsets[start]
    assert (again == offsets[start:]).all()


def test_blocks_shrink_with_the_corpus_down_to_one_row_and_then_it_is_too_small() -> None:
    def rows(documents: int, tokens: int, sequence_tokens: int = 16) -> int | None:
        chosen = choose_block_tokens(np.full(documents, tokens, dtype=np.int64), sequence_tokens)
        return None if chosen is None else (chosen - 1) // sequence_tokens

    assert rows(30_000, 11) == 256
    assert rows(3_000, 11) == 32
    assert rows(100, 11) == 4
    assert rows(12, 11) == 1
    assert rows(8, 11) == 1
    assert rows(7, 11) is None
    assert rows(1, 16 * 8 + 2) == 1, "a single long document is cut"


def test_lanes_have_eight_blocks_each_where_there_are_enough() -> None:
    blocks = [8, 64, 127, 128, 255, 256, 8192, 10**6]
    assert [choose_lanes(each) for each in blocks] == [8, 8, 8, 16, 16, 32, 1024, 1024]


def test_windows_shrink_where_all_lanes_together_would_not_fit_in_memory() -> None:
    block_bytes = 256 * 1024
    windows = [choose_window_blocks(lanes, block_bytes) for lanes in (8, 128, 256, 512, 1024)]
    assert windows == [4, 4, 2, 1, 1]


def test_shards_hold_whole_blocks_up_to_their_size() -> None:
    entry_bytes = np.full(40, 5_000, dtype=np.int64)
    blocks = np.arange(0, 41, 2)
    shards = cut_shards(blocks, entry_bytes, 64 << 10)
    assert shards.tolist() == [0, 4, 8, 12, 16, 20]
    assert cut_shards(blocks, entry_bytes, 1024).tolist() == list(range(21)), "one block at least"


def test_the_sample_takes_the_beginnings_of_documents_up_to_the_budget() -> None:
    small = np.full(100, 1000)
    assert sample_cap(small, 10_500) == (10, 64 << 10)
    assert sample_cap(small, 10**9)[0] == 100
    documents, cap = sample_cap(np.array([10 << 20, 1000, 10 << 20]), 1 << 20)
    assert (documents, cap) == (2, 512 << 10), "a third beginning would exceed the budget"
    assert sample_cap(np.array([500]), 10**6)[0] == 1
    assert sample_cap(small, 300) == (1, 300), "the beginning of one document at least"
