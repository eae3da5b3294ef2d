"""Which blocks an update passes by (stochastic depth, arXiv 1603.09382; of whole blocks as LayerDrop, 1909.11556).
Imports no torch.

    x' = norm_post(alpha * x + b / p * s * norm_out(f(c * norm_pre(x)))),  b ~ Bernoulli(p),  1 - p rising with depth

All branches of a block share one b. Where it is 0 none of them is computed: the outer norms and alpha are all that is
left of the block. What is kept is divided by p, so that a branch adds as much on average as in evaluation and
generation, where nothing is dropped and nothing divided.

b is a function of the run's seed, the number of the update and the block's name, and of no generator's state: the same
on every rank and in every stage, for all rows and micro-batches of an update, where a forward pass runs again, and in
a run that was resumed. A parameter of a block that is passed by has the gradient 0, what b * f gives it at b = 0: its
moments and its weight decay as in every update, and one count of updates serves all parameters, however they are
partitioned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

from solomonov.model.stacks import Stack, stacks_of

if TYPE_CHECKING:
    from solomonov.model.config import ModelConfig


def drop_rate(config: ModelConfig, layer: int, stack: Stack | None = None) -> float:
    """1 - p, in which share of the updates a block is passed by: from 0 for the first of its stack in equal steps to
    `model.stochastic_depth` for the last one.

    Args:
        layer: its number in its stack, from 0.
        stack: which one; None: the last.
    """
    stack = stacks_of(config)[-1] if stack is None else stack
    return config.stochastic_depth * layer / max(1, stack.layers - 1)


def drawn_factor(config: ModelConfig, layer: int, stack: Stack, *, seed: int, update: int) -> float:
    """b / p of a block in one update: 0, or 1 / p.

    Args:
        seed: of the run.
        update: how many updates the run has made before this one, those that were skipped among them.
    """
    rate = drop_rate(config, layer, stack)
    number = xxhash.xxh3_64_intdigest(f"{seed}/stochastic_depth/{update}/{stack.prefix}layers.{layer}".encode())
    return 0.0 if number < rate * 2.0**64 else 1.0 / (1.0 - rate)
