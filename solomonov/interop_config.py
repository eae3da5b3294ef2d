"""config.json of a class of Hugging Face, written of our model, and read as ours: exactly, or refused by the key that
does not fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from solomonov.errors import ConfigurationError
from solomonov.interop_biased import SIZES, read_biased, written_biased
from solomonov.interop_families import GLOBAL, LOCAL, Family, Multipliers
from solomonov.model.config import ModelConfig

# Of config.json, what changes no logit.
_IDLE = frozenset(
    {
        *("_name_or_path", "architectures", "model_type", "transformers_version", "dtype", "torch_dtype"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "cache_implementation", "initializer_range"),
        *("attention_dropout", "pretraining_tp", "output_attentions", "output_hidden_states", "return_dict"),
        *("id2label", "label2id", "problem_type", "chunk_size_feed_forward", "is_encoder_decoder"),
    }
)
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def written_config(model: ModelConfig, family: Family, sequence_tokens: int) -> dict[str, Any]:
    """What config.json says of the model's shape, but for the vocabulary's size.

    Args:
        model: one that the class holds.
        sequence_tokens: T of training, written as the longest position.
    """
    if family.biased:
        return written_biased(model, family, sequence_tokens)
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
        family.activation: family.feed_forwards[model.feed_forward][0],
        "rms_norm_eps": model.norm_eps,
        "rope_theta": flags.rope_theta,
        "max_position_embeddings": sequence_tokens,
        "attention_dropout": 0.0,
        # The two matrices of a Gemma differ by sqrt(D), where ours are equal.
        "tie_word_embeddings": model.tie_embeddings and not family.gemma,
        **{name: values[0] for name, values in family.only.items()},
    }
    if "use_sliding_window" in family.defaults:
        config["use_sliding_window"] = flags.window_tokens is not None
    if family.windows and (flags.window_tokens is not None or "use_sliding_window" not in family.defaults):
        config["layer_types"] = [GLOBAL if kind.window is None else LOCAL for kind in kinds]
        # Gemma makes the mask of local layers also where there are none.
        config["sliding_window"] = sequence_tokens if flags.window_tokens is None else flags.window_tokens
    if family.bare_layers:
        config["no_rope_layers"] = [int(kind.position == "rope") for kind in kinds]
        config.setdefault("layer_types", [GLOBAL] * model.layers)
    if family.two_thetas:
        config["rope_local_base_freq"] = flags.rope_theta
        config["rope_theta"] = kinds[-1].rope_theta if flags.global_rope_theta is None else flags.global_rope_theta
    if family.gemma:
        config["query_pre_attn_scalar"] = model.head_width
    if family.multipliers:
        config |= {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}
        config["attention_multiplier"] = model.head_width**-0.5
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
    sizes = SIZES[family.model_type] if family.biased else (*_SIZES, "num_key_value_heads")
    known = {*_IDLE, *family.idle, *sizes, "vocab_size", "max_position_embeddings", *family.defaults}
    odd = {name: value for name, value in config.items() if name not in known}
    odd |= {name: given[name] for name, values in family.only.items() if given[name] not in values}
    activation = given[family.activation]
    feed_forward = next((ours for ours, names in family.feed_forwards.items() if activation in names), None)
    if feed_forward is None:
        odd[family.activation] = activation
    if family.biased:
        shape, odd_sizes = read_biased(given, family, feed_forward)
        if odd | odd_sizes:
            raise _not_held(family, odd | odd_sizes)
        return ReadConfig(ModelConfig.model_validate(shape), Multipliers(), int(given["max_position_embeddings"]))
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
            "architecture": family.holds,
            "feed_forward": feed_forward,
            "tie_embeddings": given["tie_word_embeddings"],
            "attention": {
                "preset": "rope",
                "qk_norm": family.qk_norm != "none",
                "qk_norm_over": "all" if family.qk_norm == "all" else "head",
                **_layers(given, family, theta, local_theta),
            },
        }
    )
    multipliers = _multipliers(given, family, model)
    if multipliers.embedding != multipliers.head:
        # Two factors make two matrices of a tied one.
        model = model.model_copy(update={"tie_embeddings": False})
    return ReadConfig(model, multipliers, int(given["max_position_embeddings"]))


_RULE = (
    "each key of its config.json has a value that ours can have as well: plain rotary positions, no biases, no caps on "
    "logits, silu or gelu_pytorch_tanh, windows and layers without positions in any order"
)
_BIASED_RULE = (
    "each key of its config.json has a value that ours can have as well: gelu, relu or silu, one matrix for all "
    "tokens, both stacks of as many heads and as wide a feed-forward"
)


def _not_held(family: Family, keys: Mapping[str, Any]) -> ConfigurationError:
    return ConfigurationError(
        f"This {family.architecture} is no model of ours.",
        got=", ".join(f"{name}: {value}" for name, value in keys.items()),
        rule=_BIASED_RULE if family.biased else _RULE,
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
    nested = {kind: told[kind] or {} for kind in (GLOBAL, LOCAL) if kind in told}
    odd = {}
    for place, values in nested.items() or [("", told)]:
        plain = {"rope_type": ("default",), "type": ("default",), "partial_rotary_factor": (None, 1.0)}
        for name, value in values.items():
            if name != "rope_theta" and value not in plain.get(name, ()):
                odd[".".join(filter(None, (key, place, name)))] = value
    if given["partial_rotary_factor"] not in (None, 1.0):
        odd["partial_rotary_factor"] = given["partial_rotary_factor"]
    whole = {} if nested else told
    theta = nested.get(GLOBAL, whole).get("rope_theta", given["rope_theta"])
    local = given["rope_local_base_freq"] if family.two_thetas else theta
    return theta, nested.get(LOCAL, {} if family.two_thetas else whole).get("rope_theta", local), odd


def _layers(given: Mapping[str, Any], family: Family, theta: float, local_theta: float) -> dict[str, Any]:
    """Flags of our attention that give each layer what its class's keys give it.

    Raises:
        ConfigurationError: layers with the same window differ in their positions.
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
        pattern = _pattern(chosen)
        if len(kinds) != len({here for here, _ in kinds}):
            continue
        positions = {here: "nope" if without else "rope" for here, without in kinds}
        flags = {"window_tokens": window, "position": positions[True], "rope_theta": float(local_theta)}
        if pattern is None:
            return flags
        if positions[False] == "rope" and positions[True] == "rope" and local_theta == theta:
            return flags | {"pattern": pattern}
        rotates = {"global_rope_theta": float(theta)} if positions[False] == "rope" else {}
        return flags | {"pattern": pattern, "global_position": positions[False], **rotates}
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
        if types is not None and LOCAL in types:
            raise _not_held(family, {"use_sliding_window": wanted, "sliding_window": given["sliding_window"]})
        return [False] * layers
    if types is not None:
        strange = set(types) - {LOCAL, GLOBAL}
        if strange or len(types) < layers:
            raise _not_held(family, {"layer_types": types})
        return [kind == LOCAL for kind in types[:layers]]
    if family.model_type == "qwen3":
        return [layer >= given["max_window_layers"] for layer in range(layers)]
    if family.model_type == "smollm3":
        return _bare_layers(given, family, layers)
    pattern = (given["sliding_window_pattern"] or given["_sliding_window_pattern"]) if family.two_thetas else 2
    return [(layer + 1) % pattern != 0 for layer in range(layers)]


def _pattern(local: Sequence[bool]) -> str | None:
    """The shortest pattern with which just these layers are local; None: all are."""
    letters = "".join("L" if here else "G" for here in local)
    lengths = range(1, len(letters) + 1)
    shortest = next(letters[:size] for size in lengths if (letters[:size] * len(letters))[: len(letters)] == letters)
    return None if shortest == "L" else shortest
