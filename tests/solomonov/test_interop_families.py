"""Our models as the classes of Hugging Face that are said to hold them, and back: logits against theirs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solomonov.errors import ConfigurationError
from solomonov.hf_folder import load_hf
from solomonov.interop_config import read_config, written_config
from solomonov.interop_families import FAMILIES, Family, chosen_family, misfits, nearest_family, stock_family
from solomonov.model.config import ModelConfig
from tests.solomonov.model.common import tiny_config
from tests.support.foreign import (
    TOLERANCE,
    as_theirs,
    our_logits,
    our_pairs,
    our_weights,
    random_documents,
    relative_difference,
    their_logits,
    their_pairs,
)

NO_QK: dict[str, Any] = {"qk_norm": False}
_BIASED: dict[str, Any] = {"bias": True, "norm": "layernorm", "kv_heads": 4, "feed_forward": "gelu"}
BERT: dict[str, Any] = {
    **_BIASED,
    "architecture": "encoder",
    "embedding_norm": True,
    "output_head": "transform",
    "attention": NO_QK | {"position": "learned", "train_tokens": 32},
}
MARIAN: dict[str, Any] = {
    **_BIASED,
    "architecture": "encoder_decoder",
    "norm_eps": 1e-5,
    "tie_embeddings": True,
    "attention": {"preset": "vanilla"},
}
EMBEDDED = {"embedding_norm": True}
HELD: dict[str, list[dict[str, Any]]] = {
    "LlamaForCausalLM": [
        {"attention": NO_QK | {"rope_theta": 500.0}, "norm_eps": 0.01},
        {"attention": NO_QK, "tie_embeddings": True, "head_dim": 6, "feed_forward": "geglu"},
        {"attention": NO_QK, "residual": "scaled", "layers": 4, "base_layers": 2},
    ],
    "Qwen3ForCausalLM": [
        {},
        {"head_dim": 6, "tie_embeddings": True, "residual": "layerscale"},
        {"attention": {"window_tokens": 4}},
        {"attention": {"window_tokens": 4, "pattern": "LLG", "global_rope_theta": 10_000.0}, "layers": 5},
        {"attention": {"window_tokens": 4, "pattern": "LLLG"}, "residual": "lns"},
        {"head_dim": 6, "d_model": 18},
    ],
    "SmolLM3ForCausalLM": [
        {"attention": NO_QK | {"position": "nope"}, "residual": "rezero"},
        {"attention": NO_QK | {"window_tokens": 4}, "tie_embeddings": True},
        {"attention": NO_QK | {"window_tokens": 4, "pattern": "LG", "global_position": "nope"}, "layers": 5},
        {"attention": NO_QK | {"position": "nope", "window_tokens": 4, "pattern": "LG", "global_position": "rope"}},
        {"attention": NO_QK, "head_dim": 6, "d_model": 18},
    ],
    "Gemma2ForCausalLM": [
        {"residual": "peri", "attention": NO_QK, "feed_forward": "geglu"},
        {"residual": "peri", "attention": NO_QK | {"window_tokens": 4, "pattern": "LG"}, "tie_embeddings": True},
    ],
    "Olmo2ForCausalLM": [
        {"residual": "outnorm", "attention": {"qk_norm_over": "all"}, "tie_embeddings": True},
        {"residual": "outnorm", "attention": {"qk_norm_over": "all", "rope_theta": 50.0}, "feed_forward": "geglu"},
        {"residual": "outnorm", "attention": {"qk_norm_over": "all"}, "head_dim": 6, "d_model": 18},
    ],
    "Gemma3ForCausalLM": [
        {"residual": "peri"},
        {
            "residual": "peri",
            "attention": {"preset": "local", "window_tokens": 4},
            "layers": 7,
            "feed_forward": "geglu",
        },
        {
            "residual": "peri",
            "attention": {"window_tokens": 4, "rope_theta": 500.0},
            "tie_embeddings": True,
            "head_dim": 6,
        },
    ],
    "EuroBertForMaskedLM": [
        {"architecture": "encoder", "attention": NO_QK | {"rope_theta": 500.0}, "residual": "layerscale"},
        {"architecture": "encoder", "attention": NO_QK, "tie_embeddings": True, "feed_forward": "geglu"},
    ],
    "BertForMaskedLM": [
        {**BERT, "residual": "postnorm", "norm_eps": 0.1},
        {**BERT, "residual": "deepnorm", "tie_embeddings": True, "feed_forward": "relu"},
    ],
    "MarianMTModel": [
        {**MARIAN, "residual": "postnorm", "output_head": "bias"},
        {**MARIAN, "residual": "deepnorm", "feed_forward": "silu", "encoder_layers": 4},
        {**MARIAN, "residual": "deepnorm", "d_model": 15, "heads": 3, "kv_heads": 3, "output_head": "bias"},
    ],
}


def _assert_parity(config: ModelConfig, folder: Path, model_type: str | None = None) -> None:
    """Ours, theirs that was made of it, and ours that is read back say the same of packed documents."""
    state = our_weights(config)
    theirs = as_theirs(config, state, folder, model_type)
    read, again, sequence_tokens = load_hf(folder)
    assert sequence_tokens == 32
    documents = random_documents(15, 1, 9)
    if config.architecture == "encoder_decoder":
        sources = random_documents(4, 11, 7, seed=5)
        expected, found = our_pairs(config, state, sources, documents), their_pairs(theirs, sources, documents)
        back = our_pairs(read, again, sources, documents)
    else:
        expected, found = our_logits(config, state, documents), their_logits(theirs, documents)
        back = our_logits(read, again, documents)
    assert relative_difference(found, expected) <= TOLERANCE
    assert relative_difference(back, expected) <= TOLERANCE


@pytest.mark.parametrize(
    ("architecture", "changes"), [(name, changes) for name in HELD for changes in HELD[name]], ids=str
)
def test_a_class_that_holds_our_model_gives_its_logits(
    tmp_path: Path, architecture: str, changes: dict[str, Any]
) -> None:
    config = tiny_config(**changes)
    family = stock_family(config)
    assert family is not None
    assert family.architecture == architecture
    _assert_parity(config, tmp_path)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
@pytest.mark.spare
def test_any_model_with_biases_that_a_class_is_said_to_hold_has_its_logits(data: st.DataObject) -> None:
    def pick(*values: Any) -> Any:
        return data.draw(st.sampled_from(values))

    shape, mode = pick(BERT, MARIAN), pick("postnorm", "deepnorm")
    # What is folded of deepnorm scales what the eps is added to.
    own: dict[str, Any] = {"norm_eps": pick(1e-5, 0.1 if mode == "postnorm" else 1e-6)}
    own["tie_embeddings"] = pick(True, False)
    if shape is MARIAN:
        own = {"output_head": pick("bias", "linear"), "encoder_layers": pick(None, 1, 3)}
    heads, width = pick((4, 12), (2, 16), (1, 7), (3, 9))
    changes = {
        "residual": mode,
        "feed_forward": pick("gelu", "relu", "silu"),
        "layers": pick(1, 2, 4),
        **{"heads": heads, "kv_heads": heads, "d_model": width},
    }
    config = tiny_config(**shape | own | changes)
    assert not misfits(config, nearest_family(config))
    with tempfile.TemporaryDirectory() as folder:
        _assert_parity(config, Path(folder))


FORMS = {"prenorm": ("prenorm", "scaled", "lns", "layerscale", "rezero"), "peri": ("peri",), "outnorm": ("outnorm",)}


@st.composite
def _configs(draw: st.DrawFn) -> tuple[ModelConfig, Family]:
    """Any model that a class is said to hold: its flags are drawn one by one out of what it has."""

    def pick(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    family = pick(*(family for family in FAMILIES if not family.biased))
    positions = ("rope", "nope") if family.bare_layers else ("rope",)
    flags: dict[str, Any] = {"qk_norm": family.qk_norm != "none", "rope_theta": pick(50.0, 1e4)}
    flags |= {"qk_norm_over": "all" if family.qk_norm == "all" else "head", "position": pick(*positions)}
    if family.windows and (window := pick(None, 3, 5, 40)) is not None:
        flags |= {"window_tokens": window, "pattern": pick(None, "LG", "LLG", "GL", "L" * 8 + "G")}
        if flags["pattern"] is not None:
            flags["global_position"] = pick(None, *positions)
            rotates = (flags["global_position"] or flags["position"]) == "rope"
            flags["global_rope_theta"] = pick(None, 700.0 if family.two_thetas else flags["rope_theta"])
            if not rotates:
                flags["global_rope_theta"] = None
    config = tiny_config(
        architecture=family.holds,
        layers=draw(st.integers(1, 5)),
        d_model=pick(12, 16) if family.whole_heads else pick(12, 16, 18),
        kv_heads=pick(1, 2, 4),
        head_dim=pick(2, 6),
        residual=pick(*FORMS[family.residual]),
        base_layers=2,
        feed_forward=pick("swiglu", "geglu"),
        tie_embeddings=pick(True, False),
        norm_eps=pick(1e-6, 0.1),
        attention=flags,
    )
    assert not misfits(config, family)
    return config, family


@settings(deadline=None, max_examples=60)
@given(drawn=_configs())
@pytest.mark.spare
def test_any_model_that_a_class_is_said_to_hold_has_its_logits(drawn: tuple[ModelConfig, Family]) -> None:
    """In that class, also where it is not the first that holds it."""
    config, family = drawn
    with tempfile.TemporaryDirectory() as folder:
        _assert_parity(config, Path(folder), family.model_type)


@settings(deadline=None, max_examples=200)
@given(drawn=_configs())
def test_what_is_written_reads_as_what_was_written(drawn: tuple[ModelConfig, Family]) -> None:
    """Layer by layer; the flags that say it may be others."""
    config, family = drawn
    read = read_config(written_config(config, family, 64) | {"vocab_size": 5}, family)
    assert (read.sequence_tokens, read.model.layers) == (64, config.layers)
    for layer in range(config.layers):
        assert read.model.layer_attention(layer) == config.layer_attention(layer)
    names = ("d_model", "heads", "kv_head_count", "head_width", "feed_forward_width", "feed_forward", "norm_eps")
    for name in names:
        assert getattr(read.model, name) == getattr(config, name)


@pytest.mark.parametrize(
    ("changes", "odd"),
    [
        ({"residual": "keel"}, {"residual": "keel"}),
        ({"attention": {"position": "nope"}}, {"attention.position": "nope"}),
        ({"attention": {"preset": "vanilla"}}, {"attention.position": "sinusoidal"}),
        ({"attention": {"preset": "alibi"}}, {"attention.position": "alibi"}),
        (
            {"attention": {"window_tokens": 4, "pattern": "LG", "global_position": "alibi"}},
            {"attention.global_position": "alibi"},
        ),
        ({"attention": {"preset": "local", "window_tokens": 4}}, {"attention.global_rope_theta": 1e6}),
        ({"attention": {"output_gate": "head"}}, {"attention.output_gate": "head"}),
        ({"attention": {"log_n_scale": True}}, {"attention.log_n_scale": True}),
        ({"attention": {"sink": True}}, {"attention.sink": True}),
        ({"attention": {"qk_norm_over": "all"}}, {"attention.qk_norm_over": "all"}),
        ({"residual": "outnorm"}, {"attention.qk_norm_over": "head"}),
        ({"norm": "layernorm", "residual": "peri"}, {"norm": "layernorm"}),
        ({"feed_forward": "relu2"}, {"feed_forward": "relu2"}),
        ({"residual": "peri", "d_model": 18, "head_dim": 4}, {"heads": 4}),
        ({"bias": True, "output_head": "bias"}, {"bias": True, "output_head": "bias"}),
        ({"attention": {"position": "learned"}, "embedding_norm": True}, {"attention.position": "learned"} | EMBEDDED),
        ({**BERT, "residual": "prenorm"}, {"residual": "prenorm"}),
        ({**BERT, "residual": "postnorm", "kv_heads": 2, "bias": False}, {"kv_heads": 2, "bias": False}),
        ({**BERT, "residual": "postnorm", "output_head": "bias"}, {"output_head": "bias"}),
        ({**BERT, "residual": "postnorm", "head_dim": 6}, {"head_dim": 6}),
        ({**BERT, "residual": "postnorm", "feed_forward": "relu2"}, {"feed_forward": "relu2"}),
        ({"architecture": "encoder"}, {"attention.qk_norm": True}),
        (
            {"architecture": "encoder", "attention": {"qk_norm": False}, "front": {"kind": "frames"}},
            {"front.kind": "frames"},
        ),
        ({**MARIAN, "residual": "postnorm", "norm_eps": 1e-6}, {"norm_eps": 1e-6}),
        ({**MARIAN, "residual": "postnorm", "tie_embeddings": False}, {"tie_embeddings": False}),
        ({**MARIAN, "residual": "keel", "embedding_norm": True}, {"residual": "keel"} | EMBEDDED),
    ],
    ids=str,
)
def test_the_flags_that_no_class_holds_are_named(changes: dict[str, Any], odd: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    assert stock_family(config) is None
    assert misfits(config, nearest_family(config)) == odd


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("granite", {"attention": NO_QK, "residual": "scaled", "base_layers": 1}),
        ("granite", {"attention": NO_QK, "tie_embeddings": True, "head_dim": 6, "feed_forward": "geglu"}),
        ("smollm3", {"attention": NO_QK}),
    ],
    ids=str,
)
def test_a_class_that_is_chosen_gives_its_logits(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    first = stock_family(config)
    assert first is not None
    assert first.model_type == "llama", "of itself it is another one"
    _assert_parity(config, tmp_path, model_type)


def test_a_class_that_does_not_hold_a_model_is_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigurationError, match="no class mamba") as caught:
        chosen_family(tiny_config(), "mamba")
    assert "granite" in caught.value.rule
    with pytest.raises(ConfigurationError, match="GraniteForCausalLM does not hold this model") as caught:
        chosen_family(tiny_config(), "granite")
    assert caught.value.got == "model.attention.qk_norm: True"
    assert "one that holds it: qwen3;" in caught.value.remedy
    with pytest.raises(ConfigurationError) as caught:
        chosen_family(tiny_config(attention={"preset": "hybrid"}), "llama")
    assert "one that holds it: none;" in caught.value.remedy
