"""Causal attention within documents: grouped queries, rotary positions, normalised queries and keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from solomonov.model.cache import LayerCache
from solomonov.model.config import ModelConfig
from solomonov.model.rope import document_positions, rope_tables, rotate


@dataclass(frozen=True, slots=True)
class SequenceShare:
    """This rank's share of rows that several ranks compute together: a run of T/S tokens of each row in all layers,
    and in attention all tokens for H/S heads (Ulysses, arXiv 2309.14509)."""

    rank: int
    """Which run of tokens, from 0."""

    ranks: int
    """S, ranks that share a row."""

    attend: Callable[..., Tensor]
    """As `attend`, with (B, T/S, heads, E) of this rank's tokens; exchanges tokens for heads, and back. Collective
    over the ranks that share a row. Its fourth argument is the dimension of rows, 0."""

    def tokens(self, total: int) -> slice:
        """Which of so many tokens are this rank's."""
        each = total // self.ranks
        return slice(self.rank * each, (self.rank + 1) * each)


@dataclass(frozen=True, slots=True)
class AttentionContext:
    """What all blocks of one forward pass share. Nothing in it needs a gradient."""

    mask: Tensor
    """(B, 1, T, S) bool, true where a query may look. Every query sees itself, so no row of it is empty:
    padding (document -1) looks at padding, and softmax never meets a row of minus infinities."""

    cosine: Tensor
    """(B, 1, T, E/2) fp32."""

    sine: Tensor
    """(B, 1, T, E/2) fp32."""

    share: SequenceShare | None = None
    """Where the tokens here are some of each row's: `cosine` and `sine` are theirs, `mask` is all tokens'."""


def attention_context(
    document_ids: Tensor,
    config: ModelConfig,
    *,
    new_tokens: int | None = None,
    share: SequenceShare | None = None,
) -> AttentionContext:
    """Mask and rotary tables for rows of packed documents.

    Args:
        document_ids: (B, S) of all tokens, cached ones first.
        new_tokens: T, how many of the last tokens are queries; None: all.
        share: of the rows' tokens, where other ranks have the rest.
    """
    total = document_ids.shape[1]
    begin = 0 if new_tokens is None else total - new_tokens
    index = torch.arange(total, device=document_ids.device)
    causal = index[begin:, None] >= index
    same_document = document_ids[:, begin:, None] == document_ids[:, None, :]
    positions = document_positions(document_ids)[:, begin:]
    if share is not None:
        positions = positions[:, share.tokens(total)]
    cosine, sine = rope_tables(positions, config.head_width, config.attention.rope_theta)
    return AttentionContext((same_document & causal)[:, None], cosine, sine, share)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Scaled dot-product attention of H query heads over K key-value heads, of which each serves H/K.

    Args:
        query: (B, T, H, E).
        key: (B, S, K, E); `value` likewise.
        mask: (B, 1, T, S) bool.

    Returns:
        (B, T, H, E).
    """
    # The kernels that take a mask without writing out all T x S scores want one key head a query head
    # (enable_gqa falls back to the plain product on CUDA, and is no faster on CPU).
    shared = query.shape[2] // key.shape[2]
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if shared > 1:
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def _attend_together(query: Tensor, key: Tensor, value: Tensor, context: AttentionContext) -> Tensor:
    """`attend` over the tokens of all ranks that share these rows."""
    share = context.share
    assert share is not None, "all tokens are here"
    # Each rank gets whole key heads: where there are too few for that, they are copied, as seldom as will do.
    copies = share.ranks // math.gcd(key.shape[2], share.ranks)
    if copies > 1:
        key, value = key.repeat_interleave(copies, dim=2), value.repeat_interleave(copies, dim=2)
    return share.attend(query, key, value, 0, mask=context.mask)


class Linear(nn.Module):
    """y = x W^T without bias. The weight is left empty: `init` fills it, by its name."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return functional.linear(x, self.weight)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in fp32 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width) in the dtype of x."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight.float()).to(x.dtype)


class Attention(nn.Module):
    """Attention of H query heads over K key-value heads of width E, without biases."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_head_count, config.head_width
        self.q = Linear(config.d_model, self.heads * self.head_dim)
        self.k = Linear(config.d_model, self.kv_heads * self.head_dim)
        self.v = Linear(config.d_model, self.kv_heads * self.head_dim)
        self.out = Linear(self.heads * self.head_dim, config.d_model)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.attention.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.norm_eps)

    def forward(self, x: Tensor, context: AttentionContext, past: LayerCache | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); with `past`, the new tokens also see the cached ones."""
        rows, tokens, _ = x.shape
        query = self.q(x).view(rows, tokens, self.heads, self.head_dim)
        key = self.k(x).view(rows, tokens, self.kv_heads, self.head_dim)
        value = self.v(x).view(rows, tokens, self.kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query = rotate(query.transpose(1, 2), context.cosine, context.sine)
        key = rotate(key.transpose(1, 2), context.cosine, context.sine)
        if past is not None:
            key, value = past.extend(key, value.transpose(1, 2))
            value = value.transpose(1, 2)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        if context.share is None:
            mixed = attend(query, key, value, context.mask)
        else:
            mixed = _attend_together(query, key, value, context)
        joined = mixed.reshape(rows, tokens, self.heads * self.head_dim)
        return self.out(joined)  # type: ignore[no-any-return]
