"""The model classes of Hugging Face that hold our models: what each can hold, and its config.json, written and read.

| class    | branches           | QK norm        | windows | layers without positions | more than one theta |
|----------|--------------------|----------------|---------|--------------------------|---------------------|
| Llama    | prenorm            |                |         |                          |                     |
| Qwen3    | prenorm            | head           | yes     |                          |                     |
| SmolLM3  | prenorm            |                | yes     | yes                      |                     |
| Gemma2   | peri               |                | yes     |                          |                     |
| Gemma3   | peri               | head           | yes     |                          | yes                 |
| Granite  | prenorm, read only |                |         |                          |                     |

All have RMSNorm, a gated feed-forward (silu or gelu) and rotary positions. Residual forms that fold are prenorm ones
(see `interop`). Granite's factors are folded when it is read; what it could hold is written as a Llama.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from solomonov.errors import ConfigurationError
from solomonov.model.attention_config import AttentionConfig
from solomonov.model.config import ModelConfig
from solomonov.model.residual import ResidualMode

PLAIN_FORM: dict[ResidualMode, ResidualMode] = {
    **dict.fromkeys(("prenorm", "scaled", "lns", "layerscale", "rezero"), "prenorm"),
    "peri": "peri",
}
"""Residual form -> what folding makes of it; a form that is not here is in no class."""

_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu"}
_FEED_FORWARDS = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"

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
}

# Of config.json, what changes no logit.
_IDLE = frozenset(
    {
        *("_name_or_path", "architectures", "model_type", "transformers_version", "dtype", "torch_dtype"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "cache_implementation", "initializer_range"),
        *("attention_dropout", "pretraining_tp", "output_attentions", "output_hidden_states", "return_dict"),
        *("id2label", "label2id", "problem_type", "chunk_size_feed_forward", "is_encoder_decoder"),
    }
)
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
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
    qk_norm: bool = False
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
        qk_norm=True,
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
        qk_norm=True,
        windows=True,
        two_thetas=True,
        gemma=True,
        whole_heads=True,
        activation="hidden_activation",
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
    held = {"qk_norm": family.qk_norm, "gate": "none", "logit_scale": "none", "sink": False}
    odd |= {f"attention.{name}": getattr(flags, name) for name, value in held.items() if getattr(flags, name) != value}
    if model.norm != "rmsnorm":
        odd["norm"] = model.norm
    if model.feed_forward not in _FEED_FORWARDS:
        odd["feed_forward"] = model.feed_forward
    if PLAIN_FORM.get(model.residual_mode) != family.residual:
        odd["residual"] = model.residual_mode
    if family.whole_heads and model.d_model % model.heads:
        odd["heads"] = model.heads
    return odd


def stock_family(model: ModelConfig) -> Family | None:
    """The class that a model is written as; None: none holds it."""
    return next((family for family in FAMILIES if family.written and not misfits(model, family)), None)


def nearest_family(model: ModelConfig) -> Family:
    """The class that lacks the fewest flags of a model, rather one of its residual form."""

    def lacking(family: Family) -> tuple[int, bool]:
        odd = misfits(model, family)
        return len(odd), "residual" in odd

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
        config["layer_types"] = [_GLOBAL if kind.window is None else _LOCAL for kind in kinds]
        # Gemma makes the mask of local layers also where there are none.
        config["sliding_window"] = sequence_tokens if flags.window is None else flags.window
    if family.bare_layers:
        config["no_rope_layers"] = [int(kind.position == "rope") for kind in kinds]
        config.setdefault("layer_types", [_GLOBAL] * model.layers)
    if family.two_thetas:
        config["rope_local_base_freq"] = flags.rope_theta
        config["rope_theta"] = kinds[-1].rope_theta if flags.global_rope_theta is None else flags.global_rope_theta
    if family.gemma:
        config["query_pre_attn_scalar"] = model.head_width
    return config


@dataclass(frozen=True)
class ReadConfig:
    """A config.json as ours."""

    model: ModelConfig
    multipliers: Multipliers
    sequence_tokens: int


def read_config(config: Mapping[str, Any], family: Family) -> ReadConfig:
    """What a config.json of a class describes, in our terms.

    Layers with and without positions that all see everything become global and local ones, whose window is the longest
    position: a row that is no longer sees all of itself.

    Raises:
        ConfigurationError: by some key it is another model than ours can be, or a key is unknown.
        KeyError: a size is missing.
        ValidationError: the sizes do not agree with each other.
    """
    given = {**family.defaults, **config}
    known = {*_IDLE, *_SIZES, "num_key_value_heads", "max_position_embeddings", *family.defaults}
    odd = {name: value for name, value in config.items() if name not in known}
    odd |= {name: given[name] for name, values in family.only.items() if given[name] not in values}
    activation = given[family.activation]
    if activation not in _ACTIVATIONS:
        odd[family.activation] = activation
    theta, local_theta, odd_rope = _thetas(given, family)
    odd |= odd_rope
    if odd:
        raise _not_held(family, odd)
    model = ModelConfig.model_validate(
        {
            "layers": given["num_hidden_layers"],
            "d_model": given["hidden_size"],
            "heads": given["num_attention_heads"],
            "kv_heads": given["num_key_value_heads"],
            "head_dim": given["head_dim"],
            "d_ff": given["intermediate_size"],
            "residual": family.residual,
            "norm_eps": given["rms_norm_eps"],
            "feed_forward": _ACTIVATIONS[activation],
            "tie_embeddings": given["tie_word_embeddings"],
            "attention": {"preset": "rope", "qk_norm": family.qk_norm, **_layers(given, family, theta, local_theta)},
        }
    )
    multipliers = _multipliers(given, family, model)
    if multipliers.embedding != multipliers.head:
        # Two factors make two matrices of a tied one.
        model = model.model_copy(update={"tie_embeddings": False})
    return ReadConfig(model, multipliers, int(given["max_position_embeddings"]))


def _not_held(family: Family, keys: Mapping[str, Any]) -> ConfigurationError:
    return ConfigurationError(
        f"This {family.architecture} is no model of ours.",
        got=", ".join(f"{name}: {value}" for name, value in keys.items()),
        rule="each key of its config.json has a value that ours can have as well: plain rotary positions, no biases, "
        "no caps on logits, silu or gelu_pytorch_tanh, windows and layers without positions in a repeating pattern",
        remedy="take another model; a key that means nothing can be deleted from config.json",
    )


def _multipliers(given: Mapping[str, Any], family: Family, model: ModelConfig) -> Multipliers:
    if family.gemma:
        query = math.sqrt(model.head_width / given["query_pre_attn_scalar"])
        return Multipliers(embedding=math.sqrt(model.d_model), query=query)
    if family.model_type == "granite":
        return Multipliers(
            embedding=given["embedding_multiplier"],
            query=given["attention_multiplier"] * math.sqrt(model.head_width),
            branch=given["residual_multiplier"],
            head=1.0 / given["logits_scaling"],
        )
    return Multipliers()


def _thetas(given: Mapping[str, Any], family: Family) -> tuple[float, float, dict[str, Any]]:
    """Base of the rotary frequencies of global and of local layers, and what is odd in the keys that tell them."""
    key = "rope_parameters" if given["rope_parameters"] is not None else "rope_scaling"
    told = given[key] or {}
    nested = {kind: told[kind] or {} for kind in (_GLOBAL, _LOCAL) if kind in told}
    odd = {}
    for place, values in nested.items() or [("", told)]:
        plain = {"rope_type": ("default",), "type": ("default",), "partial_rotary_factor": (None, 1.0)}
        for name, value in values.items():
            if name != "rope_theta" and value not in plain.get(name, ()):
                odd[".".join(filter(None, (key, place, name)))] = value
    if given["partial_rotary_factor"] not in (None, 1.0):
        odd["partial_rotary_factor"] = given["partial_rotary_factor"]
    whole = {} if nested else told
    theta = nested.get(_GLOBAL, whole).get("rope_theta", given["rope_theta"])
    local = given["rope_local_base_freq"] if family.two_thetas else theta
    return theta, nested.get(_LOCAL, {} if family.two_thetas else whole).get("rope_theta", local), odd


def _layers(given: Mapping[str, Any], family: Family, theta: float, local_theta: float) -> dict[str, Any]:
    """Flags of our attention that give each layer what its class's keys give it.

    Raises:
        ConfigurationError: the layers follow no pattern of ours.
    """
    layers = given["num_hidden_layers"]
    bare, local = _bare_layers(given, family, layers), _local_layers(given, family, layers)
    window = given.get("sliding_window")
    if not any(local) and (all(bare) or not any(bare)):
        return {"position": "nope" if bare[0] else "rope", "rope_theta": float(theta)}
    odd = {name: given[name] for name in ("layer_types", "no_rope_layers") if given.get(name) is not None}
    candidates = [local]
    if not any(local):
        window = given["max_position_embeddings"]
        candidates = [[not each for each in bare], bare]
    for chosen in candidates:
        kinds = {(here, without) for here, without in zip(chosen, bare, strict=True)}
        patterns = _global_every(chosen)
        if len(kinds) != len({here for here, _ in kinds}) or not patterns:
            continue
        every = patterns[0]
        positions = {here: "nope" if without else "rope" for here, without in kinds}
        flags = {"window": window, "position": positions[True], "rope_theta": float(local_theta)}
        if every is None:
            return flags
        if positions[False] == "rope" and positions[True] == "rope" and local_theta == theta:
            return flags | {"global_every": every}
        if positions[True] != "rope":
            flags["rope_theta"] = float(theta)
        rotates = {"global_rope_theta": float(theta)} if positions[False] == "rope" else {}
        return flags | {"global_every": every, "global_position": positions[False], **rotates}
    raise _not_held(family, odd)


def _bare_layers(given: Mapping[str, Any], family: Family, layers: int) -> list[bool]:
    """Which layers have no positions."""
    if not family.bare_layers:
        return [False] * layers
    if given["no_rope_layers"] is not None:
        return [not rotates for rotates in given["no_rope_layers"][:layers]]
    return [(layer + 1) % given["no_rope_layer_interval"] == 0 for layer in range(layers)]


def _local_layers(given: Mapping[str, Any], family: Family, layers: int) -> list[bool]:
    """Which layers see a window."""
    if not family.windows:
        return [False] * layers
    types, wanted = given["layer_types"], given.get("use_sliding_window", True)
    if not wanted or given["sliding_window"] is None:
        if types is not None and _LOCAL in types:
            raise _not_held(family, {"use_sliding_window": wanted, "sliding_window": given["sliding_window"]})
        return [False] * layers
    if types is not None:
        strange = set(types) - {_LOCAL, _GLOBAL}
        if strange or len(types) < layers:
            raise _not_held(family, {"layer_types": types})
        return [kind == _LOCAL for kind in types[:layers]]
    if family.model_type == "qwen3":
        return [layer >= given["max_window_layers"] for layer in range(layers)]
    if family.model_type == "smollm3":
        return _bare_layers(given, family, layers)
    pattern = (given["sliding_window_pattern"] or given["_sliding_window_pattern"]) if family.two_thetas else 2
    return [(layer + 1) % pattern != 0 for layer in range(layers)]


def _global_every(local: Sequence[bool]) -> list[int | None]:
    """The n of our pattern with which just these layers are local, None where all are; empty: it is no such pattern."""
    layers = len(local)
    found: list[int | None] = []
    for every in [None, *range(2, layers + 2)]:
        flags = AttentionConfig(window=1, global_every=every)
        if all(flags.is_global(layer, layers) != local[layer] for layer in range(layers)):
            found.append(every)
    return found
