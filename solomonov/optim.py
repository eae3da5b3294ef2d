"""The optimizer: which parameters form which group, and the object that DeepSpeed is given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from solomonov.config import OptimizerConfig
from solomonov.model.config import ModelConfig
from solomonov.model.counts import parameter_shapes
from solomonov.model.naming import is_hidden_matrix
from solomonov.model.parameterization import Factors
from solomonov.model.parameterization import factors as factors_of
from solomonov.partition import parameter_shape


def parameter_groups(
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    optimizer: OptimizerConfig,
    model: ModelConfig,
    *,
    fill: bool = False,
) -> list[dict[str, Any]]:
    """Sort parameters into groups by the table of `model.parameterization`; every parameter is in exactly one.

    A group has its `weight_decay` and `eps`; `muon`, whether Muon updates it; and `lr_scale`, its learning rate over
    the schedule's.

    Args:
        parameters: (canonical name, parameter).
        fill: put one value, of no use and always 0, into a group without parameters. DeepSpeed reduces the norm over
            the stages of a pipeline group by group, and would wait for ever for a stage that has fewer groups.
    """
    everywhere = {_key(name, shape, optimizer, model) for name, shape in parameter_shapes(model, 1).items()}
    groups: dict[tuple[bool, Factors], list[torch.nn.Parameter]] = {
        key: [] for key in sorted(everywhere, key=lambda key: (not key[0], -key[1].decay, key[1].lr, key[1].eps))
    }
    for name, parameter in parameters:
        groups[_key(name, parameter_shape(parameter), optimizer, model)].append(parameter)
    if fill:
        groups = {key: held or [torch.nn.Parameter(torch.zeros(1))] for key, held in groups.items()}
    other = (optimizer.adamw_lr or optimizer.lr) / optimizer.lr if optimizer.kind == "muon" else 1.0
    return [
        {
            "params": held,
            "weight_decay": optimizer.weight_decay * factors.decay,
            "eps": optimizer.eps * factors.eps,
            "muon": muon,
            "lr_scale": factors.lr * (1.0 if muon else other),
        }
        for (muon, factors), held in groups.items()
        if held
    ]


def _key(name: str, shape: Sequence[int], optimizer: OptimizerConfig, model: ModelConfig) -> tuple[bool, Factors]:
    """What makes a group: whether Muon updates it, and its factors."""
    muon = optimizer.kind == "muon" and is_hidden_matrix(name, shape)
    return muon, factors_of(name, model, muon=muon)


def make_optimizer(
    parameters: Iterable[tuple[str, torch.nn.Parameter]],
    optimizer: OptimizerConfig,
    model: ModelConfig,
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
        parameter_groups(parameters, optimizer, model, fill=fill),
        lr=optimizer.lr,
        betas=optimizer.betas,
        eps=optimizer.eps,
        fused=fused,
    )
