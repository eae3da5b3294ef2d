"""Who is seen, against the definition."""

from __future__ import annotations

import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from solomonov.model import window as windows


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
        wanted = expected[total - new :]
        assert torch.equal(found[0], wanted[:, total - reach :])
        assert not bool(wanted[:, : total - reach].any()), "a key out of reach is seen"
