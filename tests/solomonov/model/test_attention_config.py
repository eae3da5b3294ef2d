"""Flags of attention: what presets fill in, which layers are global, and every rule against a choice that breaks it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from solomonov.model.attention_config import DEFAULT_PRESET, PRESETS, AttentionConfig, LayerAttention, default_window
from solomonov.model.config import ModelConfig


def attention(**keys: Any) -> AttentionConfig:
    return AttentionConfig.model_validate(keys)


def plain(**keys: Any) -> AttentionConfig:
    """Flags on top of those of `rope`, which sets the fewest."""
    return attention(**{"preset": "rope"} | keys)


def test_an_empty_section_is_the_default_preset() -> None:
    assert attention() == attention(preset=DEFAULT_PRESET) == ModelConfig().attention
    assert ModelConfig(architecture="encoder_decoder").attention == attention()
    assert DEFAULT_PRESET == "hybrid"


def test_an_encoder_which_has_no_windows_begins_from_another_preset() -> None:
    def of(**keys: Any) -> AttentionConfig:
        return ModelConfig.model_validate({"architecture": "encoder", **keys}).attention

    assert of() == of(attention={}) == plain()
    assert of(attention={"output_gate": "head"}) == plain(output_gate="head")
    assert of(attention={"preset": "vanilla"}) == attention(preset="vanilla")
    with pytest.raises(ValidationError, match=r"encoder with attention\.window_tokens, attention\.log_n_scale"):
        of(attention={"preset": "hybrid"})
    with pytest.raises(ValidationError, match="valid dictionary"):
        of(attention="rope")


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("vanilla", {"position": "sinusoidal", "qk_norm": False}),
        ("rope", {"position": "rope", "qk_norm": True}),
        ("alibi", {"position": "alibi", "qk_norm": False}),
        (
            "local",
            {"position": "rope", "qk_norm": True, "window_tokens": 256, "pattern": "LLLLLG", "global_rope_theta": 1e6},
        ),
        (
            "hybrid",
            {
                "position": "rope",
                "qk_norm": True,
                "window_tokens": 256,
                "pattern": "LLLG",
                "global_position": "nope",
                "output_gate": True,
                "log_n_scale": True,
            },
        ),
    ],
)
def test_a_preset_sets_these_flags_and_no_others(preset: str, expected: dict[str, Any]) -> None:
    plain = {name: field.default for name, field in AttentionConfig.model_fields.items()}
    assert attention(preset=preset).model_dump() == plain | expected | {"preset": preset}


def test_the_window_of_a_preset_is_a_quarter_of_a_row_and_at_most_1024() -> None:
    for tokens, window in ((256, 64), (4096, 1024), (65536, 1024), (2, 1), (None, 256)):
        assert default_window("hybrid", tokens) == window
        assert attention(preset="hybrid", train_tokens=tokens).window_tokens == window
    assert default_window("rope", 4096) is None


@given(
    preset=st.sampled_from(sorted(PRESETS)),
    given_flags=st.fixed_dictionaries(
        {},
        optional={
            "window_tokens": st.none() | st.integers(1, 9),
            "pattern": st.none() | st.text("LG", min_size=1, max_size=9),
            "position": st.sampled_from(["rope", "nope", "alibi", "sinusoidal", "learned"]),
            "output_gate": st.sampled_from([False, "head", True]),
            "qk_norm": st.booleans(),
            "sink": st.booleans(),
        },
    ),
)
def test_what_is_given_stands_and_a_preset_breaks_no_rule_of_its_own(preset: str, given_flags: dict[str, Any]) -> None:
    """Only an L without any window, and a window without an L, are mistakes among these, and the user's own."""
    letters = given_flags.get("pattern") or ""
    lonely = "L" in letters and given_flags.get("window_tokens", default_window(preset, None)) is None  # type: ignore[arg-type]
    idle = letters and "L" not in letters and given_flags.get("window_tokens") is not None
    if lonely or idle:
        with pytest.raises(ValidationError, match="without window_tokens" if lonely else "no layer is local"):
            attention(preset=preset, **given_flags)
        return
    found = attention(preset=preset, **given_flags)
    assert {name: getattr(found, name) for name in given_flags} == given_flags
    assert AttentionConfig.model_validate(found.model_dump()) == found


@pytest.mark.parametrize(
    ("keys", "rule", "remedy"),
    [
        ({"pattern": "LLLG"}, "without a window every layer sees all", "Set window_tokens"),
        ({"global_position": "nope"}, "without a window every layer sees all", "global_position to null"),
        ({"window_tokens": 8, "global_rope_theta": 5e5}, "all layers are local", "Set pattern"),
        (
            {"position": "sinusoidal", "window_tokens": 8, "pattern": "LG", "global_position": "nope"},
            "added to the embedding is in all layers",
            "Set global_position to null",
        ),
        (
            {"window_tokens": 8, "pattern": "LG", "global_position": "nope", "global_rope_theta": 5e5},
            "nothing rotates there",
            "Set global_rope_theta to null",
        ),
        (
            {"position": "alibi", "window_tokens": 8, "pattern": "LG", "global_rope_theta": 5e5},
            "global layers is alibi",
            "Set global_rope_theta to null",
        ),
        ({"qk_norm": False, "qk_norm_over": "all"}, "nothing is normed", "qk_norm_over to head"),
        ({"window_tokens": 8, "log_n_scale": True}, "for layers that see all", "Set pattern"),
        ({"window_tokens": 0}, "greater than or equal to 1", ""),
        ({"window_tokens": 8, "pattern": "G"}, "no layer is local", "window_tokens to null"),
        ({"window_tokens": 8, "pattern": "LXG"}, "pattern", ""),
        ({"window_tokens": 8, "pattern": ""}, "pattern", ""),
        ({"window_tokens": 8, "pattern": "LG", "global_position": "sinusoidal"}, "global_position", ""),
        ({"preset": "hybird"}, "preset", ""),
        ({"preset": ["rope"]}, "preset", ""),
        ({"position": "rotary"}, "position", ""),
        (
            {"position": "learned", "window_tokens": 8, "pattern": "LG", "global_position": "nope"},
            "position learned",
            "rope",
        ),
    ],
)
def test_flags_that_do_not_go_together_are_refused_with_the_nearest_choice(
    keys: dict[str, Any], rule: str, remedy: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        plain(**keys)
    text = str(caught.value)
    assert rule in text
    assert remedy in text


def test_letters_say_which_layers_are_global_and_the_last_ones_those_of_a_shorter_stack() -> None:
    def globals_of(layers: int, **keys: Any) -> list[int]:
        flags = plain(**keys)
        return [layer for layer in range(layers) if flags.is_global(layer, layers)]

    assert globals_of(9, window_tokens=4, pattern="LLLG") == [3, 7]
    assert globals_of(4, window_tokens=4, pattern="LLLG") == [3]
    assert globals_of(3, window_tokens=4, pattern="LLLG") == [2]
    assert globals_of(1, window_tokens=4, pattern="LLLG") == [0]
    assert globals_of(3, window_tokens=4) == []
    assert globals_of(7, window_tokens=4, pattern="GLL") == [0, 3, 6]
    assert globals_of(2, window_tokens=4, pattern="GLG") == [1]
    assert globals_of(3) == globals_of(3, pattern="G") == [0, 1, 2]


def test_kinds_of_layers() -> None:
    hybrid = attention(preset="hybrid", window_tokens=8)
    assert hybrid.of_layer(0, 4) == LayerAttention("rope", 10_000.0, 8, False)
    assert hybrid.of_layer(3, 4) == LayerAttention("nope", 10_000.0, None, True)
    local = attention(preset="local", window_tokens=8, rope_theta=100.0)
    assert local.of_layer(0, 6) == LayerAttention("rope", 100.0, 8, False)
    assert local.of_layer(5, 6) == LayerAttention("rope", 1e6, None, False)
    assert attention(preset="vanilla").of_layer(0, 1).position == "nope", "it is in the stream"
    assert plain(log_n_scale=True).of_layer(0, 1).log_n, "without a window all layers see all"


@pytest.mark.parametrize("preset", ["vanilla", "rope", "local", "hybrid"])
def test_all_layers_of_an_encoder_are_of_one_kind(preset: str) -> None:
    """Whatever the layers of a decoder with the same flags are."""
    flags = attention(preset=preset, rope_theta=500.0, sink=True)
    position = "nope" if preset == "vanilla" else "rope"
    assert flags.of_encoder() == LayerAttention(position, 500.0, None, False, False, False)
    assert (flags.of_layer(0, 2).causal, flags.of_layer(0, 2).sink) == (True, True)


def test_rotation_alone_needs_even_heads() -> None:
    with pytest.raises(ValidationError, match=r"15 wide.*say head_dim 16"):
        ModelConfig.model_validate({"head_dim": 15})
    for position in ("nope", "alibi", "sinusoidal"):
        assert ModelConfig.model_validate({"head_dim": 15, "attention": {"position": position}}).head_width == 15
    keys = {"position": "nope", "window_tokens": 4, "pattern": "LG", "global_position": "rope"}
    with pytest.raises(ValidationError, match="15 wide"):
        ModelConfig.model_validate({"head_dim": 15, "attention": keys})
