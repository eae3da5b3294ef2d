"""The model classes of Hugging Face that hold our models, and what each can hold.

| class    | branches           | QK norm        | windows | layers without positions | more than one theta |
|----------|--------------------|----------------|---------|--------------------------|---------------------|
| Llama    | prenorm            |                |         |                          |                     |
| Qwen3    | prenorm            | head           | yes     |                          |                     |
| SmolLM3  | prenorm            |                | yes     | yes                      |                     |
| Gemma2   | peri               |                | yes     |                          |                     |
| Gemma3   | peri               | head           | yes     |                          | yes                 |
| Olmo2    | outnorm            | all            |         |                          |                     |
| Granite  | prenorm            |                |         |                          |                     |
| EuroBert | prenorm, encoder   |                |         |                          |                     |

All these have RMSNorm, a gated feed-forward (silu or gelu) and rotary positions. Residual forms that fold are prenorm
ones (see `interop`). Granite's factors are folded when it is read, and such
as do nothing are written; of itself nothing is written as one, since a Llama holds it as well.

| class  | architecture    | branches | positions  | output head | beside them                              |
|--------|-----------------|----------|------------|-------------|------------------------------------------|
| Bert   | encoder         | postnorm | learned    | transform   | a norm of the embedding                  |
| Marian | encoder_decoder | postnorm | sinusoidal | bias        | tied matrices, an eps of 1e-5 and no other |

Both have LayerNorm, biases, a feed-forward without a gate and as many key-value heads as heads. `deepnorm` folds into
`postnorm`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from solomonov.errors import ConfigurationError
from solomonov.model.config import ModelConfig
from solomonov.model.residual import ResidualMode
from solomonov.model.stacks import Architecture, block_number

PLAIN_FORM: dict[ResidualMode, ResidualMode] = {
    **dict.fromkeys(("prenorm", "scaled", "lns", "layerscale", "rezero"), "prenorm"),
    "peri": "peri",
    "outnorm": "outnorm",
    "postnorm": "postnorm",
    "deepnorm": "postnorm",
}
"""Residual form -> what folding makes of it; a form that is not here is in no class."""

_GATED = {"swiglu": ("silu", "swish"), "geglu": ("gelu_pytorch_tanh",)}
_UNGATED = {"gelu": ("gelu",), "relu": ("relu",), "silu": ("silu", "swish")}
LOCAL, GLOBAL = "sliding_attention", "full_attention"
"""What `layer_types` calls layers with a window, and those without."""

_LLAMA = {
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
_LLAMA_OUTER = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
_BERT = {
    "attention.q": "attention.self.query",
    "attention.k": "attention.self.key",
    "attention.v": "attention.self.value",
    "attention.out": "attention.output.dense",
    "attention_post_norm": "attention.output.LayerNorm",
    "feed_forward.up": "intermediate.dense",
    "feed_forward.down": "output.dense",
    "feed_forward_post_norm": "output.LayerNorm",
}
_BERT_OUTER = {
    "embedding": "bert.embeddings.word_embeddings",
    "embedding.positions": "bert.embeddings.position_embeddings.weight",
    "embedding.norm": "bert.embeddings.LayerNorm",
    "head.transform.dense": "cls.predictions.transform.dense",
    "head.transform.norm": "cls.predictions.transform.LayerNorm",
    "head": "cls.predictions.decoder",
    "head.bias": "cls.predictions.bias",
}
_MARIAN = {
    **{f"attention.{part}": f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")},
    "attention_post_norm": "self_attn_layer_norm",
    **{f"cross_attention.{part}": f"encoder_attn.{part}_proj" for part in ("q", "k", "v", "out")},
    "cross_attention_post_norm": "encoder_attn_layer_norm",
    "feed_forward.up": "fc1",
    "feed_forward.down": "fc2",
    "feed_forward_post_norm": "final_layer_norm",
}
_MARIAN_OUTER = {"embedding": "model.shared", "head": "lm_head", "head.bias": "final_logits_bias"}
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
    holds: Architecture = "decoder"
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
    plain_heads: bool = False
    """As many key-value heads as heads, all of the width D / H."""
    activation: Literal["hidden_act", "hidden_activation", "activation_function"] = "hidden_act"
    """Key of the function in the feed-forward."""
    feed_forwards: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _GATED)
    """Ours -> names of their function, of which the first is written."""
    positions: tuple[str, ...] = ("rope",)
    biased: bool = False
    """Has LayerNorm, and biases everywhere; else RMSNorm, and none."""
    embedding_norm: bool = False
    output_heads: tuple[str, ...] = ("linear",)
    only_eps: float | None = None
    """Of all its norms; None: its config.json says it."""
    halves: bool = False
    """The stream has the channels of sines in its first half, where ours stand beside those of cosines."""
    only_tied: bool = False
    """Embedding and head are one matrix."""
    multipliers: bool = False
    """Its config.json has factors of embedding, logits of attention, branches and head."""
    blocks: Mapping[str, str] = field(default_factory=lambda: {"": "model.layers"})
    """Prefix of a stack of ours -> what its blocks are numbered under."""
    outer: Mapping[str, str] = field(default_factory=lambda: _LLAMA_OUTER)
    """Layer, or parameter, outside of the blocks -> its name."""
    inner: Mapping[str, str] = field(default_factory=dict)
    """Layer in a block -> its name in theirs, beside those of Llama."""
    idle: frozenset[str] = frozenset()
    """Keys of its config.json that change no logit, beside those of all classes."""

    def name_of(self, name: str) -> str:
        """Its name of the parameter that we call `name`."""
        layer, _, parameter = name.rpartition(".")
        if name in self.outer:
            return self.outer[name]
        if layer in self.outer:
            return f"{self.outer[layer]}.{parameter}"
        index = block_number(name)
        prefix, _, part = layer.partition(f"layers.{index}.")
        within = self.inner or _LLAMA | _NORMS[self.residual]
        return f"{self.blocks[prefix]}.{index}.{within[part]}.{parameter}"


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
        "eurobert",
        "EuroBertForMaskedLM",
        {**_LLAMA_KEYS, "rms_norm_eps": 1e-5},
        _NO_BIASES,
        holds="encoder",
        whole_heads=True,
        idle=frozenset({"mask_token_id", "classifier_pooling", "classifier_dropout"}),
    ),
    Family(
        "bert",
        "BertForMaskedLM",
        {
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "tie_word_embeddings": True,
            "is_decoder": False,
            "add_cross_attention": False,
            "position_embedding_type": "absolute",
        },
        {"is_decoder": (False,), "add_cross_attention": (False,), "position_embedding_type": ("absolute",)},
        holds="encoder",
        residual="postnorm",
        plain_heads=True,
        feed_forwards=_UNGATED,
        positions=("learned",),
        biased=True,
        embedding_norm=True,
        output_heads=("transform",),
        blocks={"": "bert.encoder.layer"},
        outer=_BERT_OUTER,
        inner=_BERT,
        idle=frozenset(
            {
                *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "type_vocab_size"),
                *("gradient_checkpointing", "directionality", "pooler_fc_size", "pooler_num_attention_heads"),
                *("pooler_num_fc_layers", "pooler_size_per_head", "pooler_type"),
            }
        ),
    ),
    Family(
        "marian",
        "MarianMTModel",
        {
            "activation_function": "gelu",
            "tie_word_embeddings": True,
            "share_encoder_decoder_embeddings": True,
            "scale_embedding": False,
            "is_decoder": False,
            "decoder_vocab_size": None,
        },
        {
            "tie_word_embeddings": (True,),
            "share_encoder_decoder_embeddings": (True,),
            "is_decoder": (False,),
        },
        holds="encoder_decoder",
        residual="postnorm",
        plain_heads=True,
        activation="activation_function",
        feed_forwards=_UNGATED,
        positions=("sinusoidal",),
        biased=True,
        output_heads=("bias", "linear"),
        only_eps=1e-5,
        halves=True,
        only_tied=True,
        blocks={"": "model.decoder.layers", "encoder.": "model.encoder.layers"},
        outer=_MARIAN_OUTER,
        inner=_MARIAN,
        idle=frozenset(
            {
                *("dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop", "init_std"),
                *("decoder_start_token_id", "forced_eos_token_id", "num_hidden_layers", "classifier_dropout"),
                # Of old versions; the class does as if they were false, and `static_position_embeddings` true.
                *("normalize_before", "normalize_embedding", "add_final_layer_norm", "static_position_embeddings"),
                *("add_bias_logits", "extra_pos_embeddings", "classif_dropout", "gradient_checkpointing"),
                # Of generation.
                *("num_beams", "max_length", "bad_words_ids", "force_bos_token_to_be_generated"),
            }
        ),
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
        multipliers=True,
    ),
)
"""The first that holds a model is what it is written as."""


def family_of(model_type: object) -> Family | None:
    """The class of a config.json; None: none of these."""
    return next((family for family in FAMILIES if family.model_type == model_type), None)


_KEYS = {"kv_head_count": "kv_heads", "head_width": "head_dim"}
"""Property of a model -> its key."""


def misfits(model: ModelConfig, family: Family) -> dict[str, Any]:
    """Flags of a model that a class does not hold: key below `model` -> value."""
    flags, odd = model.attention, dict[str, Any]()
    positions = (*family.positions, "nope") if family.bare_layers else family.positions
    if flags.position not in positions:
        odd["attention.position"] = flags.position
    if flags.global_position not in (None, *positions):
        odd["attention.global_position"] = flags.global_position
    if flags.window_tokens is not None and not family.windows:
        odd["attention.window_tokens"] = flags.window_tokens
    if flags.global_rope_theta not in (None, flags.rope_theta) and not family.two_thetas:
        odd["attention.global_rope_theta"] = flags.global_rope_theta
    held: dict[str, Any] = {
        "qk_norm": family.qk_norm != "none",
        "output_gate": False,
        "log_n_scale": False,
        "sink": False,
    }
    if flags.qk_norm and family.qk_norm != "none":
        held["qk_norm_over"] = family.qk_norm
    odd |= {f"attention.{name}": getattr(flags, name) for name, value in held.items() if getattr(flags, name) != value}
    own: dict[str, Any] = {"architecture": family.holds, "norm": "layernorm" if family.biased else "rmsnorm"}
    own |= {"bias": family.biased, "embedding_norm": family.embedding_norm}
    if family.plain_heads:
        own |= {"kv_head_count": model.heads, "head_width": model.d_model / model.heads}
    own |= {"tie_embeddings": True} if family.only_tied else {}
    own |= {"norm_eps": family.only_eps} if family.only_eps is not None else {}
    odd |= {_KEYS.get(name, name): getattr(model, name) for name, value in own.items() if getattr(model, name) != value}
    if model.output_head not in family.output_heads:
        odd["output_head"] = model.output_head
    if model.feed_forward not in family.feed_forwards:
        odd["feed_forward"] = model.feed_forward
    if PLAIN_FORM.get(model.residual_mode) != family.residual:
        odd["residual"] = model.residual_mode
    if model.value_residual:
        odd["value_residual"] = True
    if model.front.kind != "tokens":
        odd["front.kind"] = model.front.kind
    if family.whole_heads and model.d_model % model.heads:
        odd["heads"] = model.heads
    return odd


def stock_family(model: ModelConfig) -> Family | None:
    """The class that a model is written as of itself; None: none holds it."""
    return next((family for family in FAMILIES if not misfits(model, family)), None)


def chosen_family(model: ModelConfig, model_type: str) -> Family:
    """The class of that `model_type`, for a model that it holds.

    Raises:
        ConfigurationError: there is no such class here, or it does not hold the model.
    """
    family = family_of(model_type)
    holding = ", ".join(each.model_type for each in FAMILIES if not misfits(model, each)) or "none"
    if family is None:
        raise ConfigurationError(
            f"there is no class {model_type} to export to",
            got=model_type,
            rule=f"one of {', '.join(each.model_type for each in FAMILIES)}",
            remedy=f"choose one that holds this model: {holding}",
        )
    odd = misfits(model, family)
    if odd:
        raise ConfigurationError(
            f"{family.architecture} does not hold this model",
            got=", ".join(f"model.{key}: {value}" for key, value in odd.items()),
            rule="every flag of the model has a counterpart in the class",
            remedy=f"choose one that holds it: {holding}; or choose none",
        )
    return family


def nearest_family(model: ModelConfig) -> Family:
    """The class that lacks the fewest flags of a model, rather one of its residual form."""

    def lacking(family: Family) -> tuple[int, bool, bool]:
        odd = misfits(model, family)
        return len(odd), "residual" in odd, "attention.qk_norm" in odd

    return min((family for family in FAMILIES if family.holds == model.architecture), key=lacking)
