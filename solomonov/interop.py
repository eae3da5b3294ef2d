"""Our weights in the classes of Hugging Face, and theirs in ours: names, and factors that are folded into the weights.

Every fold is exact but for rounding and, where a norm's input is scaled, its eps. What each class can hold stands in
`interop_families`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from solomonov.interop_biased import beside_ours
from solomonov.interop_families import Family, Multipliers
from solomonov.model.config import ModelConfig
from solomonov.model.residual import branch_form
from solomonov.model.stacks import block_number, stack_of

_LAST = ("attention.out", "feed_forward.down")
"""Ends of names of what a branch ends in; that of cross-attention has the first one."""


def folded(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """The weights of a model without factors in its branches with the same logits, but for rounding.

    s * (W x + b) = (s W) x + s b takes a branch's factor, fixed or learned, one number or one a channel, into its last
    matrix and bias, and c * (g * n + b) = (c g) n + c b what the branch reads into its norm. norm(alpha * x + f) =
    norm(x + f / alpha) takes what the stream is multiplied by (arXiv 2203.00555) there as well.

    Args:
        state: canonical name -> tensor of a model whose residual form is in `interop_families.PLAIN_FORM`.
    """
    plain = {}
    for name, tensor in state.items():
        index = block_number(name)
        if index is None:
            plain[name] = tensor
            continue
        stack = stack_of(model, name)
        block = f"{stack.prefix}layers.{index}."
        module = name.removeprefix(block).rpartition(".")[0]
        form = branch_form(model, index, stack)
        scale = state.get(f"{block}{module.partition('.')[0]}_scale")
        if module.endswith(_LAST):
            factor = form.scale / form.alpha if scale is None else scale.view(-1, *[1] * (tensor.dim() - 1))
            plain[name] = factor * tensor
        elif module.endswith("_norm") and "." not in module:
            plain[name] = form.inner * tensor
        elif not name.endswith("_scale"):
            plain[name] = tensor
    return plain


def _reordered(state: Mapping[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """Weights of a model without QK norm whose stream has its channels in another order.

    Args:
        order: (D,) which channel of `state` each new one is.
    """
    found = {}
    for name, tensor in state.items():
        module, _, parameter = name.rpartition(".")
        axis = 1 if parameter == "weight" else None
        if module.endswith((*_LAST, "norm")):
            axis = 0
        found[name] = tensor if axis is None else tensor.index_select(axis, order)
    return found


def _channels(model: ModelConfig) -> Tensor:
    """(D,) which channel of ours each of a Marian's is: first those of the sines, then those of the cosines."""
    return torch.cat((torch.arange(0, model.d_model, 2), torch.arange(1, model.d_model, 2)))


def to_theirs(state: Mapping[str, Tensor], model: ModelConfig, family: Family) -> dict[str, Tensor]:
    """Our weights as a class stores them.

    Args:
        state: canonical name -> fp32 tensor of a model that the class holds.

    Returns:
        Its name -> fp32 tensor.
    """
    plain = folded(state, model)
    if family.gemma:
        plain |= {name: tensor - 1.0 for name, tensor in plain.items() if name.endswith("norm.weight")}
        plain.setdefault("head.weight", plain["embedding.weight"])
        plain["embedding.weight"] = plain["embedding.weight"] / math.sqrt(model.d_model)
    if family.halves:
        plain = _reordered(plain, _channels(model))
    theirs = {family.name_of(name): tensor for name, tensor in plain.items()}
    return beside_ours(theirs, model, family) if family.biased else theirs


def to_ours(
    theirs: Mapping[str, Tensor], model: ModelConfig, family: Family, multipliers: Multipliers
) -> dict[str, Tensor]:
    """Weights of a class as ours, with its factors folded in.

    The factor of attention's logits goes into the queries, or with QK norm into the gains of their norm.

    Args:
        theirs: canonical name -> fp32 tensor as the class stores it; without a head where it is tied.
        model: what they become.
        multipliers: of its config.json.

    Returns:
        Canonical name -> fp32 tensor.
    """
    ours = dict(theirs)
    if family.halves:
        ours = _reordered(ours, _channels(model).argsort())
    if family.gemma:
        ours |= {name: tensor + 1.0 for name, tensor in ours.items() if name.endswith("norm.weight")}
    if not model.tie_embeddings:
        ours.setdefault("head.weight", ours["embedding.weight"])
        ours["head.weight"] = multipliers.head * ours["head.weight"]
    ours["embedding.weight"] = multipliers.embedding * ours["embedding.weight"]
    queries = "attention.q_norm.weight" if family.qk_norm != "none" else "attention.q.weight"
    for name, tensor in ours.items():
        if name.rpartition(".")[0].endswith(_LAST):
            ours[name] = multipliers.branch * tensor
        elif name.endswith(queries):
            ours[name] = multipliers.query * tensor
    return ours
