"""Attention within packed documents on a CPU, without a window, in memory that grows with T and not with T^2.

torch's kernel writes out no scores, but a mask of documents is T x T by itself, which each layer keeps in fp32 for the
backward pass. So each document goes through the kernel by itself, and nothing is computed between documents; ALiBi's
biases are made for some queries at a time, in the backward pass again. A sink is one more term in the denominator of
the softmax, whose value is 0: with l the logarithm of that denominator and s the sink, l' = ln(e^l + e^s) and
o' = o * e^(l - l') are what the kernel's backward pass reads of a softmax that has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BIASED_QUERIES = 128
"""Queries for which ALiBi's biases are there at once: (H, 128, S) fp32."""

_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True)
class PackedPlan:
    """Who looks at whom."""

    queries: Tensor
    """(B, T) document ids of those who ask, each document a run of equal ones."""

    keys: Tensor
    """(B, S) document ids of what they look at, likewise; a query whose document is not there finds 0."""

    causal: bool
    """A query sees the keys before it in its document, and itself; `queries` and `keys` are the same."""

    slopes: Tensor | None = None
    """(H,) fp32 of ALiBi, which is causal; None: no biases."""


def packed_attend(query: Tensor, key: Tensor, value: Tensor, plan: PackedPlan, sink: Tensor | None) -> Tensor:
    """Scaled dot-product attention as the plan says.

    Args:
        query: (B, H, T, E).
        key: (B, H, S, E); `value` likewise.
        sink: (H,) logits.

    Returns:
        (B, H, T, E).
    """
    sink = None if sink is None else sink.to(_wide(query.dtype))
    mixed: Tensor = _attend(query, key, value, plan.queries, plan.keys, plan.causal, plan.slopes, sink)[0]
    return mixed


@dataclass(frozen=True, slots=True)
class _Piece:
    """What goes through the kernel at once."""

    rows: slice
    queries: slice
    keys: slice

    def asking(self, x: Tensor) -> Tensor:
        """Of (B, H, T, ...) the queries."""
        return x[self.rows, :, self.queries]

    def asked(self, x: Tensor) -> Tensor:
        """Of (B, H, S, ...) the keys."""
        return x[self.rows, :, self.keys]

    def bias(self, slopes: Tensor) -> Tensor:
        """(1, H, queries, keys): -m_h * distance, minus infinity where a key comes later (arXiv 2108.12409)."""
        query = torch.arange(self.queries.start, self.queries.stop, device=slopes.device)
        distance = query[:, None] - torch.arange(self.keys.start, self.keys.stop, device=slopes.device)
        return torch.where(distance >= 0, -slopes[:, None, None] * distance, -torch.inf)[None]


def _pieces(queries: Tensor, keys: Tensor, most: int | None) -> Iterator[_Piece]:
    """Each document of each row; where there are biases (`most` is not None) of so many queries at most."""
    for rows, asking, asked in _documents(queries, keys):
        if most is None:
            yield _Piece(rows, asking, asked)
            continue
        for begin in range(asking.start, asking.stop, most):
            end = min(begin + most, asking.stop)
            yield _Piece(rows, slice(begin, end), slice(asked.start, end))


def _documents(queries: Tensor, keys: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Rows, queries and keys of each document that both have; of all rows at once where each is one document."""
    first = queries[:, :1]
    if bool((queries == first).all()) and bool((keys == first).all()):
        yield slice(0, len(queries)), slice(0, queries.shape[1]), slice(0, keys.shape[1])
        return
    for row, (asking, asked) in enumerate(zip(queries, keys, strict=True)):
        there = dict(_runs(asked))
        for document, run in _runs(asking):
            if document in there:
                yield slice(row, row + 1), run, there[document]


def _runs(documents: Tensor) -> Iterator[tuple[int, slice]]:
    """(T,) -> each document with where it is."""
    ids, sizes = torch.unique_consecutive(documents, return_counts=True)
    begin = 0
    for document, size in zip(ids.tolist(), sizes.tolist(), strict=True):
        yield document, slice(begin, begin + size)
        begin += size


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Of what the kernel keeps of each softmax."""
    return torch.promote_types(dtype, torch.float32)


def _dense(x: Tensor) -> Tensor:
    """Likewise with the numbers of a head side by side, as the kernel reads them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _empty(query: Tensor) -> tuple[Tensor, Tensor]:
    """Room for a result (B, H, T, E), heads of a token side by side, and for a number a head and query (B, H, T)."""
    rows, heads, tokens, width = query.shape
    total = query.new_empty(rows, heads, tokens, dtype=_wide(query.dtype))
    return query.new_empty(rows, tokens, heads, width).transpose(1, 2), total


@torch.library.custom_op("solomonov::attend_documents", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    causal: bool,
    slopes: Tensor | None,
    sink: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The result and the logarithm of each denominator: (B, H, T, E) and (B, H, T)."""
    query, key, value = _dense(query), _dense(key), _dense(value)
    mixed, total = _empty(query)
    if not causal:
        mixed.zero_()
        total.fill_(-torch.inf)
    for piece in _pieces(queries, keys, None if slopes is None else BIASED_QUERIES):
        asking, asked = piece.asking(query), (piece.asked(key), piece.asked(value))
        bias = None if slopes is None else piece.bias(slopes.to(total.dtype))
        found, logarithm = _kernel(asking, *asked, is_causal=causal and bias is None, attn_mask=bias)
        piece.asking(mixed).copy_(found)
        piece.asking(total).copy_(logarithm)
    if sink is not None:
        with_sink = torch.logaddexp(total, sink[:, None])
        mixed *= (total - with_sink).exp()[..., None].to(mixed.dtype)
        total = with_sink
    return mixed, total


@torch.library.custom_op("solomonov::attend_documents_backward", mutates_args=())
def _backward(
    gradient: Tensor, kept: Sequence[Tensor], causal: bool, slopes: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values; `kept` are the first five arguments of `_attend` and what it gave."""
    query, key, value, queries, keys, mixed, total = kept
    gradient, query, key, value = _dense(gradient), _dense(query), _dense(key), _dense(value)
    # With biases a key gets its gradient in several sums.
    dtype = query.dtype if slopes is None else total.dtype
    of_query, of_key, of_value = (torch.zeros_like(x, dtype=dtype) for x in (query, key, value))
    for piece in _pieces(queries, keys, None if slopes is None else BIASED_QUERIES):
        asking = piece.asking(query), piece.asked(key), piece.asked(value), piece.asking(mixed), piece.asking(total)
        bias = None if slopes is None else piece.bias(slopes.to(total.dtype))
        found = _kernel_backward(piece.asking(gradient), *asking, 0.0, causal and bias is None, attn_mask=bias)
        piece.asking(of_query).copy_(found[0])
        piece.asked(of_key).add_(found[1])
        piece.asked(of_value).add_(found[2])
    return of_query.to(query.dtype), of_key.to(query.dtype), of_value.to(query.dtype)


@_attend.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty(query)


@_backward.register_fake
def _(gradient: Tensor, kept: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (_dense(x) for x in kept[:3])
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.causal, slopes, sink = inputs
    ctx.save_for_backward(*tensors, slopes, sink, *output)


def _gradients(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, slopes, sink, mixed, total = ctx.saved_tensors
    found = _backward(gradient, [*inputs, mixed, total], ctx.causal, slopes)
    of_sink = None
    if sink is not None:
        of_softmax = (gradient.to(total.dtype) * mixed.to(total.dtype)).sum(dim=-1)
        of_sink = -((sink[:, None] - total).exp() * of_softmax).sum(dim=(0, 2))
    return (*found, None, None, None, None, of_sink)


_attend.register_autograd(_gradients, setup_context=_keep)

attend_documents = torch.ops.solomonov.attend_documents.default
"""The operation, as what counts operations meets it: it keeps its result and a number a head and query."""
