"""The same attention by torch's flex_attention: on CUDA, where it skips blocks of keys that no query of a block sees
and writes out no biases. It has no backward pass on a CPU; there `attention` does without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from solomonov.model.config import ModelConfig

BLOCK_TOKENS = 128
"""Queries, and keys, of a block."""
LEAST_WIDTH = 16
"""Of a head: the kernels take none that is narrower."""

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(row, head, query, key) -> whether the query sees the key."""
ScoreFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(logit, row, head, query, key) -> logit."""


@dataclass(frozen=True, slots=True)
class FlexPlan:
    """What the kernel needs beside queries, keys and values."""

    blocks: Any
    """BlockMask: which blocks of keys a block of queries looks at, and where within them."""

    score: ScoreFunction | None
    """What becomes of a logit; None: nothing."""


def flex_suits(config: ModelConfig, device: torch.device) -> bool:
    """Whether layers go this way: all on CUDA. A mask of documents rules torch's faster kernels out, and is T x T."""
    return device.type == "cuda" and config.head_width >= LEAST_WIDTH


def flex_plan(document_ids: Tensor, window: int | None, slopes: Tensor | None, *, causal: bool = True) -> FlexPlan:
    """The plan for rows of packed documents.

    Args:
        document_ids: (B, T).
        window: keys that a query sees at most; None: all of its document.
        slopes: (H,) of ALiBi, fp32; None: no bias.
        causal: a token sees none that comes later; else there is no window.
    """
    from torch.nn.attention.flex_attention import BlockMask

    tokens = document_ids.shape[1]
    counts, blocks = key_blocks(document_ids, window, causal)
    mask = BlockMask.from_kv_blocks(
        counts[:, None],
        blocks[:, None],
        BLOCK_SIZE=BLOCK_TOKENS,
        mask_mod=mask_function(document_ids, window, causal),
        seq_lengths=(tokens, tokens),
    )
    return FlexPlan(mask, None if slopes is None else score_function(slopes))


def key_blocks(document_ids: Tensor, window: int | None, causal: bool = True) -> tuple[Tensor, Tensor]:
    """Which blocks of keys each block of queries has to look at: those from the begin of the first query's document, or
    of its window, to its own, or where it is not causal to the end of the last query's document. They are counted from
    the tokens; torch's own way writes out all T x T of the mask.

    Returns:
        (B, n) int32 how many, n = ceil(T / BLOCK_TOKENS), and (B, n, n) int32 their numbers, ascending, then others.
    """
    from solomonov.model.rope import document_positions

    tokens = document_ids.shape[1]
    first_queries = torch.arange(0, tokens, BLOCK_TOKENS, device=document_ids.device)
    begins = first_queries - document_positions(document_ids)[:, first_queries]
    if window is not None:
        begins = begins.maximum(first_queries - (window - 1))
    first_blocks = begins // BLOCK_TOKENS
    own = torch.arange(len(first_queries), device=document_ids.device)
    numbers = (first_blocks[:, :, None] + own) % len(own)
    last_blocks = own
    if not causal:
        last_queries = (first_queries + BLOCK_TOKENS - 1).clamp(max=tokens - 1)
        after = document_positions(document_ids.flip(1)).flip(1)
        last_blocks = (last_queries + after[:, last_queries]) // BLOCK_TOKENS
    return (last_blocks - first_blocks + 1).int(), numbers.int().contiguous()


def mask_function(document_ids: Tensor, window: int | None, causal: bool = True) -> MaskFunction:
    """Whether a query sees a key: of its document, where it is causal not after it, and within the window."""

    def of_document(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return document_ids[row, query] == document_ids[row, key]

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = query >= key
        if window is not None:
            near = near & (query - key < window)
        return near & of_document(row, head, query, key)

    return sees if causal else of_document


def score_function(slopes: Tensor) -> ScoreFunction:
    """ALiBi: logit - m_h * distance, slopes (H,) (arXiv 2108.12409)."""

    def biased(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score - slopes[head] * (query - key)

    return biased


def flex_attend(query: Tensor, key: Tensor, value: Tensor, plan: FlexPlan, sink: Tensor | None) -> Tensor:
    """Attention as the plan says.

    Args:
        query: (B, H, T, E).
        key: (B, K, T, E); `value` likewise.
        sink: (H,) logits. Softmax with one more logit s is softmax without it times e^lse / (e^lse + e^s).

    Returns:
        (B, H, T, E).
    """
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    grouped = query.shape[1] != key.shape[1]
    # Within a block that is compiled it becomes part of it.
    kernel: Any = flex_attention if torch.compiler.is_compiling() else _compiled()
    mixed, found = kernel(
        query,
        key,
        value,
        score_mod=plan.score,
        block_mask=plan.blocks,
        enable_gqa=grouped,
        return_aux=AuxRequest(lse=sink is not None),
    )
    if sink is not None:
        mixed = mixed * torch.sigmoid(found.lse - sink.float()[:, None])[..., None].to(mixed.dtype)
    return mixed  # type: ignore[no-any-return]


@cache
def _compiled() -> Callable[..., Any]:
    """Compiled it is one kernel; as it is it writes out all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
