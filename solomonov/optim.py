"""The optimizer: which parameters form which group, and the object that DeepSpeed is given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from solomonov.config import OptimizerConfig

NO_DECAY_SUFFIXES = ("norm.weight", "embedding.weight")
"""Names with these endings do not decay: norm gains, one value a channel, and the embedding, a table of which a step
touches few rows (decay would pull the rare ones to 0). All other parameters are matrices and decay."""


def parameter_groups(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], optimizer: OptimizerConfig
) -> list[dict[str, Any]]:
    """Sort canonical names into decaying and not decaying groups; every parameter is in exactly one."""
    decay: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for name, parameter in parameters:
        (plain if name.endswith(NO_DECAY_SUFFIXES) else decay).append(parameter)
    groups = [
        {"params": decay, "weight_decay": optimizer.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    parameters: Iterable[tuple[str, torch.nn.Parameter]], optimizer: OptimizerConfig, *, fused: bool
) -> torch.optim.Optimizer:
    """AdamW over `parameters` (canonical name, parameter).

    Args:
        fused: use the fused CUDA kernel.
    """
    return torch.optim.AdamW(
        parameter_groups(parameters, optimizer),
        lr=optimizer.lr,
        betas=optimizer.betas,
        eps=optimizer.eps,
        fused=fused,
    )
