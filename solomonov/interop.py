"""Our models in Hugging Face's classes: what they call our parameters, what they can hold, and what is folded."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from solomonov.errors import ConfigurationError
from solomonov.model.config import ModelConfig
from solomonov.model.residual import branch_form

# Ours -> theirs, of one block; what stands outside the blocks comes after.
_BLOCK_NAMES = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
_OUTER_NAMES = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
_LAST = ("attention.out.weight", "feed_forward.down.weight")
_FOLDING = ("prenorm", "scaled", "lns", "layerscale", "rezero")
"""Residual forms that folding makes plain pre-norm ones."""


def export_refusal(model: ModelConfig) -> ConfigurationError | None:
    """Which flags of the model keep it out of Llama and Qwen3; None: none."""
    flags = model.attention
    held = {"position": "rope", "window": None, "gate": "none", "logit_scale": "none", "sink": False}
    odd = {f"attention.{name}": getattr(flags, name) for name, value in held.items() if getattr(flags, name) != value}
    plain = {"norm": "rmsnorm", "feed_forward": "swiglu"}
    odd |= {name: getattr(model, name) for name, value in plain.items() if getattr(model, name) != value}
    if model.residual_mode not in _FOLDING:
        odd["residual"] = model.residual_mode
    if not odd:
        return None
    return ConfigurationError(
        "Neither Llama nor Qwen3, to which models are exported, holds this model.",
        got=", ".join(f"model.{name}: {value}" for name, value in odd.items()),
        rule="what is exported rotates in every layer, sees all tokens, has no gate, log-n scale or sink, adds "
        "branches to a pre-normed stream with a factor at most, and has RMSNorm and SwiGLU",
        remedy="`solomonov generate` and `evaluate` read the run itself; to export one, train it with "
        "model.attention.preset: rope and model.residual: auto",
    )


def folded(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """The weights of a plain pre-norm model with the same logits, but for rounding.

    s * W x = (s W) x takes a branch's factor, fixed or learned, one number or one a channel, into its last matrix, and
    c * (g * n) = (c g) * n what the branch reads into the gains of its norm.

    Args:
        state: canonical name -> tensor of a model that `export_refusal` does not refuse.
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


def hf_name(name: str) -> str:
    """Hugging Face's name (Llama and Qwen3 share them) of the parameter that we call `name`."""
    layer, _, _ = name.rpartition(".")
    if layer in _OUTER_NAMES:
        return f"{_OUTER_NAMES[layer]}.weight"
    _, index, part = layer.split(".", 2)
    return f"model.layers.{index}.{_BLOCK_NAMES[part]}.weight"
