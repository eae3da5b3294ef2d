"""Which keys a query sees, as masks and biases, for kernels that do not find out by themselves."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor


def keys_in_reach(total: int, new_tokens: int, window: int | None) -> int:
    """How many of the last tokens a layer has keys of: its cache keeps no more than a window of old ones."""
    return total if window is None else min(total - new_tokens, window) + new_tokens


def visible(documents: Tensor, new_tokens: int, window: int | None) -> Tensor:
    """Where a query may look: at earlier tokens of its document and itself, within the window.

    Args:
        documents: (B, S) of the tokens in reach, of which the last `new_tokens` ask.
        new_tokens: T.

    Returns:
        (B, T, S) bool. Every query sees itself, so no row of it is empty: padding (document -1) looks at padding, and
        softmax never meets a row of minus infinities.
    """
    total = documents.shape[1]
    begin = total - new_tokens
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
