"""How a branch is added to the stream: one general form, and what each mode makes of it. Imports no torch.

    x' = norm_post(alpha * x + s * norm_out(f(c * norm_pre(x))))

| mode       | norm_pre | norm_out | norm_post    | alpha      | s               | c         | initial values         |
|------------|----------|----------|--------------|------------|-----------------|-----------|------------------------|
| postnorm   |          |          | yes          | 1          | 1               | 1         | plain                  |
| prenorm    | yes      |          |              | 1          | 1               | 1         | out, down / sqrt(N)    |
| scaled     | yes      |          |              | 1          | base_layers / L | 1         | plain                  |
| lns        | yes      |          |              | 1          | 1               | 1/sqrt(l) | plain                  |
| layerscale | yes      |          |              | 1          | learned, D      | 1         | plain                  |
| rezero     | yes      |          |              | 1          | learned, 1      | 1         | plain                  |
| peri       | yes      | yes      |              | 1          | 1               | 1         | plain                  |
| outnorm    |          | yes      |              | 1          | 1               | 1         | plain                  |
| deepnorm   |          |          | yes          | N^(1/4)    | 1               | 1         | v, out, up, down: beta |
| keel       | yes      |          | from layer 2 | N          | 1               | 1         | plain                  |

A stack of L layers, of which l is the number from 1, has N branches: 2L, with cross-attention 3L. `plain` is a standard
deviation of 1/sqrt(inputs), beta (4N)^(-1/4). DeepNorm's encoder before a decoder has constants of its own, see
`deepnorm_constants`. Two switches stack on each mode: `model.value_residual`, within attention, and
`model.stochastic_depth`, one more factor of s (`stochastic_depth`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Literal, get_args

from solomonov.model.stacks import Stack, stacks_of

if TYPE_CHECKING:
    from solomonov.model.config import ModelConfig

ResidualMode = Literal[
    "postnorm", "prenorm", "scaled", "lns", "layerscale", "rezero", "peri", "outnorm", "deepnorm", "keel"
]
MODES: tuple[ResidualMode, ...] = get_args(ResidualMode)


@dataclass(frozen=True)
class BranchForm:
    """The general form as one layer has it, for all of its branches."""

    pre: bool = True
    """Whether the branch reads a normed stream."""
    out: bool = False
    """Whether what the branch gives is normed."""
    post: bool = False
    """Whether the sum is normed."""
    alpha: float = 1.0
    """Factor of the stream."""
    scale: float = 1.0
    """s, where it is fixed."""
    learned: Literal["none", "channel", "scalar"] = "none"
    """Whether s is a parameter: one a channel, or one number."""
    inner: float = 1.0
    """c, factor of what the branch reads."""


def branch_form(config: ModelConfig, layer: int, stack: Stack | None = None) -> BranchForm:
    """What the branches of a layer are in the general form.

    Sources: Post-LN arXiv 1706.03762; Pre-LN 2002.04745; `scaled` is CompleteP, 2505.01618, with alpha = 1; LayerNorm
    scaling 2502.05795; LayerScale 2103.17239; ReZero 2003.04887, here with the norm that the branch keeps elsewhere;
    Peri-LN 2502.02732; output norms alone as in OLMo 2, 2501.00656, section 3.3; DeepNorm 2203.00555; Keel 2601.19895,
    whose first block has no outer norm, and here no alpha either: that would make the second block's branch worth 1/N^2
    of the stream.

    Args:
        layer: its number in its stack, from 0.
        stack: which one; None: the last.
    """
    stack = stacks_of(config)[-1] if stack is None else stack
    forms: dict[ResidualMode, BranchForm] = {
        "postnorm": BranchForm(pre=False, post=True),
        "prenorm": BranchForm(),
        "scaled": BranchForm(scale=min(1.0, config.base_layers / stack.layers)),
        "lns": BranchForm(inner=1.0 / sqrt(layer + 1)),
        "layerscale": BranchForm(learned="channel"),
        "rezero": BranchForm(learned="scalar"),
        "peri": BranchForm(out=True),
        "outnorm": BranchForm(pre=False, out=True),
        "deepnorm": BranchForm(pre=False, post=True, alpha=deepnorm_constants(config, stack)[0]),
        "keel": BranchForm(post=True, alpha=float(stack.sublayers)) if layer else BranchForm(),
    }
    return forms[config.residual_mode]


def deepnorm_constants(config: ModelConfig, stack: Stack) -> tuple[float, float]:
    """(alpha, beta) of a stack (arXiv 2203.00555, figure 2): N^(1/4) and (4N)^(-1/4) for one of N branches, and for an
    encoder of E layers before a decoder of M 0.81 (E^4 M)^(1/16) and 0.87 (E^4 M)^(-1/16)."""
    decoder = stacks_of(config)[-1]
    if stack.causal or not decoder.crossed:
        return sqrt(sqrt(stack.sublayers)), 1.0 / sqrt(sqrt(4 * stack.sublayers))
    size = (stack.layers**4 * decoder.layers) ** (1 / 16)
    return 0.81 * size, 0.87 / size


def has_final_norm(config: ModelConfig, stack: Stack | None = None) -> bool:
    """Whether a norm stands behind the last block of a stack (None: the last one): where that does not end in one."""
    stack = stacks_of(config)[-1] if stack is None else stack
    return not branch_form(config, stack.layers - 1, stack).post


def learned_scale_start(config: ModelConfig, stack: Stack) -> float:
    """With which value a learned s starts: 0 (ReZero), and for LayerScale 0.1 up to 18 layers, 1e-5 up to 24, 1e-6
    beyond (CaiT, arXiv 2103.17239, section 3)."""
    if config.residual_mode == "rezero":
        return 0.0
    if stack.layers <= 18:
        return 0.1
    return 1e-5 if stack.layers <= 24 else 1e-6


VALUE_MIX_START = 0.5
"""With which value lam1 and lam2 of a value residual start, as ResFormer's with learned ones do (arXiv 2410.17897):
the mean of the two. V and V_1, of size 1 and drawn independently, make values of size 0.7 of it."""


def mixes_values(config: ModelConfig, layer: int) -> bool:
    """Whether a block, by its number from 0 in its stack, adds the values of the first one to its own."""
    return config.value_residual and layer > 0


def branch_gain(config: ModelConfig, stack: Stack) -> float:
    """Factor on the initial values of out and down (deepnorm: of v and up as well): 1, but for prenorm 1/sqrt(N), so
    that N branches add up to the size of one (GPT-2 report, section 2.3), and for deepnorm beta."""
    if config.residual_mode == "prenorm":
        return 1.0 / sqrt(stack.sublayers)
    return deepnorm_constants(config, stack)[1] if config.residual_mode == "deepnorm" else 1.0
