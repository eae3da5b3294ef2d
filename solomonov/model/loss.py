"""Next-token cross-entropy, in chunks of tokens so that the logits of all positions never exist at once."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED_LABEL = -100
"""Label of a position at which nothing is predicted."""

CHUNK_TOKENS = 4096
"""Tokens whose logits exist together: 4,096 x 32,768 of them are 512 MiB in fp32."""


def cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_tokens: int = CHUNK_TOKENS) -> Tensor:
    """Sum of -ln softmax(hidden @ weight^T)[label] over all labels that count.

    With more than one chunk each chunk's logits are computed again in the backward pass instead of kept.

    Args:
        hidden: (..., D) final hidden states.
        weight: (V, D) of the head.
        labels: (...) integers, -100 where nothing is predicted. Without any other, loss and gradients are 0.

    Returns:
        fp32 scalar, a sum: the caller divides by the number of labels of the whole batch.
    """
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).long()
    tokens = targets.shape[0]
    if tokens <= chunk_tokens:
        return _chunk_loss(flat, weight, targets)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for begin in range(0, tokens, chunk_tokens):
        chunk = slice(begin, begin + chunk_tokens)
        if torch.is_grad_enabled():
            part = checkpoint(
                _chunk_loss,
                flat[chunk],
                weight,
                targets[chunk],
                use_reentrant=False,
                preserve_rng_state=False,
            )
        else:
            part = _chunk_loss(flat[chunk], weight, targets[chunk])
        total = total + part
    return total


def pipeline_loss(outputs: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
    """`cross_entropy_sum` of what the last pipeline stage returns: (hidden (B, T, D), head weight (V, D))."""
    hidden, weight = outputs
    return cross_entropy_sum(hidden, weight, labels)


def _chunk_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = functional.linear(hidden, weight).float()
    return functional.cross_entropy(logits, targets, ignore_index=IGNORED_LABEL, reduction="sum")
