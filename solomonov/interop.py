"""Our weights in the classes of Hugging Face, and theirs in ours: names, and factors that are folded into the weights.

Every fold is exact but for rounding and, where a norm's input is scaled, its eps. What each class can hold stands in
`interop_families`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from solomonov.interop_families import Family, Multipliers
from solomonov.model.config import ModelConfig
from solomonov.model.residual import branch_form

_LAST = ("attention.out.weight", "feed_forward.down.weight")


def folded(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """The weights of a model without factors in its branches with the same logits, but for rounding.

    s * W x = (s W) x takes a branch's factor, fixed or learned, one number or one a channel, into its last matrix, and
    c * (g * n) = (c g) * n what the branch reads into the gains of its norm.

    Args:
        state: canonical name -> tensor of a model whose residual form is in `interop_families.PLAIN_FORM`.
    """
    plain = {}
    for name, tensor in state.items():
        layer, _, part = name.removeprefix("layers.").partition(".")
        if not layer.isdecimal():
            plain[name] = tensor
            continue
        form = branch_form(model, int(layer))
        scale = state.get(f"layers.{layer}.{part.partition('.')[0]}_scale")
        if part in _LAST:
            plain[name] = form.scale * tensor if scale is None else scale[:, None] * tensor
        elif not part.endswith("_scale"):
            plain[name] = form.inner * tensor if part.endswith("_norm.weight") and "." not in part[:-7] else tensor
    return plain


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
    return {family.name_of(name): tensor for name, tensor in plain.items()}


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
    if family.gemma:
        ours |= {name: tensor + 1.0 for name, tensor in ours.items() if name.endswith("norm.weight")}
    if not model.tie_embeddings:
        ours.setdefault("head.weight", ours["embedding.weight"])
        ours["head.weight"] = multipliers.head * ours["head.weight"]
    ours["embedding.weight"] = multipliers.embedding * ours["embedding.weight"]
    queries = "attention.q_norm.weight" if family.qk_norm != "none" else "attention.q.weight"
    for name, tensor in ours.items():
        if name.endswith(_LAST):
            ours[name] = multipliers.branch * tensor
        elif name.endswith(queries):
            ours[name] = multipliers.query * tensor
    return ours
