"""Windows in blocks against the same window as one T x T mask, and their memory against the length of a row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from solomonov.activations import Allocated
from solomonov.model import window as windows
from solomonov.model.attention import attend


def documents_of(runs: list[int], padding: int) -> Tensor:
    """(1, T) document ids: runs of 0, 1, ... and padding."""
    row = [document for document, tokens in enumerate(runs) for _ in range(tokens)] + [-1] * padding
    return torch.tensor([row], dtype=torch.int32)


def seen_by_definition(documents: Tensor, window: int | None) -> list[list[bool]]:
    row = documents[0].tolist()
    return [
        [row[q] == row[k] and q - k >= 0 and (window is None or q - k < window) for k in range(len(row))]
        for q in range(len(row))
    ]


runs = st.lists(st.integers(1, 9), max_size=4)


@example(runs=[], padding=7, window=3, seed=0)
@given(runs=runs, padding=st.integers(0, 9), window=st.none() | st.integers(1, 12), seed=st.integers(0, 9))
def test_what_is_seen_is_what_the_definition_says(runs: list[int], padding: int, window: int | None, seed: int) -> None:
    """Of the whole row, and of new tokens after cached ones, of which a window is left."""
    documents = documents_of(runs, padding)
    total = documents.shape[1]
    assume(total > 0)
    expected = torch.tensor(seen_by_definition(documents, window))
    for new in {total, 1 + seed % total}:
        reach = windows.keys_in_reach(total, new, window)
        found = windows.visible(documents[:, -reach:], new, window)
        block = windows.block_size(new, window)
        if block:
            found = _unrolled(found, new, reach, block)
        wanted = expected[total - new :]
        assert torch.equal(found[0], wanted[:, total - reach :])
        assert not bool(wanted[:, : total - reach].any()), "a key out of reach is seen"


def _unrolled(found: Tensor, new: int, reach: int, block: int) -> Tensor:
    """(n, C, 2 C) of one row -> (1, T, S) with the keys in reach."""
    whole = torch.zeros(1, new, reach, dtype=torch.bool)
    for query in range(new):
        number, place = divmod(query, block)
        for key in range(2 * block):
            real = number * block + key - (block - (reach - new))
            sees = bool(found[number, place, key])
            if 0 <= real < reach:
                whole[0, query, real] = sees
            else:
                assert not sees, "a query sees a key that is none"
    return whole


@settings(deadline=None, max_examples=40)
@given(
    runs=runs, padding=st.integers(0, 4), window=st.integers(1, 12), shared=st.integers(1, 3), sink=st.booleans(),
    alibi=st.booleans(),
)  # fmt: skip
def test_blocks_give_what_the_mask_gives(
    runs: list[int], padding: int, window: int, shared: int, sink: bool, alibi: bool
) -> None:
    """Outputs and gradients in fp32 within 1e-5 of those of one T x T mask."""
    documents = torch.cat((documents_of(runs, padding), documents_of(runs[::-1], padding)))
    assume(documents.shape[1] > 0)
    tokens, generator = documents.shape[1], torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, requires_grad=True)

    query, key, value, logits = (
        random(2, tokens, 2 * shared, 4),
        random(2, tokens, 2, 4),
        random(2, tokens, 2, 4),
        random(2 * shared),
    )
    slopes = torch.rand(2 * shared, generator=generator)
    found = []
    for block in (0, windows.block_size(tokens, window)):
        if block:
            seen = windows.visible(documents, tokens, window)
        else:
            seen = torch.tensor([seen_by_definition(row[None], window) for row in documents])
        mask = windows.biased(seen, slopes) if alibi else seen[:, None]
        mask = windows.with_room_for_sink(mask) if sink else mask
        mixed = attend(query, key, value, mask=mask, block=block, sink=logits if sink else None)
        inputs = [query, key, value, *([logits] if sink else [])]
        weights = torch.arange(mixed.numel()).view(mixed.shape).cos()
        found.append([mixed, *torch.autograd.grad((mixed * weights).sum(), inputs)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sink", [False, True])
def test_memory_grows_with_the_row_and_not_with_its_square(sink: bool) -> None:
    """Four times the row, four times the peak of forward and backward pass; with one mask it is nearly 16 times."""

    def peak(tokens: int, window: int | None) -> int:
        documents = torch.zeros(1, tokens, dtype=torch.int32)
        with Allocated() as allocated:
            query, key, value = (torch.randn(1, tokens, 2, 8, requires_grad=True) for _ in range(3))
            mask = windows.visible(documents, tokens, window)[:, None]
            mask = windows.with_room_for_sink(mask) if sink else mask
            logits = torch.zeros(2, requires_grad=True) if sink else None
            block = windows.block_size(tokens, window)
            attend(query, key, value, mask=mask, block=block, sink=logits).sum().backward()
            return allocated.peak

    assert peak(4096, 16) < 4.2 * peak(1024, 16)
    assert peak(4096, None) > 10 * peak(1024, None)
