"""The model classes of Hugging Face that hold our models: what each can hold, and its config.json.

| class    | branches           | QK norm        | windows | layers without positions | more than one theta |
|----------|--------------------|----------------|---------|--------------------------|---------------------|
| Llama    | prenorm            |                |         |                          |                     |
| Qwen3    | prenorm            | head           | yes     |                          |                     |
| SmolLM3  | prenorm            |                | yes     | yes                      |                     |
| Gemma2   | peri               |                | yes     |                          |                     |
| Gemma3   | peri               | head           | yes     |                          | yes                 |
| Olmo2    | outnorm            | all            |         |                          |                     |
| Granite  | prenorm, read only |                |         |                          |                     |

All have RMSNorm, a gated feed-forward (silu or gelu) and rotary positions. Residual forms that fold are prenorm ones
(see `interop`). Granite's factors are folded when it is read; what it could hold is written as a Llama.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from solomonov.model.config import ModelConfig
from solomonov.model.residual import ResidualMode

PLAIN_FORM: dict[ResidualMode, ResidualMode] = {
    **dict.fromkeys(("prenorm", "scaled", "lns", "layerscale", "rezero"), "prenorm"),
    "peri": "peri",
    "outnorm": "outnorm",
}
"""Residual form -> what folding makes of it; a form that is not here is in no class."""

_FEED_FORWARDS = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"}
LOCAL, GLOBAL = "sliding_attention", "full_attention"
"""What `layer_types` calls layers with a window, and those without."""

_BRANCHES = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
_OUTER = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
_NORMS: dict[str, dict[str, str]] = {
    "prenorm": {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"},
    "peri": {
        "attention_norm": "input_layernorm",
        "attention_out_norm": "post_attention_layernorm",
        "feed_forward_norm": "pre_feedforward_layernorm",
        "feed_forward_out_norm": "post_feedforward_layernorm",
    },
    "outnorm": {
        "attention_out_norm": "post_attention_layernorm",
        "feed_forward_out_norm": "post_feedforward_layernorm",
    },
}

_COMMON: dict[str, Any] = {
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "rope_theta": 10_000.0,
    "rope_parameters": None,
    "rope_scaling": None,
    "partial_rotary_factor": None,
}


@dataclass(frozen=True)
class Family:
    """One class of Hugging Face."""

    model_type: str
    architecture: str
    """Name of the class."""
    defaults: Mapping[str, Any]
    """Keys of its config.json that matter, beside the sizes, and what their absence means."""
    only: Mapping[str, tuple[Any, ...]]
    """Keys for which ours has no switch, and the values that mean what ours does."""
    residual: ResidualMode = "prenorm"
    qk_norm: Literal["none", "head", "all"] = "none"
    """What one mean square of queries and keys is taken over."""
    windows: bool = False
    """Layers may see a window (`layer_types`)."""
    bare_layers: bool = False
    """Layers may do without positions (`no_rope_layers`)."""
    two_thetas: bool = False
    """Local and global layers may rotate at different rates."""
    gemma: bool = False
    """Norms store their gains less 1, and embeddings are multiplied by sqrt(D)."""
    whole_heads: bool = False
    """D must be a multiple of H, also where heads have a width of their own."""
    activation: Literal["hidden_act", "hidden_activation"] = "hidden_act"
    """Key of the function in the feed-forward."""
    written: bool = True
    """Whether ours are written as one."""

    def name_of(self, name: str) -> str:
        """Its name of the parameter that we call `name`."""
        layer, _, _ = name.rpartition(".")
        if layer in _OUTER:
            return f"{_OUTER[layer]}.weight"
        _, index, part = layer.split(".", 2)
        return f"model.layers.{index}.{(_BRANCHES | _NORMS[self.residual])[part]}.weight"


@dataclass(frozen=True)
class Multipliers:
    """Factors that a class has outside of its weights and ours folds into them."""

    embedding: float = 1.0
    """Of the embedded tokens."""
    query: float = 1.0
    """Of attention's logits, relative to 1/sqrt(E)."""
    branch: float = 1.0
    """Of what a branch adds to the stream."""
    head: float = 1.0
    """Of the logits."""


_WINDOW = {"layer_types": None, "sliding_window": None}
_GEMMA: dict[str, Any] = {
    **_COMMON,
    **_WINDOW,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "use_bidirectional_attention": None,
}
_NO_BIAS: dict[str, tuple[Any, ...]] = {"attention_bias": (False,)}
_NO_BIASES = {**_NO_BIAS, "mlp_bias": (False,)}
_NO_CAPS = {
    **_NO_BIAS,
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (None, False),
}
_LLAMA_KEYS = {**_COMMON, "hidden_act": "silu", "num_key_value_heads": None, "mlp_bias": False}
FAMILIES: tuple[Family, ...] = (
    Family("llama", "LlamaForCausalLM", _LLAMA_KEYS, _NO_BIASES, whole_heads=True),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        {**_COMMON, **_WINDOW, "hidden_act": "silu", "use_sliding_window": False, "max_window_layers": 28},
        _NO_BIAS,
        qk_norm="head",
        windows=True,
    ),
    Family(
        "smollm3",
        "SmolLM3ForCausalLM",
        {
            **_LLAMA_KEYS,
            **_WINDOW,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
        },
        _NO_BIASES,
        windows=True,
        bare_layers=True,
    ),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        {**_GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        _NO_CAPS,
        residual="peri",
        windows=True,
        gemma=True,
        whole_heads=True,
        activation="hidden_activation",
    ),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        {
            **_GEMMA,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "sliding_window_pattern": None,
            "_sliding_window_pattern": 6,
        },
        _NO_CAPS,
        residual="peri",
        qk_norm="head",
        windows=True,
        two_thetas=True,
        gemma=True,
        whole_heads=True,
        activation="hidden_activation",
    ),
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        {**_COMMON, "hidden_act": "silu", "num_key_value_heads": None, "rms_norm_eps": 1e-5},
        _NO_BIAS,
        residual="outnorm",
        qk_norm="all",
    ),
    Family(
        "granite",
        "GraniteForCausalLM",
        {
            **_LLAMA_KEYS,
            "embedding_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        _NO_BIASES,
        written=False,
    ),
)
"""The first that holds a model is what it is written as."""


def family_of(model_type: object) -> Family | None:
    """The class of a config.json; None: none of these."""
    return next((family for family in FAMILIES if family.model_type == model_type), None)


def misfits(model: ModelConfig, family: Family) -> dict[str, Any]:
    """Flags of a model that a class does not hold: key below `model` -> value."""
    flags, odd = model.attention, dict[str, Any]()
    positions = ("rope", "nope") if family.bare_layers else ("rope",)
    if flags.position not in positions:
        odd["attention.position"] = flags.position
    if flags.global_position not in (None, *positions):
        odd["attention.global_position"] = flags.global_position
    if flags.window is not None and not family.windows:
        odd["attention.window"] = flags.window
    if flags.global_rope_theta not in (None, flags.rope_theta) and not family.two_thetas:
        odd["attention.global_rope_theta"] = flags.global_rope_theta
    held = {"qk_norm": family.qk_norm != "none", "gate": "none", "logit_scale": "none", "sink": False}
    if flags.qk_norm and family.qk_norm != "none":
        held["qk_norm_over"] = family.qk_norm
    odd |= {f"attention.{name}": getattr(flags, name) for name, value in held.items() if getattr(flags, name) != value}
    if model.norm != "rmsnorm":
        odd["norm"] = model.norm
    if model.feed_forward not in _FEED_FORWARDS:
        odd["feed_forward"] = model.feed_forward
    if PLAIN_FORM.get(model.residual_mode) != family.residual:
        odd["residual"] = model.residual_mode
    if model.value_residual:
        odd["value_residual"] = True
    if family.whole_heads and model.d_model % model.heads:
        odd["heads"] = model.heads
    return odd


def stock_family(model: ModelConfig) -> Family | None:
    """The class that a model is written as; None: none holds it."""
    return next((family for family in FAMILIES if family.written and not misfits(model, family)), None)


def nearest_family(model: ModelConfig) -> Family:
    """The class that lacks the fewest flags of a model, rather one of its residual form."""

    def lacking(family: Family) -> tuple[int, bool, bool]:
        odd = misfits(model, family)
        return len(odd), "residual" in odd, "attention.qk_norm" in odd

    return min((family for family in FAMILIES if family.written), key=lacking)


def written_config(model: ModelConfig, family: Family, sequence_tokens: int) -> dict[str, Any]:
    """What config.json says of the model's shape, but for the vocabulary's size.

    Args:
        model: one that the class holds.
        sequence_tokens: T of training, written as the longest position.
    """
    flags = model.attention
    kinds = [model.layer_attention(layer) for layer in range(model.layers)]
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_size": model.d_model,
        "intermediate_size": model.feed_forward_width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_head_count,
        "head_dim": model.head_width,
        family.activation: _FEED_FORWARDS[model.feed_forward],
        "rms_norm_eps": model.norm_eps,
        "rope_theta": flags.rope_theta,
        "max_position_embeddings": sequence_tokens,
        "attention_dropout": 0.0,
        # The two matrices of a Gemma differ by sqrt(D), where ours are equal.
        "tie_word_embeddings": model.tie_embeddings and not family.gemma,
        **{name: values[0] for name, values in family.only.items()},
    }
    if "use_sliding_window" in family.defaults:
        config["use_sliding_window"] = flags.window is not None
    if family.windows and (flags.window is not None or "use_sliding_window" not in family.defaults):
        config["layer_types"] = [GLOBAL if kind.window is None else LOCAL for kind in kinds]
        # Gemma makes the mask of local layers also where there are none.
        config["sliding_window"] = sequence_tokens if flags.window is None else flags.window
    if family.bare_layers:
        config["no_rope_layers"] = [int(kind.position == "rope") for kind in kinds]
        config.setdefault("layer_types", [GLOBAL] * model.layers)
    if family.two_thetas:
        config["rope_local_base_freq"] = flags.rope_theta
        config["rope_theta"] = kinds[-1].rope_theta if flags.global_rope_theta is None else flags.global_rope_theta
    if family.gemma:
        config["query_pre_attn_scalar"] = model.head_width
    return config
