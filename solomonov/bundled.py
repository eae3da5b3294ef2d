"""Models that no class of Hugging Face holds, exported with code of their own: its files, and its config.json.

The code stands in `modeling_solomonov.py`, `layers_solomonov.py` and `configuration_solomonov.py`, which go into the
folder as they are. What each layer does is written out for it, so that it knows no modes and no presets. Weights keep
our names, unfolded.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from solomonov.interop_families import misfits, nearest_family
from solomonov.model.config import ModelConfig
from solomonov.model.residual import branch_form, has_final_norm
from solomonov.model.stacks import Architecture, Stack

MODEL_TYPE = "solomonov"
CLASSES: dict[Architecture, tuple[str, str]] = {
    "decoder": ("AutoModelForCausalLM", "SolomonovForCausalLM"),
    "encoder": ("AutoModelForMaskedLM", "SolomonovForMaskedLM"),
    "encoder_decoder": ("AutoModelForSeq2SeqLM", "SolomonovForSeq2SeqLM"),
}
"""What `transformers` looks for, and the class of the code."""
FILES = tuple(Path(__file__).with_name(f"{name}_solomonov.py") for name in ("modeling", "layers", "configuration"))
"""The code."""


def forcing_flags(model: ModelConfig) -> tuple[str, ...]:
    """What keeps a model out of the class that lacks least of it, as `model.key: value (not in CLASS)`.

    Args:
        model: one for which `interop_families.stock_family` finds none.
    """
    family = nearest_family(model)
    odd = misfits(model, family)
    return tuple(f"model.{name}: {value} (not in {family.architecture})" for name, value in odd.items())


def bundled_config(model: ModelConfig, sequence_tokens: int) -> dict[str, Any]:
    """What config.json says of the model's shape, but for the vocabulary's size.

    Args:
        sequence_tokens: T of training, written as the longest position.
    """
    flags = model.attention
    *encoders, stack = model.stacks
    sinusoidal = flags.position == "sinusoidal"
    auto_class, architecture = CLASSES[model.architecture]
    return {
        "architectures": [architecture],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": "configuration_solomonov.SolomonovConfig",
            auto_class: f"modeling_solomonov.{architecture}",
        },
        "hidden_size": model.d_model,
        "intermediate_size": model.feed_forward_width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_head_count,
        "head_dim": model.head_width,
        "max_position_embeddings": sequence_tokens,
        "tie_word_embeddings": model.tie_embeddings,
        "is_encoder_decoder": bool(encoders),
        "blocks": _blocks(model, stack),
        "encoder_blocks": [block for encoder in encoders for block in _blocks(model, encoder)],
        "feed_forward": model.feed_forward,
        "bias": model.bias,
        "norm": model.norm,
        "norm_eps": model.norm_eps,
        "qk_norm": flags.qk_norm_over if flags.qk_norm else "none",
        "gate": {False: "none", True: "element", "head": "head"}[flags.output_gate],
        "value_residual": model.value_residual,
        "sinusoidal": sinusoidal,
        "embedding_scale": math.sqrt(model.d_model) if sinusoidal and model.tie_embeddings else 1.0,
        "learned_positions": model.longest_tokens or 0,
        "embedding_norm": model.embedding_norm,
        "output_head": model.output_head,
        "final_norm": has_final_norm(model),
        "encoder_final_norm": any(has_final_norm(model, encoder) for encoder in encoders),
    }


def _blocks(model: ModelConfig, stack: Stack) -> list[dict[str, Any]]:
    """What each block of a stack does, by the names that the code knows."""
    return [
        dataclasses.asdict(model.layer_attention(layer, stack)) | dataclasses.asdict(branch_form(model, layer, stack))
        for layer in range(stack.layers)
    ]
