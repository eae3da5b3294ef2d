"""Next-token cross-entropy and z-loss, in chunks of tokens so that the logits of all positions never exist at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED_LABEL = -100
"""Label of a position at which nothing is predicted."""

CHUNK_TOKENS = 4096
"""Tokens whose logits exist together: 4,096 x 32,768 of them are 512 MiB in fp32."""


def cross_entropy_sum(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """Sum of -ln softmax(hidden @ weight^T + bias)[label] over all labels that count.

    With more than one chunk each chunk's logits are computed again in the backward pass instead of kept.

    Args:
        hidden: (..., D) final hidden states.
        weight: (V, D) of the head.
        labels: (...) integers, -100 where nothing is predicted. Without any other, loss and gradients are 0.
        bias: (V,) of the head; None: it has none.

    Returns:
        fp32 scalar, a sum: the caller divides by the number of labels of the whole batch.
    """
    return _in_chunks(_chunk_loss, hidden, weight, labels, bias, chunk_tokens)


def cross_entropy_and_z_sums(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, *, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """`cross_entropy_sum`, and the sum of ln^2 Z over the same labels, with Z the sum of exp of a position's logits.

    A small multiple of the mean of ln^2 Z, added to the loss, keeps the logits from drifting away together, which the
    cross-entropy does not feel. Source: PaLM (arXiv 2204.02311), section 5, with coefficient 1e-4.

    Args:
        hidden, weight, labels, bias: as of `cross_entropy_sum`.

    Returns:
        (2,) fp32: the sum of the cross-entropy in nats, and that of ln^2 Z.
    """
    return _in_chunks(_chunk_loss_and_z, hidden, weight, labels, bias, chunk_tokens)


def pipeline_loss(outputs: tuple[Tensor, ...], labels: Tensor, *, with_z: bool = False) -> Tensor:
    """The loss of what the last pipeline stage returns: hidden (B, T, D), head weight (V, D), and its bias (V,) where
    it has one.

    Returns:
        `cross_entropy_sum`, or with `with_z` `cross_entropy_and_z_sums`.
    """
    hidden, weight, *bias = outputs
    return (cross_entropy_and_z_sums if with_z else cross_entropy_sum)(hidden, weight, labels, *bias)


def _in_chunks(
    of_chunk: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    chunk_tokens: int,
) -> Tensor:
    """The sum of `of_chunk(hidden, weight, targets, bias)` over chunks, each computed again in the backward pass."""
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).long()
    tokens = targets.shape[0]
    if tokens <= chunk_tokens:
        return of_chunk(flat, weight, targets, bias)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for begin in range(0, tokens, chunk_tokens):
        chunk = slice(begin, begin + chunk_tokens)
        if torch.is_grad_enabled():
            part = checkpoint(
                of_chunk,
                flat[chunk],
                weight,
                targets[chunk],
                bias,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        else:
            part = of_chunk(flat[chunk], weight, targets[chunk], bias)
        total = total + part
    return total


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(tokens, V) fp32."""
    logits = functional.linear(hidden, weight).float()
    # Out of place: in fp32 the product itself is what DeepSpeed keeps.
    return logits if bias is None else logits + bias.float()


def _chunk_loss(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    logits = _logits(hidden, weight, bias)
    return functional.cross_entropy(logits, targets, ignore_index=IGNORED_LABEL, reduction="sum")


def _chunk_loss_and_z(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
    logits = _logits(hidden, weight, bias)
    counts = targets != IGNORED_LABEL
    log_z = torch.logsumexp(logits, dim=-1).where(counts, 0.0)
    chosen = logits.gather(-1, targets.where(counts, 0)[:, None])[:, 0].where(counts, 0.0)
    return torch.stack([(log_z - chosen).sum(), log_z.square().sum()])
