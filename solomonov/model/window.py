"""Which keys a query sees, as masks and biases; and windows in blocks, whose cost grows with T * w and not with T^2.

A window of w is cut into blocks of w queries, each of which attends to the w keys before its block and those of its
block: exact, since a query of the block sees none before these. New tokens after cached ones, and rows
for which no kernel finds out by itself what is seen, are one block as they are where they are short.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

_NO_TOKEN = -2
"""Document of what fills blocks up: that of padding in rows is -1."""


def block_size(tokens: int, window: int | None) -> int:
    """Queries of a block for so many new tokens; 0: they are not cut."""
    return 0 if window is None or tokens <= window else window


def keys_in_reach(total: int, new_tokens: int, window: int | None) -> int:
    """How many of the last tokens a layer has keys of: its cache keeps no more than a window of old ones."""
    return total if window is None else min(total - new_tokens, window) + new_tokens


def visible(documents: Tensor, new_tokens: int, window: int | None) -> Tensor:
    """Where a query may look: at earlier tokens of its document and itself, within the window.

    Args:
        documents: (B, S) of the tokens in reach, of which the last `new_tokens` ask.
        new_tokens: T.

    Returns:
        (B, T, S) bool; of blocks of C queries (B * ceil(T / C), C, 2 C). Every query sees itself, so no row of it is
        empty: padding (document -1) looks at padding, and softmax never meets a row of minus infinities.
    """
    block = block_size(new_tokens, window)
    if block:
        documents = _fill_up(documents, new_tokens, block).unfold(1, 2 * block, block).flatten(0, 1)
    total = documents.shape[1]
    begin = total - (block or new_tokens)
    index = torch.arange(total, device=documents.device)
    near = index[begin:, None] >= index
    if window is not None:
        near = near & (index[begin:, None] < index + window)
    return same_document(documents[:, begin:], documents) & near


def same_document(queries: Tensor, keys: Tensor) -> Tensor:
    """Where a query may look that sees all of its document, before it and behind: (B, T) and (B, S) document ids ->
    (B, T, S) bool."""
    return queries[:, :, None] == keys[:, None, :]


def biased(seen: Tensor, slopes: Tensor) -> Tensor:
    """ALiBi's biases -m_h * distance, minus infinity where a query does not look (arXiv 2108.12409).

    Args:
        seen: (B, T, S) bool.
        slopes: (H,) fp32.

    Returns:
        (B, H, T, S) fp32.
    """
    queries, keys = seen.shape[1:]
    index = torch.arange(keys, dtype=torch.float32, device=seen.device)
    distance = index[keys - queries :, None] - index
    return torch.where(seen[:, None], -slopes[:, None, None] * distance, -torch.inf)


def with_room_for_sink(mask: Tensor) -> Tensor:
    """The mask, bool or biases, with one more key at the end that all see."""
    return functional.pad(mask, (0, 1), value=True if mask.dtype == torch.bool else 0.0)


def _fill_up(documents: Tensor, new_tokens: int, block: int) -> Tensor:
    """(B, S) -> (B, n * C) with a block of keys before the first query and whole blocks of queries."""
    missing = block - (documents.shape[1] - new_tokens)
    filled = functional.pad(documents, (missing, 0), value=_NO_TOKEN)
    return functional.pad(filled, (0, -new_tokens % block), value=_NO_TOKEN)


def queries_in_blocks(query: Tensor, block: int) -> Tensor:
    """(B, H, T, E) -> (B * n, H, C, E), n = ceil(T / C)."""
    rows, heads, tokens, width = query.shape
    filled = functional.pad(query, (0, 0, 0, -tokens % block))
    blocks = filled.view(rows, heads, -1, block, width).transpose(1, 2)
    return blocks.flatten(0, 1)


def keys_in_blocks(key: Tensor, new_tokens: int, block: int) -> Tensor:
    """Of each block of queries the keys before it and its own.

    Args:
        key: (B, K, S, E), at most C of them before those of the new tokens.

    Returns:
        (B * n, K, 2 C, E).
    """
    rows, heads, total, width = key.shape
    filled = functional.pad(key, (0, 0, block - (total - new_tokens), -new_tokens % block))
    blocks = filled.view(rows, heads, -1, block, width).transpose(1, 2)
    return torch.cat((blocks[:, :-1], blocks[:, 1:]), dim=3).flatten(0, 1)


def out_of_blocks(mixed: Tensor, rows: int, tokens: int) -> Tensor:
    """(B * n, H, C, E) -> (B, H, T, E)."""
    _, heads, block, width = mixed.shape
    blocks = mixed.view(rows, -1, heads, block, width).transpose(1, 2)
    return blocks.reshape(rows, heads, -1, width)[:, :, :tokens]
