"""The optimizer: which parameters form which group, and the object that DeepSpeed is given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from solomonov.config import OptimizerConfig
from solomonov.model.naming import is_hidden_matrix
from solomonov.partition import parameter_shape

NO_DECAY_SUFFIXES = ("norm.weight", "embedding.weight", ".bias", "_scale", ".sink")
"""Names with these endings do not decay: norm gains, biases and branch scales, one value a channel, what is one number
a head or a branch, and the embedding, a table of which a step touches few rows (decay would pull the rare ones to 0).
All other parameters are matrices and decay."""


def parameter_groups(
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    optimizer: OptimizerConfig,
    *,
    fill: bool = False,
) -> list[dict[str, Any]]:
    """Sort canonical names into groups; every parameter is in exactly one.

    A group has its `weight_decay`; `muon`, whether Muon updates it; and `lr_scale`, its learning rate over the
    schedule's.

    Args:
        fill: put one value, of no use and always 0, into a group without parameters. DeepSpeed reduces the norm over
            the stages of a pipeline group by group, and would wait for ever for a stage that has fewer groups.
    """
    muon: list[torch.nn.Parameter] = []
    decay: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for name, parameter in parameters:
        if optimizer.kind == "muon" and is_hidden_matrix(name, parameter_shape(parameter)):
            muon.append(parameter)
        else:
            (plain if name.endswith(NO_DECAY_SUFFIXES) else decay).append(parameter)
    scale = (optimizer.adamw_lr or optimizer.lr) / optimizer.lr if optimizer.kind == "muon" else 1.0
    groups = [
        {"params": muon, "weight_decay": optimizer.weight_decay, "muon": True, "lr_scale": 1.0},
        {"params": decay, "weight_decay": optimizer.weight_decay, "muon": False, "lr_scale": scale},
        {"params": plain, "weight_decay": 0.0, "muon": False, "lr_scale": scale},
    ]
    if fill:
        wanted = [group for group in groups if optimizer.kind == "muon" or not group["muon"]]
        for group in wanted:
            group["params"] = group["params"] or [torch.nn.Parameter(torch.zeros(1))]
        return wanted
    return [group for group in groups if group["params"]]


def make_optimizer(
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    optimizer: OptimizerConfig,
    *,
    fused: bool,
    fill: bool = False,
) -> torch.optim.Optimizer:
    """AdamW over `parameters` (canonical name, parameter), some of whose groups may be marked for Muon.

    Args:
        fused: use the fused CUDA kernel.
        fill: as `parameter_groups` takes it.
    """
    return torch.optim.AdamW(
        parameter_groups(parameters, optimizer, fill=fill),
        lr=optimizer.lr,
        betas=optimizer.betas,
        eps=optimizer.eps,
        fused=fused,
    )
