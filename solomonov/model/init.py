"""Initial values: each tensor is drawn from its own generator, keyed by the seed and its canonical name.

So the numbers do not depend on ranks, stages, or the order in which modules are built.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
import xxhash
from torch import Tensor, nn

from solomonov.model.config import ModelConfig
from solomonov.model.positions import log_scale_start
from solomonov.model.residual import branch_gain, learned_scale_start


@dataclass(frozen=True)
class InitRule:
    """One row of the table: parameters whose whole name matches start as N(0, std^2), or all as one number."""

    pattern: str
    std: Callable[[ModelConfig, int], float] | None
    """From the configuration and the number of inputs of the matrix; None: all are `constant`."""
    constant: Callable[[ModelConfig], float] = lambda config: 1.0
    """The number that all values are, from the configuration."""


def _branch_output_std(config: ModelConfig, fan_in: int) -> float:
    """1/sqrt(inputs) times what the residual form asks for, see `residual.branch_gain`."""
    return branch_gain(config) / sqrt(fan_in)


def _deepnorm_std(config: ModelConfig, fan_in: int) -> float:
    """1/sqrt(inputs), and in deepnorm smaller by beta, as v, out and both matrices of its feed-forward are (arXiv
    2203.00555, figure 2). A gate, which that has not, stays as it is: the branch is of beta^2 either way."""
    gain = branch_gain(config) if config.residual_mode == "deepnorm" else 1.0
    return gain / sqrt(fan_in)


def _embedding_std(config: ModelConfig, fan_in: int) -> float:
    """1, the size of what the branches add; as a head too (tied), 1/sqrt(D), so that logits start at size 1.

    After 180 steps (lr 3e-3) of a 36-layer `scaled` model on source text, held-out loss was 5.39 with 0.02 and
    5.01 with 1.
    """
    return 1.0 / sqrt(fan_in) if config.tie_embeddings else 1.0


INIT_TABLE: tuple[InitRule, ...] = (
    InitRule(r"embedding\.weight", _embedding_std),
    InitRule(r"head\.weight", lambda config, fan_in: 1.0 / sqrt(fan_in)),
    InitRule(r"layers\.\d+\.(attention\.[qk]|feed_forward\.gate)\.weight", lambda config, fan_in: 1.0 / sqrt(fan_in)),
    InitRule(r"layers\.\d+\.(attention\.v|feed_forward\.up)\.weight", _deepnorm_std),
    InitRule(r"layers\.\d+\.(attention\.out|feed_forward\.down)\.weight", _branch_output_std),
    InitRule(r"layers\.\d+\.(attention|feed_forward)_(out_|post_)?norm\.weight", None),
    InitRule(r"layers\.\d+\.(attention|feed_forward)_(out_|post_)?norm\.bias", None, lambda config: 0.0),
    InitRule(r"layers\.\d+\.(attention|feed_forward)_scale", None, learned_scale_start),
    InitRule(r"layers\.\d+\.attention\.[qk]_norm\.weight", None),
    # A gate starts at sigmoid(2) = 0.88 for every token, near to none; a sink weighs as much as one key of logit 0.
    InitRule(r"layers\.\d+\.attention\.gate\.weight", None, lambda config: 0.0),
    InitRule(r"layers\.\d+\.attention\.gate\.bias", None, lambda config: 2.0),
    InitRule(r"layers\.\d+\.attention\.log_scale", None, lambda config: log_scale_start(config.attention.row_tokens)),
    InitRule(r"layers\.\d+\.attention\.sink", None, lambda config: 0.0),
    InitRule(r"final_norm\.weight", None),
    InitRule(r"final_norm\.bias", None, lambda config: 0.0),
)
"""Every parameter matches exactly one row. A layer maps inputs of size about 1 to outputs of size about 1."""


def init_rule(name: str) -> InitRule:
    """The row of the table for one parameter.

    Raises:
        ValueError: no row matches, or more than one.
    """
    rules = [rule for rule in INIT_TABLE if re.fullmatch(rule.pattern, name)]
    if len(rules) != 1:
        raise ValueError(f"{len(rules)} rows of the init table match the parameter {name!r}: exactly one must")
    return rules[0]


def initial_value(name: str, shape: Sequence[int], config: ModelConfig, seed: int) -> Tensor:
    """The fp32 tensor on CPU with which the parameter `name` starts: a function of its arguments alone."""
    rule = init_rule(name)
    if rule.std is None:
        return torch.full(tuple(shape), rule.constant(config))
    generator = torch.Generator()
    generator.manual_seed(xxhash.xxh3_64_intdigest(f"{seed}/{name}".encode()))
    return torch.randn(tuple(shape), generator=generator) * rule.std(config, shape[-1])


def initialise(module: nn.Module, config: ModelConfig, seed: int, *, prefix: str = "") -> None:
    """Fill all parameters of `module`, whose canonical names are `prefix` + their name in the module."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(initial_value(prefix + name, parameter.shape, config, seed))
