"""Attention within packed documents on a CPU, in memory that grows with T and not with T^2.

torch's kernel writes out no scores, but a mask of documents is T x T by itself, which each layer keeps in fp32 for the
backward pass. So each document goes through the kernel by itself, and nothing is computed between documents. Documents
that a window or ALiBi's biases need a mask for go through it some queries at a time, with the keys that one of these
sees: of T tokens and a window w the time grows with T * w. Their masks are made in the backward pass again. A sink is
one more term in the denominator of the softmax, whose value is 0: with l the logarithm of that denominator and s the
sink, l' = ln(e^l + e^s) and o' = o * e^(l - l') are what the kernel's backward pass reads of a softmax that has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MASKED_QUERIES = 128
"""Queries whose mask is there at once: (1, 128, w + 127) fp32, or ALiBi's biases (H, 128, S)."""

_ALL = 2**62
"""A window that no row outgrows."""

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

    window: int | None = None
    """Keys that a query sees at most, itself among them, where it is causal; None: all."""


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
    window = _ALL if plan.window is None else plan.window
    mixed: Tensor = _attend(
        query, key, value, plan.queries, plan.keys, window if plan.causal else None, plan.slopes, sink
    )[0]
    return mixed


@dataclass(frozen=True, slots=True)
class _Piece:
    """What goes through the kernel at once."""

    rows: slice
    queries: slice
    keys: slice
    masked: bool
    """Whether the kernel does not find out by itself what is seen."""

    def asking(self, x: Tensor) -> Tensor:
        """Of (B, H, T, ...) the queries."""
        return x[self.rows, :, self.queries]

    def asked(self, x: Tensor) -> Tensor:
        """Of (B, H, S, ...) the keys."""
        return x[self.rows, :, self.keys]

    def options(self, window: int | None, slopes: Tensor | None, like: Tensor) -> dict[str, Any]:
        """What tells the kernel who is seen."""
        if window is None or not self.masked:
            return {"is_causal": window is not None, "attn_mask": None}
        return {"is_causal": False, "attn_mask": self.mask(window, slopes, like)}

    def mask(self, window: int, slopes: Tensor | None, like: Tensor) -> Tensor:
        """(1, 1 or H, queries, keys): 0 or -m_h * distance (arXiv 2108.12409), minus infinity where a query does not
        look."""
        query = torch.arange(self.queries.start, self.queries.stop, device=like.device)
        distance = query[:, None] - torch.arange(self.keys.start, self.keys.stop, device=like.device)
        seen = (distance >= 0) & (distance < window)
        slopes = like.new_zeros(1) if slopes is None else slopes.to(like.dtype)
        return torch.where(seen, -slopes[:, None, None] * distance, -torch.inf)[None]


def _pieces(queries: Tensor, keys: Tensor, window: int | None, biased: bool) -> Iterator[_Piece]:
    """Each document of each row; of those that need a mask some queries at a time."""
    for rows, asking, asked in _documents(queries, keys):
        tokens = asked.stop - asked.start
        if window is None or (tokens <= window and not biased):
            yield _Piece(rows, asking, asked, masked=False)
            continue
        for begin in range(asking.start, asking.stop, MASKED_QUERIES):
            end = min(begin + MASKED_QUERIES, asking.stop)
            yield _Piece(rows, slice(begin, end), slice(max(asked.start, begin - window + 1), end), masked=True)


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
    window: int | None,
    slopes: Tensor | None,
    sink: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The result and the logarithm of each denominator: (B, H, T, E) and (B, H, T). Without a window (None) all see
    all of their document."""
    query, key, value = _dense(query), _dense(key), _dense(value)
    mixed, total = _empty(query)
    if window is None:
        mixed.zero_()
        total.fill_(-torch.inf)
    for piece in _pieces(queries, keys, window, slopes is not None):
        asking, asked = piece.asking(query), (piece.asked(key), piece.asked(value))
        found, logarithm = _kernel(asking, *asked, **piece.options(window, slopes, total))
        piece.asking(mixed).copy_(found)
        piece.asking(total).copy_(logarithm)
    if sink is not None:
        with_sink = torch.logaddexp(total, sink[:, None])
        mixed *= (total - with_sink).exp()[..., None].to(mixed.dtype)
        total = with_sink
    return mixed, total


@torch.library.custom_op("solomonov::attend_documents_backward", mutates_args=())
def _backward(
    gradient: Tensor, kept: Sequence[Tensor], window: int | None, slopes: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values; `kept` are the first five arguments of `_attend` and what it gave."""
    query, key, value, queries, keys, mixed, total = kept
    gradient, query, key, value = _dense(gradient), _dense(query), _dense(key), _dense(value)
    # With masks a key gets its gradient in several sums.
    masked = slopes is not None or (window is not None and window < key.shape[2])
    dtype = total.dtype if masked else query.dtype
    of_query, of_key, of_value = (torch.zeros_like(x, dtype=dtype) for x in (query, key, value))
    for piece in _pieces(queries, keys, window, slopes is not None):
        asking = piece.asking(query), piece.asked(key), piece.asked(value), piece.asking(mixed), piece.asking(total)
        options = piece.options(window, slopes, total)
        found = _kernel_backward(piece.asking(gradient), *asking, dropout_p=0.0, **options)
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
    *tensors, ctx.window, slopes, sink = inputs
    ctx.save_for_backward(*tensors, slopes, sink, *output)


def _gradients(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, slopes, sink, mixed, total = ctx.saved_tensors
    found = _backward(gradient, [*inputs, mixed, total], ctx.window, slopes)
    of_sink = None
    if sink is not None:
        of_softmax = (gradient.to(total.dtype) * mixed.to(total.dtype)).sum(dim=-1)
        of_sink = -((sink[:, None] - total).exp() * of_softmax).sum(dim=(0, 2))
    return (*found, None, None, None, None, of_sink)


_attend.register_autograd(_gradients, setup_context=_keep)

attend_documents = torch.ops.solomonov.attend_documents.default
"""The operation, as what counts operations meets it: it keeps its result and a number a head and query."""
