"""Initial values: each tensor is drawn from its own generator, keyed by the seed and its canonical name.

So the numbers do not depend on ranks, stages, or the order in which modules are built.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor, nn

from solomonov.model.config import ModelConfig
from solomonov.model.parameterization import row_of
from solomonov.model.stacks import stack_of


def initial_value(name: str, shape: Sequence[int], config: ModelConfig, seed: int) -> Tensor:
    """The fp32 tensor on CPU with which the parameter `name` starts: a function of its arguments alone."""
    row, stack = row_of(name), stack_of(config, name)
    if row.std is None:
        return torch.full(tuple(shape), row.constant(config, stack))
    generator = torch.Generator()
    generator.manual_seed(xxhash.xxh3_64_intdigest(f"{seed}/{name}".encode()))
    return torch.randn(tuple(shape), generator=generator) * row.std(config, stack, shape[-1])


def initialise(module: nn.Module, config: ModelConfig, seed: int, *, prefix: str = "") -> None:
    """Fill all parameters of `module`, whose canonical names are `prefix` + their name in the module."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(initial_value(prefix + name, parameter.shape, config, seed))
