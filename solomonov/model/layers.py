"""The four kinds of named layers: embedding, block, final norm, head."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from solomonov.model.attention import Attention, AttentionContext, Linear, SequenceShare, token_positions
from solomonov.model.cache import LayerCache
from solomonov.model.config import ModelConfig
from solomonov.model.cross import CrossAttention, Memory
from solomonov.model.loss import cross_entropy_and_z_sums, cross_entropy_sum
from solomonov.model.norms import StreamNorm
from solomonov.model.positions import sinusoids
from solomonov.model.recompute import keeping_products
from solomonov.model.residual import branch_form, mixes_values
from solomonov.model.stacks import Stack
from solomonov.model.stochastic_depth import drawn_factor


class Embedding(nn.Module):
    """Token ids to vectors; sinusoidal or learned positions are added, and the sum may be normed."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, config.d_model))
        self.sinusoidal, self.longest = config.attention.position == "sinusoidal", config.longest_tokens
        self.positions = None if self.longest is None else nn.Parameter(torch.empty(self.longest, config.d_model))
        self.norm = StreamNorm(config) if config.embedding_norm else None
        # A tied matrix starts at 1/sqrt(D) as the head needs it: brought to the size of sinusoids, as in 2017.
        self.scale = math.sqrt(config.d_model) if config.tie_embeddings and self.sinusoidal else 1.0

    def positions_of(
        self, document_ids: Tensor, new_tokens: int | None = None, share: SequenceShare | None = None
    ) -> Tensor | None:
        """(B, T) positions within their documents, where they are told here; arguments as of `attention_context`.

        Raises:
            ValueError: the row is longer than there are learned positions.
        """
        if self.longest is not None and document_ids.shape[1] > self.longest:
            raise ValueError(
                f"a row of {document_ids.shape[1]} tokens, and learned positions for {self.longest}: give shorter "
                "rows, or train with a larger model.attention.train_tokens"
            )
        placed = self.sinusoidal or self.longest is not None
        return token_positions(document_ids, new_tokens, share) if placed else None

    def forward(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """(B, T) integers -> (B, T, D).

        Args:
            positions: (B, T) of `positions_of`.
        """
        vectors = functional.embedding(input_ids, self.weight)
        if positions is not None:
            added = (
                sinusoids(positions, vectors.shape[-1])
                if self.positions is None
                else functional.embedding(positions, self.positions).float()
            )
            vectors = (vectors.float() * self.scale + added).to(vectors.dtype)
        return vectors if self.norm is None else self.norm(vectors)


def _gelu_by_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _relu_squared(x: Tensor) -> Tensor:
    return functional.relu(x).square()


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": functional.silu,
    "geglu": _gelu_by_tanh,
    "gelu": functional.gelu,
    "relu": functional.relu,
    "silu": functional.silu,
    "relu2": _relu_squared,
}
"""Kind of feed-forward -> its function."""


class FeedForward(nn.Module):
    """What each token is mapped to on its own.

    `swiglu`: down(silu(gate(x)) * up(x)) (arXiv 2002.05202); `geglu` likewise with gelu, by its approximation with tanh
    as in Gemma (arXiv 2403.08295); `gelu`: down(gelu(up(x))) (arXiv 1606.08415), by the error function; `relu` and
    `silu` likewise (arXiv 1706.03762, 1702.03118); `relu2`: down(relu(up(x))^2) (arXiv 2109.08668).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, inner, bias = config.d_model, config.feed_forward_width, config.bias
        self.activation = _ACTIVATIONS[config.feed_forward]
        self.gate = Linear(width, inner, bias=bias) if config.gated else None
        self.up = Linear(width, inner, bias=bias)
        self.down = Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        inner: Tensor = self.up(x)
        inner = self.activation(inner) if self.gate is None else self.activation(self.gate(x)) * inner
        return self.down(inner)  # type: ignore[no-any-return]


Stream = tuple[Tensor, ...]
"""What travels from block to block of a stack: hidden (B, T, D), and with value residual, behind the first block, the
values that this had in its attention, (B, T, K * E)."""


class Block(nn.Module):
    """Attention, in a decoder behind an encoder cross-attention, and feed-forward, each added to the stream in the
    general form of `residual`: x' = norm_post(alpha * x + g * s * norm_out(f(c * norm_pre(x)))), with g = b / p of
    `stochastic_depth`.

    Args:
        config: its shape.
        index: number of the layer in its stack, from 0.
        stack: which one; None: the last.
        selective: keep only products for the backward pass (see `recompute`). This is done in here, and not around
            the block, so that what torch.compile makes of a block does it as well.
    """

    def __init__(self, config: ModelConfig, index: int, stack: Stack | None = None, *, selective: bool = False) -> None:
        super().__init__()
        stack = config.stacks[-1] if stack is None else stack
        self.config, self.index, self.stack = config, index, stack
        self.form = branch_form(config, index, stack)

        def norm(wanted: bool) -> nn.Module | None:
            return StreamNorm(config) if wanted else None

        def scale() -> nn.Parameter | None:
            size = {"none": 0, "scalar": 1, "channel": config.d_model}[self.form.learned]
            return nn.Parameter(torch.empty(size)) if size else None

        self.attention_norm, self.attention_out_norm = norm(self.form.pre), norm(self.form.out)
        self.attention_post_norm, self.attention_scale = norm(self.form.post), scale()
        self.attention = Attention(config, index, stack)
        self.cross_attention: CrossAttention | None = None
        if stack.crossed:
            self.cross_attention_norm, self.cross_attention_out_norm = norm(self.form.pre), norm(self.form.out)
            self.cross_attention_post_norm, self.cross_attention_scale = norm(self.form.post), scale()
            self.cross_attention = CrossAttention(config)
        self.feed_forward_norm, self.feed_forward_out_norm = norm(self.form.pre), norm(self.form.out)
        self.feed_forward_post_norm, self.feed_forward_scale = norm(self.form.post), scale()
        self.feed_forward = FeedForward(config)
        self.attention_value_mix = nn.Parameter(torch.empty(2)) if mixes_values(config, index) else None
        self.selective = selective
        self._with_values = config.value_residual
        self._factor: float | None = None
        self._products = sum(isinstance(module, Linear) for module in self.modules())

    def draw(self, seed: int, update: int) -> None:
        """Say of which update the next forward passes are, which decides whether they pass this block by; see
        `stochastic_depth.drawn_factor`. A block that was never told drops nothing."""
        self._factor = drawn_factor(self.config, self.index, self.stack, seed=seed, update=update)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`forward`; in training, in an update that passes this block by, `passed_by`. Decided out here, since what
        torch.compile made of the block, and what DeepSpeed gathers for it, are then not called at all."""
        if not self.training or self._factor is None:
            return super().__call__(*args, **kwargs)
        if self._factor == 0.0:
            return self.passed_by(*args)
        # A tensor: of a number torch.compile would make one graph for each block.
        gain = torch.full((), self._factor, dtype=torch.float32, device=args[0][0].device)
        return super().__call__(*args, gain=gain, **kwargs)

    def forward(
        self,
        stream: Stream,
        context: AttentionContext,
        past: LayerCache | None = None,
        memory: Memory | None = None,
        gain: Tensor | None = None,
    ) -> Stream:
        """The stream behind this block.

        Args:
            memory: of the source, where there is cross-attention.
            gain: () fp32, what the branches are multiplied by; None: 1.
        """
        if past is not None:
            return self._branches(stream, context, past, memory, gain)
        return self._kept_of(self._branches, stream, context, None, memory, gain)

    def hidden_of(self, stream: Stream) -> Tensor:
        """(B, T, D) in what this block is given, or hands on."""
        return stream[0]

    def with_hidden(self, stream: Stream, hidden: Tensor) -> Stream:
        """The same with another hidden."""
        return hidden, *stream[1:]

    def passed_by(self, stream: Stream, *_: Any) -> Stream:
        """The stream behind this block where its branches are 0; takes what `forward` takes."""
        hidden = stream[0]
        for branch in self.stack.branches:
            hidden = self._add(hidden, branch, None)
        return hidden, *stream[1:]

    def _kept_of(self, function: Callable[..., Stream], *args: Any) -> Stream:
        """function(*args), which has all products of the block, and keeps what it is to keep."""
        if self.selective and self.training:
            return keeping_products(function, *args, products=self._products)
        return function(*args)

    def _branches(
        self,
        stream: Stream,
        context: AttentionContext,
        past: LayerCache | None,
        memory: Memory | None,
        gain: Tensor | None,
    ) -> Stream:
        hidden, values = stream[0], stream[1:]
        read, value = self._read(hidden, "attention"), None
        if self._with_values:
            value = self.attention.v(read)
            if self.attention_value_mix is None:
                values = (value,)
            else:
                mix = self.attention_value_mix.to(value.dtype)
                value = mix[0] * value + mix[1] * values[0]
        hidden = self._add(hidden, "attention", self.attention(read, context, past, value), gain)
        if self.cross_attention is not None:
            assert memory is not None, "cross-attention looks at a source, and none came"
            branch = self.cross_attention(self._read(hidden, "cross_attention"), memory, past)
            hidden = self._add(hidden, "cross_attention", branch, gain)
        branch = self.feed_forward(self._read(hidden, "feed_forward"))
        return self._add(hidden, "feed_forward", branch, gain), *values

    def _read(self, hidden: Tensor, branch: str) -> Tensor:
        """c * norm_pre(x)."""
        pre = getattr(self, f"{branch}_norm")
        read: Tensor = hidden if pre is None else pre(hidden)
        return read if self.form.inner == 1.0 else self.form.inner * read

    def _add(self, hidden: Tensor, branch: str, found: Tensor | None, gain: Tensor | None = None) -> Tensor:
        """norm_post(alpha * x + gain * s * norm_out(found)); None: nothing was computed."""
        out, learned, post = (getattr(self, f"{branch}_{part}") for part in ("out_norm", "scale", "post_norm"))
        total = hidden if self.form.alpha == 1.0 else self.form.alpha * hidden
        if found is not None:
            if out is not None:
                found = out(found)
            if learned is not None:
                found = learned.to(found.dtype) * found
            elif self.form.scale != 1.0:
                found = self.form.scale * found
            if gain is not None:
                found = gain * found
            total = total + found
        return total if post is None else post(total)


class FinalNorm(StreamNorm):
    """The norm behind the last block of a stack."""


class HeadTransform(nn.Module):
    """norm(f(A h + a)), with the function f of the feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = Linear(config.d_model, config.d_model, bias=True)
        self.activation = _ACTIVATIONS[config.feed_forward]
        self.norm = StreamNorm(config)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.norm(self.activation(self.dense(hidden)))  # type: ignore[no-any-return]


class Head(nn.Module):
    """Hidden states to logits, or straight to the loss.

    The loss is computed in here because a partitioned weight (ZeRO 3) is whole only while its module runs.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.transform = HeadTransform(config) if config.output_head == "transform" else None
        self.weight = nn.Parameter(torch.empty(vocab_size, config.d_model))
        self.bias = None if config.output_head == "linear" else nn.Parameter(torch.empty(vocab_size))

    def forward(self, hidden: Tensor, labels: Tensor | None = None, *, with_z: bool = False) -> Tensor:
        """(B, T, D) -> logits (B, T, V); with labels (B, T) -> fp32 sum of their cross-entropy, or (2,) with ln^2 Z."""
        if self.transform is not None:
            hidden = self.transform(hidden)
        if labels is None:
            logits = functional.linear(hidden, self.weight)
            return logits if self.bias is None else logits + self.bias.to(logits.dtype)
        loss_of = cross_entropy_and_z_sums if with_z else cross_entropy_sum
        return loss_of(hidden, self.weight, labels, self.bias)
