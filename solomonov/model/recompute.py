"""Activation checkpointing: what a block keeps for the backward pass, and what is computed again instead.

`full` keeps the input of each group of `every` consecutive blocks and runs the group again: each block runs forward
twice, whatever the groups are. Of L blocks L / every inputs and the insides of `every` blocks are there at once, which
is O(sqrt(L)) where every is of the order of sqrt(L) (arXiv 1604.06174), and least at sqrt(L / a) where the insides of a
block are a times its input (25 to 40: groups are for a hundred blocks and more). `selective` keeps what is dear to
compute for its size, the products with weights and the attention's result, and computes norms, rotations, activations,
sums and the attention's weights again (arXiv 2205.05198).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from solomonov.model.packed import attend_documents

T = TypeVar("T")

_aten = torch.ops.aten
_PRODUCTS = frozenset({_aten.mm.default, _aten.addmm.default})
"""Products with a weight. Those of attention without a kernel of its own are `bmm`: their T x T scores are what is
largest and cheap to compute again."""
_ATTENTION = frozenset(
    {
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        attend_documents,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.higher_order.flex_attention,
    }
)
"""Each keeps its result and a number a row, never the scores."""


class _Policy:
    """Which results of one forward pass of a block are kept."""

    def __init__(self, products: int) -> None:
        self._left = products

    def __call__(self, context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operation in _PRODUCTS:
            self._left -= 1
            # The last product goes into the block's own output only, and no gradient is computed from its result.
            return CheckpointPolicy.MUST_SAVE if self._left > 0 else CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.MUST_SAVE if operation in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts(products: int) -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_Policy(products))  # type: ignore[no-untyped-call,no-any-return]


def keeping_products(function: Callable[..., T], *args: Any, products: int) -> T:
    """function(*args), of which only the products with weights and the attention's result are kept.

    Args:
        products: how many products with weights the function computes, of which the last leads to its result only.
    """
    context = partial(_contexts, products)
    return checkpoint(  # type: ignore[no-any-return]
        function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=context
    )


def in_groups(layers: Sequence[Callable[[T], T]], carry: T, every: int) -> T:
    """What the layers make of `carry` one after the other; of each `every` of them only the input is kept."""
    for begin in range(0, len(layers), every):
        group = layers[begin : begin + every]
        carry = checkpoint(in_turn, group, carry, use_reentrant=False, preserve_rng_state=False)
    return carry


def in_turn(layers: Sequence[Callable[[T], T]], carry: T) -> T:
    """What the layers make of `carry` one after the other."""
    for layer in layers:
        carry = layer(carry)
    return carry
