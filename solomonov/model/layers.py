"""The four kinds of named layers: embedding, block, final norm, head."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from solomonov.model.attention import Attention, AttentionContext, Linear, RMSNorm
from solomonov.model.cache import LayerCache
from solomonov.model.config import ModelConfig
from solomonov.model.loss import cross_entropy_and_z_sums, cross_entropy_sum
from solomonov.model.positions import sinusoids
from solomonov.model.recompute import keeping_products


class Embedding(nn.Module):
    """Token ids to vectors; with sinusoidal positions these are added."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, config.d_model))
        self.sinusoidal = config.attention.position == "sinusoidal"
        # A tied matrix starts at 1/sqrt(D) as the head needs it: brought to the size of positions, as in 2017.
        self.scale = math.sqrt(config.d_model) if config.tie_embeddings else 1.0

    def forward(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """(B, T) integers -> (B, T, D).

        Args:
            positions: (B, T) within the document, from 0; only sinusoidal ones are told here.
        """
        vectors = functional.embedding(input_ids, self.weight)
        if not self.sinusoidal:
            return vectors
        assert positions is not None, "sinusoidal positions are added to the embedding, and none came"
        return (vectors.float() * self.scale + sinusoids(positions, vectors.shape[-1])).to(vectors.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Linear(config.d_model, config.feed_forward_width)
        self.up = Linear(config.d_model, config.feed_forward_width)
        self.down = Linear(config.feed_forward_width, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        inner: Tensor = functional.silu(self.gate(x)) * self.up(x)
        return self.down(inner)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and feed-forward, each added to the stream: x' = x + s * f(norm(x)).

    The general residual is x' = norm_post(a * x + s * norm_out(f(c * norm_pre(x)))); here norm_post and
    norm_out are the identity and a = c = 1.

    Args:
        config: its shape.
        index: number of the layer, from 0.
        selective: keep only products for the backward pass (see `recompute`). This is done in here, and not around
            the block, so that what torch.compile makes of a block does it as well.
    """

    def __init__(self, config: ModelConfig, index: int, *, selective: bool = False) -> None:
        super().__init__()
        self.branch_scale = config.branch_scale
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, index)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = SwiGLU(config)
        self.selective = selective
        self._products = sum(isinstance(module, Linear) for module in self.modules())

    def forward(self, hidden: Tensor, context: AttentionContext, past: LayerCache | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        if past is not None:
            return self._both_branches(hidden, context, past)
        return self._kept_of(self._both_branches, hidden, context)

    def _kept_of(self, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """function(*args), which has all products of the block, and keeps what it is to keep."""
        if self.selective and self.training:
            return keeping_products(function, *args, products=self._products)
        return function(*args)

    def _both_branches(self, hidden: Tensor, context: AttentionContext, past: LayerCache | None = None) -> Tensor:
        hidden = self._add(hidden, self.attention(self.attention_norm(hidden), context, past))
        return self._add(hidden, self.feed_forward(self.feed_forward_norm(hidden)))

    def _add(self, hidden: Tensor, branch: Tensor) -> Tensor:
        return hidden + branch if self.branch_scale == 1.0 else hidden + self.branch_scale * branch


class FinalNorm(RMSNorm):
    """The norm between the last block and the head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.d_model, config.norm_eps)


class Head(nn.Module):
    """Hidden states to logits, or straight to the loss.

    The loss is computed in here because a partitioned weight (ZeRO 3) is whole only while its module runs.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, config.d_model))

    def forward(self, hidden: Tensor, labels: Tensor | None = None, *, with_z: bool = False) -> Tensor:
        """(B, T, D) -> logits (B, T, V); with labels (B, T) -> fp32 sum of their cross-entropy, or (2,) with ln^2 Z."""
        if labels is None:
            return functional.linear(hidden, self.weight)
        if with_z:
            return cross_entropy_and_z_sums(hidden, self.weight, labels)
        return cross_entropy_sum(hidden, self.weight, labels)
