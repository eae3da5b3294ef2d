"""Attention within documents, causal or of all to all: grouped queries, and the flags of `attention_config`, each exact
on its own and with the others. With all of them off nothing but the plain product is computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from solomonov.model import window
from solomonov.model.cache import LayerCache
from solomonov.model.config import ModelConfig
from solomonov.model.flex import FlexPlan, flex_attend, flex_plan, flex_suits
from solomonov.model.norms import RMSNorm
from solomonov.model.packed import PackedPlan, packed_attend
from solomonov.model.positions import alibi_slopes, log_visible
from solomonov.model.rope import document_numbers, document_positions, grid_rope_tables, rope_tables, rotate
from solomonov.model.stacks import Stack


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

    def heads(self, total: int) -> slice:
        """Which of so many query heads are this rank's in attention."""
        return self.tokens(total)


@dataclass(frozen=True, slots=True)
class AttentionContext:
    """What all blocks of one kind share in a forward pass. Nothing in it needs a gradient."""

    mask: Tensor | None
    """(B, 1, T, S) bool, true where a query may look, or (B, H, T, S) fp32 biases, see `window`; with a sink S is one
    more. None: `flex` or `packed` says it."""

    flex: FlexPlan | None
    """How a CUDA kernel finds out which keys to look at."""

    packed: PackedPlan | None
    """Likewise a kernel of the CPU, where no keys are cached."""

    cosine: Tensor | None
    """(B, 1, T, E/2) fp32; None: nothing is rotated."""

    sine: Tensor | None
    """(B, 1, T, E/2) fp32."""

    log_keys: Tensor | None
    """(B, 1, T, 1) fp32, ln of how many keys a query sees; None: logits are not scaled by it."""

    share: SequenceShare | None = None
    """Where the tokens here are some of each row's: the tables are theirs, the mask is all tokens', biases are for this
    rank's heads."""


def token_positions(document_ids: Tensor, new_tokens: int | None = None, share: SequenceShare | None = None) -> Tensor:
    """(B, T) positions within their documents of the tokens that are here; arguments as of `attention_context`."""
    total = document_ids.shape[1]
    positions = document_positions(document_ids)[:, 0 if new_tokens is None else total - new_tokens :]
    return positions if share is None else positions[:, share.tokens(total)]


def attention_context(
    document_ids: Tensor,
    config: ModelConfig,
    layer: int = 0,
    *,
    new_tokens: int | None = None,
    share: SequenceShare | None = None,
    stack: Stack | None = None,
) -> AttentionContext:
    """Masks and tables of one layer, and of all of its kind, for rows of packed documents.

    Args:
        document_ids: (B, S) of all tokens, cached ones first: a document is a run of equal numbers.
        layer: number of the layer in its stack, from 0.
        new_tokens: T, how many of the last tokens are queries; None: all.
        share: of the rows' tokens, where other ranks have the rest.
        stack: which one; None: the last.
    """
    kind, total, device = config.layer_attention(layer, stack), document_ids.shape[1], document_ids.device
    new = total if new_tokens is None else new_tokens
    positions = token_positions(document_ids, new_tokens, share)
    document_ids = document_numbers(document_ids)
    cosine, sine = None, None
    if kind.position == "rope":
        columns = config.grid_columns(stack)
        if columns is None:
            cosine, sine = rope_tables(positions, config.head_width, kind.rope_theta)
        else:
            cosine, sine = grid_rope_tables(positions, columns, config.head_width, kind.rope_theta)
    slopes = None
    if kind.position == "alibi":
        slopes = torch.tensor(alibi_slopes(config.heads), device=device)
        slopes = slopes if share is None else slopes[share.heads(config.heads)]
    mask, flex, packed = None, None, None
    # New tokens after cached ones come in any number, for each of which the CUDA kernel would be compiled.
    if new_tokens is None and flex_suits(config, device):
        flex = flex_plan(document_ids, kind.window, slopes, causal=kind.causal)
    elif new == total and device.type == "cpu":
        packed = PackedPlan(document_ids, document_ids, kind.causal, slopes, kind.window)
    elif not kind.causal:
        mask = window.same_document(document_ids, document_ids)[:, None]
    else:
        seen = window.visible(document_ids[:, -window.keys_in_reach(total, new, kind.window) :], new, kind.window)
        mask = seen[:, None] if slopes is None else window.biased(seen, slopes)
        if kind.sink:
            mask = window.with_room_for_sink(mask)
    return AttentionContext(mask, flex, packed, cosine, sine, log_visible(positions) if kind.log_n else None, share)


def layer_contexts(
    document_ids: Tensor,
    config: ModelConfig,
    *,
    new_tokens: int | None = None,
    share: SequenceShare | None = None,
    stack: Stack | None = None,
) -> list[AttentionContext]:
    """The context of each layer of a stack, one for all layers of a kind; arguments as of `attention_context`."""
    stack = config.stacks[-1] if stack is None else stack
    kinds = [config.layer_attention(layer, stack) for layer in range(stack.layers)]
    of_kind = {
        kind: attention_context(
            document_ids, config, kinds.index(kind), new_tokens=new_tokens, share=share, stack=stack
        )
        for kind in dict.fromkeys(kinds)
    }
    return [of_kind[kind] for kind in kinds]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None,
    flex: FlexPlan | None = None,
    packed: PackedPlan | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention of H query heads over K key-value heads, of which each serves H/K.

    Args:
        query: (B, T, H, E).
        key: (B, S, K, E); `value` likewise.
        mask, flex, packed: as in the context.
        sink: (H,) logits.

    Returns:
        (B, T, H, E).
    """
    # The kernels that take a mask without writing out all T x S scores want one key head a query head
    # (enable_gqa falls back to the plain product on CUDA, and is no faster on CPU).
    heads, width = query.shape[2:]
    shared = heads // key.shape[2]
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if torch.is_autocast_enabled(query.device.type):  # what torch does by itself before its own product alone
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if flex is not None:
        return flex_attend(query, key, value, flex, sink).transpose(1, 2)
    if shared > 1:
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    if packed is not None:
        return packed_attend(query, key, value, packed, sink).transpose(1, 2)
    if sink is None:
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    else:
        scale = 1.0 / math.sqrt(width)
        query, key, value = _with_sink(query, key, value, sink / scale)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)[..., :width]
    return mixed.transpose(1, 2)


def _with_sink(query: Tensor, key: Tensor, value: Tensor, sink: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One more key without value, whose product with every query is `sink` (H,): a channel that is 1 in queries, and in
    keys 0 but for that one. As a key, and not as a bias, its gradient comes out of the kernels that write out no
    scores."""
    query = functional.pad(query, (0, 1), value=1.0)
    key, value = functional.pad(key, (0, 1, 0, 1)), functional.pad(value, (0, 1, 0, 1))
    channel = functional.pad(sink.to(key.dtype)[:, None, None], (key.shape[3] - 1, 0, key.shape[2] - 1, 0))
    return query, key + channel, value


def _how(context: AttentionContext) -> dict[str, Any]:
    """Keywords of `attend`."""
    return {"mask": context.mask, "flex": context.flex, "packed": context.packed}


def _attend_together(
    query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, sink: Tensor | None
) -> Tensor:
    """`attend` over the tokens of all ranks that share these rows."""
    share = context.share
    assert share is not None, "all tokens are here"
    # Each rank gets whole key heads: where there are too few for that, they are copied, as seldom as will do.
    copies = share.ranks // math.gcd(key.shape[2], share.ranks)
    if copies > 1:
        key, value = key.repeat_interleave(copies, dim=2), value.repeat_interleave(copies, dim=2)
    if sink is not None:
        sink = sink[share.heads(query.shape[2])]
    return share.attend(query, key, value, 0, **_how(context), sink=sink)


class Linear(nn.Module):
    """y = x W^T, or with `bias` x W^T + b. The parameters are left empty: `init` fills them, by their names."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        product = functional.linear(x, self.weight)
        # Not as a bias of the product: DeepSpeed's own product at ZeRO 3 adds it in place, into what selective
        # recomputation has kept of the product, and once more when it comes back to it.
        return product if self.bias is None else product + self.bias.to(product.dtype)


class OutputGate(Linear):
    """sigmoid(W x + b), a number a head or one an element of it (arXiv 2505.06708)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs), each between 0 and 1."""
        return torch.sigmoid(super().forward(x))


class Projections(nn.Module):
    """What every kind of attention has: H query heads and K key-value heads of width E, and the flags that need no
    order of tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        flags = config.attention
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_head_count, config.head_width
        self.q = Linear(config.d_model, self.heads * self.head_dim, bias=config.bias)
        self.k = Linear(config.d_model, self.kv_heads * self.head_dim, bias=config.bias)
        self.v = Linear(config.d_model, self.kv_heads * self.head_dim, bias=config.bias)
        self.out = Linear(self.heads * self.head_dim, config.d_model, bias=config.bias)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        self.normed_together = flags.qk_norm_over == "all"
        if flags.qk_norm:
            at_once = (self.heads, self.kv_heads) if self.normed_together else (1, 1)
            self.q_norm = RMSNorm(at_once[0] * self.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(at_once[1] * self.head_dim, config.norm_eps)
        self.gate: OutputGate | None = None
        if flags.output_gate:
            each = 1 if flags.output_gate == "head" else self.head_dim
            self.gate = OutputGate(config.d_model, self.heads * each)

    def split(self, flat: Tensor, heads: int) -> Tensor:
        """(B, T, heads * E) -> (B, T, heads, E)."""
        return flat.view(*flat.shape[:2], heads, self.head_dim)

    def normed(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """(B, T, heads, E) likewise, each head by itself or all of a token together."""
        normed: Tensor = norm(x.flatten(2)).view_as(x) if self.normed_together else norm(x)
        return normed

    def joined(self, mixed: Tensor, x: Tensor) -> Tensor:
        """What was found, (B, T, H, E), gated by what asked, x (B, T, D), and projected: (B, T, D)."""
        if self.gate is not None:
            mixed = mixed * self.gate(x).view(*mixed.shape[:3], -1)
        return self.out(mixed.flatten(2))  # type: ignore[no-any-return]


class Attention(Projections):
    """Attention of the tokens of a stack to each other.

    Args:
        config: the model's shape.
        layer: number of the layer in its stack, from 0, which decides of what kind it is.
        stack: which one; None: the last.

    Attributes:
        observer: called with each query (B, T, H, E) and key (B, S, K, E) as they meet, and the sink (H,), for as long
            as somebody looks (see `watch`).
    """

    observer: Callable[[Tensor, Tensor, Tensor | None], None] | None = None

    def __init__(self, config: ModelConfig, layer: int = 0, stack: Stack | None = None) -> None:
        super().__init__(config)
        kind = config.layer_attention(layer, stack)
        self.log_scale = nn.Parameter(torch.empty(self.heads)) if kind.log_n else None
        self.sink = nn.Parameter(torch.empty(self.heads)) if kind.sink else None

    def forward(
        self, x: Tensor, context: AttentionContext, past: LayerCache | None = None, value: Tensor | None = None
    ) -> Tensor:
        """(B, T, D) -> (B, T, D).

        Args:
            past: of the tokens before these, which the new ones see as well.
            value: (B, T, K * E), the values of these tokens; None: v(x).
        """
        query, key = self.split(self.q(x), self.heads), self.split(self.k(x), self.kv_heads)
        value = self.split(self.v(x) if value is None else value, self.kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.normed(query, self.q_norm), self.normed(key, self.k_norm)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        if context.cosine is not None and context.sine is not None:
            query = rotate(query, context.cosine, context.sine)
            key = rotate(key, context.cosine, context.sine)
        if self.log_scale is not None and context.log_keys is not None:
            scale = self.log_scale.float()[:, None, None] * context.log_keys
            query = (query.float() * scale).to(query.dtype)
        if past is not None:
            key, value = past.extend(key, value.transpose(1, 2))
            value = value.transpose(1, 2)
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        if self.observer is not None:
            self.observer(query, key, self.sink)
        if context.share is None:
            mixed = attend(query, key, value, **_how(context), sink=self.sink)
        else:
            mixed = _attend_together(query, key, value, context, self.sink)
        return self.joined(mixed, x)
