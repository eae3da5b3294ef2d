"""One table: which values a parameter starts with, and by what its learning rate, weight decay and eps are multiplied.

`model.parameterization` says how these follow the width D and the depth L, so that what was found on a small model of
width base_d_model and depth base_layers holds for a large one. With n = D / base_d_model and l = L / base_layers, L
of the stack that the parameter belongs to:

| kind of parameter                | values     | sp      | mup              | completep        |
|----------------------------------|------------|---------|------------------|------------------|
|                                  | std        | lr, eps | lr, decay, eps   | lr, decay, eps   |
| embedding, learned positions     | 1          | 1, 1    | 1, -, 1/n        | 1, -, 1/n        |
| hidden matrix, by AdamW          | 1/sqrt(in) | 1, 1    | 1/n, n, 1/n      | 1/n, n, 1/(n l)  |
| hidden matrix, by Muon           | 1/sqrt(in) | 1       | 1/sqrt n, sqrt n | 1/sqrt n, sqrt n |
| gain, bias, number a head, scale | constant   | 1, 1    | 1, -, 1/n        | 1, -, 1/(n l)    |
| the same outside the blocks      | constant   | 1, 1    | 1, -, 1/n        | 1, -, 1/n        |
| the head's transform             | 1/sqrt(in) | 1, 1    | 1/n, n, 1/n      | 1/n, n, 1/n      |
| first matrix of a front          | 1/sqrt(in) | 1, 1    | 1, 1, 1/n        | 1, 1, 1/n        |
| second matrix of a front         | g/sqrt(in) | 1, 1    | 1/n, n, 1/n      | 1/n, n, 1/n      |
| head                             | 1/sqrt(in) | 1, 1    | 1/n, n, 1        | 1/n, n, 1        |

`-` does not decay. A front's matrices that a GELU follows have values times g = 1.468, so that sizes stay at 1. A
head's values are over sqrt n in mup and completep. The branches of completep have s = 1/l (`residual: scaled`). F must
follow D, and the width of a head stay as it is.

Sources: mup arXiv 2203.03466, table 8; completep arXiv 2505.01618, table 1 with alpha = 1, where the hidden rate is
free of the depth. There the head's logits are divided by n and its values and rate are those of the base: with Adam
that is the same as values and rate over n and its decay times n, and needs no factor in the model that exports would
carry. Muon (with updates of AdamW's size, 0.2 sqrt(max(in, out))): a square matrix's update has the spectral norm 0.2
lr sqrt(D), and what keeps that as the width grows is lr / sqrt n; the decay's product with the rate stays.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Literal

from solomonov.model.positions import log_scale_start
from solomonov.model.residual import VALUE_MIX_START, branch_gain, learned_scale_start
from solomonov.model.stacks import Stack, stack_of

if TYPE_CHECKING:
    from solomonov.model.config import ModelConfig

Kind = Literal["embedding", "input", "hidden", "outer hidden", "vector", "outer vector", "head"]


@dataclass(frozen=True)
class Row:
    """One row of the table: parameters whose whole name matches start as N(0, std^2), or all as one number."""

    pattern: str
    kind: Kind
    """How it follows width and depth. `vector`: in a block, one value a channel, head or branch. `input`: a matrix
    whose inputs do not get wider; `outer`: in no block."""
    std: Callable[[ModelConfig, Stack, int], float] | None
    """From the configuration, the stack that it belongs to, and the number of inputs of the matrix; None: all are
    `constant`."""
    constant: Callable[[ModelConfig, Stack], float] = lambda config, stack: 1.0
    """The number that all values are."""


@dataclass(frozen=True)
class Factors:
    """What the optimizer's constants are multiplied by for one parameter."""

    lr: float = 1.0
    decay: float = 1.0
    """0: it does not decay."""
    eps: float = 1.0


def _plain_std(config: ModelConfig, stack: Stack, fan_in: int) -> float:
    """A matrix that maps inputs of size 1 to outputs of size 1."""
    return 1.0 / sqrt(fan_in)


def _branch_output_std(config: ModelConfig, stack: Stack, fan_in: int) -> float:
    """1/sqrt(inputs) times what the residual form asks for, see `residual.branch_gain`."""
    return branch_gain(config, stack) / sqrt(fan_in)


def _deepnorm_std(config: ModelConfig, stack: Stack, fan_in: int) -> float:
    """1/sqrt(inputs), and in deepnorm smaller by beta, as v, out and both matrices of its feed-forward are (arXiv
    2203.00555, figure 2). A gate, which that has not, stays as it is: the branch is of beta^2 either way."""
    gain = branch_gain(config, stack) if config.residual_mode == "deepnorm" else 1.0
    return gain / sqrt(fan_in)


def _embedding_std(config: ModelConfig, stack: Stack, fan_in: int) -> float:
    """1, the size of what the branches add; as a head too (tied), 1/sqrt(D), so that logits start at size 1.

    After 180 steps (lr 3e-3) of a 36-layer `scaled` model on source text, held-out loss was 5.39 with 0.02 and
    5.01 with 1.
    """
    return 1.0 / sqrt(fan_in) if config.tie_embeddings else 1.0


GELU_GAIN = 1.468
"""Size of what goes into a GELU (by the error function) out of which it comes with size 1: the mean square of gelu(g z)
over normal z is 1."""


def _before_gelu_std(config: ModelConfig, stack: Stack, fan_in: int) -> float:
    """As `_plain_std`, through a GELU behind it."""
    return GELU_GAIN / sqrt(fan_in)


def _head_std(config: ModelConfig, stack: Stack, fan_in: int) -> float:
    """1/sqrt(D), and where the width is accounted for smaller by sqrt(n): 1/n of the base's."""
    return 1.0 / sqrt(fan_in * (1.0 if config.parameterization == "sp" else width_ratio(config)))


def _log_scale(config: ModelConfig, stack: Stack) -> float:
    """Of the length of training."""
    return log_scale_start(config.attention.row_tokens)


def _zero(config: ModelConfig, stack: Stack) -> float:
    """Nothing is added."""
    return 0.0


_BLOCK = r"(encoder\.)?layers\.\d+\."
_ATTENTION = r"(cross_)?attention"
_BRANCH = r"((cross_)?attention|feed_forward)"
_NORM = _BRANCH + r"_(out_|post_)?norm"
_OUTER_NORM = r"((encoder\.)?final_norm|embedding\.norm|head\.transform\.norm)"
TABLE: tuple[Row, ...] = (
    Row(r"embedding\.(weight|positions)", "embedding", _embedding_std),
    Row(r"front\.projection\.weight", "input", _plain_std),
    Row(r"front\.first\.weight", "input", _before_gelu_std),
    Row(r"front\.second\.weight", "outer hidden", _before_gelu_std),
    Row(r"front\.(projection|first|second)\.bias", "outer vector", None, _zero),
    Row(r"head\.weight", "head", _head_std),
    Row(r"head\.transform\.dense\.weight", "outer hidden", _plain_std),
    Row(r"head\.(transform\.dense\.)?bias", "outer vector", None, _zero),
    Row(_BLOCK + rf"({_ATTENTION}\.[qk]|feed_forward\.gate)\.weight", "hidden", _plain_std),
    Row(_BLOCK + rf"({_ATTENTION}\.v|feed_forward\.up)\.weight", "hidden", _deepnorm_std),
    Row(_BLOCK + rf"({_ATTENTION}\.out|feed_forward\.down)\.weight", "hidden", _branch_output_std),
    Row(_BLOCK + rf"({_ATTENTION}\.(q|k|v|out)|feed_forward\.(gate|up|down))\.bias", "vector", None, _zero),
    Row(_BLOCK + _NORM + r"\.weight", "vector", None),
    Row(_BLOCK + _NORM + r"\.bias", "vector", None, _zero),
    Row(_BLOCK + _BRANCH + r"_scale", "vector", None, learned_scale_start),
    Row(_BLOCK + r"attention_value_mix", "vector", None, lambda config, stack: VALUE_MIX_START),
    Row(_BLOCK + _ATTENTION + r"\.[qk]_norm\.weight", "vector", None),
    # A gate starts at sigmoid(2) = 0.88 for every token, near to none; a sink weighs as much as one key of logit 0.
    Row(_BLOCK + _ATTENTION + r"\.gate\.weight", "hidden", None, _zero),
    Row(_BLOCK + _ATTENTION + r"\.gate\.bias", "vector", None, lambda config, stack: 2.0),
    Row(_BLOCK + r"attention\.log_scale", "vector", None, _log_scale),
    Row(_BLOCK + r"attention\.sink", "vector", None, _zero),
    Row(_OUTER_NORM + r"\.weight", "outer vector", None),
    Row(_OUTER_NORM + r"\.bias", "outer vector", None, _zero),
)
"""Every parameter matches exactly one row. A layer maps inputs of size about 1 to outputs of size about 1."""


def row_of(name: str) -> Row:
    """The row of the table for one parameter.

    Args:
        name: canonical name.

    Raises:
        ValueError: no row matches, or more than one.
    """
    rows = [row for row in TABLE if re.fullmatch(row.pattern, name)]
    if len(rows) != 1:
        raise ValueError(
            f"{len(rows)} rows of the parameterization table match the parameter {name!r}: exactly one must"
        )
    return rows[0]


def width_ratio(config: ModelConfig) -> float:
    """n = D / base_d_model; 1 where no base is given."""
    return config.d_model / (config.base_d_model or config.d_model)


def factors(name: str, config: ModelConfig, *, muon: bool = False) -> Factors:
    """What the optimizer's constants are multiplied by for one parameter.

    Args:
        name: canonical name.
        muon: whether Muon updates it, and not AdamW.
    """
    kind = row_of(name).kind
    decays = 1.0 if kind in ("input", "hidden", "outer hidden", "head") else 0.0
    if config.parameterization == "sp":
        return Factors(decay=decays)
    n = width_ratio(config)
    layers = stack_of(config, name).layers
    deep = layers / config.base_layers if config.parameterization == "completep" else 1.0
    if muon:
        return Factors(lr=1.0 / sqrt(n), decay=sqrt(n))
    if kind == "head":
        return Factors(lr=1.0 / n, decay=n)
    if kind in ("hidden", "outer hidden"):
        return Factors(lr=1.0 / n, decay=n, eps=1.0 / (n * deep if kind == "hidden" else n))
    return Factors(decay=decays, eps=1.0 / (n * deep) if kind == "vector" else 1.0 / n)
