"""Names of layers and parameters: ours (canonical), and those that DeepSpeed and torch.compile make of them.

Checkpoints, parameter groups, logs and exports know canonical names only: ``layers.3.attention.q.weight``.
A pipeline of DeepSpeed numbers its layers instead (``4.attention.q.weight``) and keeps what two stages share
under ``tied_modules.KEY``; wrappers put ``module.`` in front, and a compiled module ``_orig_mod.`` within.
"""

from __future__ import annotations

from collections.abc import Sequence

from solomonov.model.config import ModelConfig
from solomonov.model.residual import has_final_norm
from solomonov.model.stacks import block_number, stacks_of

TIED_LAYERS = ("embedding", "head")
"""The layers that share one matrix when embeddings are tied; the first gives it its name."""

_HEADS_OWN = ("bias", "transform")
"""What a head has beside the matrix, also where that is tied, and an embedding has not."""

_TIED = "tied_modules."
_WRAPPERS = frozenset({"module", "_orig_mod"})


def layer_names(config: ModelConfig) -> list[str]:
    """Names of the layers in order: front (where it is not tokens that the first stack reads), embedding (where any
    stack reads some), layers.0 .. layers.(L-1), final_norm (but where the last block ends in a norm of its own), head;
    of an encoder_decoder those of the encoder, as encoder.layers.0, before those of the decoder."""
    names = [] if config.front.kind == "tokens" else ["front"]
    names += ["embedding"] if config.reads_tokens else []
    for stack in stacks_of(config):
        names += [f"{stack.prefix}layers.{index}" for index in range(stack.layers)]
        names += [f"{stack.prefix}final_norm"] if has_final_norm(config, stack) else []
    return [*names, "head"]


def canonical(name: str, layers: Sequence[str]) -> str:
    """Our name of a parameter, whatever wrapped it.

    Args:
        name: a name as `named_parameters` gives it: ours, a pipeline's, with or without wrappers.
        layers: the names of all layers in order (`layer_names`), also of those on other stages.

    Raises:
        ValueError: no layer of this model has such a parameter.
    """
    bare = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    if bare.startswith(_TIED):
        embedding, head = TIED_LAYERS
        bare = bare.removeprefix(_TIED)
        if bare.removeprefix(f"{embedding}.").split(".")[0] in _HEADS_OWN:
            bare = head + bare.removeprefix(embedding)
    else:
        index, _, rest = bare.partition(".")
        if index.isdecimal() and int(index) < len(layers):
            bare = f"{layers[int(index)]}.{rest}"
    layer_of(bare, layers)
    return bare


def pipeline_name(name: str, layers: Sequence[str], *, tied: bool) -> str:
    """The name that a DeepSpeed pipeline gives to the parameter we call `name`: the inverse of `canonical`.

    Args:
        name: canonical name.
        layers: the names of all layers in order.
        tied: whether head and embedding share one matrix, which then is a tied module.

    Raises:
        ValueError: no layer has such a parameter, or it is the head's name of a tied matrix.
    """
    layer = layer_of(name, layers)
    if tied and layer in TIED_LAYERS:
        inside = name.removeprefix(f"{layer}.")
        if layer != TIED_LAYERS[0] and inside.split(".")[0] not in _HEADS_OWN:
            raise ValueError(f"{name!r} is tied: its name is that of {TIED_LAYERS[0]!r}")
        return f"{_TIED}{TIED_LAYERS[0]}.{inside}"
    return f"{layers.index(layer)}.{name[len(layer) + 1 :]}"


def layer_of(name: str, layers: Sequence[str]) -> str:
    """The layer that the canonical parameter `name` belongs to.

    Args:
        layers: the names of all layers.

    Raises:
        ValueError: no layer has such a parameter.
    """
    parts = name.split(".")
    for size in (1, 2, 3):
        layer = ".".join(parts[:size])
        if len(parts) > size and all(parts) and layer in layers:
            return layer
    raise ValueError(f"no layer of this model has a parameter {name!r}")


def is_hidden_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter is a matrix between embedding and head: those map features to features, while the rows of
    embedding and head belong to single tokens."""
    return block_number(name) is not None and len(shape) == 2
