"""The model section: defaults against formulas, every cross-field rule against a shape that breaks it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from solomonov.model.config import ModelConfig
from solomonov.model.residual import branch_form


def test_defaults_fill_in_the_widths() -> None:
    config = ModelConfig(d_model=256, heads=8)
    assert (config.kv_head_count, config.head_width, config.feed_forward_width) == (8, 32, 688)
    assert ModelConfig(d_model=768, heads=12).feed_forward_width == 2048
    assert ModelConfig(d_model=100, heads=3, head_dim=34).head_width == 34


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 250, "heads": 8}, "does not divide into 8 heads"),
        ({"d_model": 240, "heads": 8, "kv_heads": 3}, "not a multiple of kv_heads 3"),
        ({"d_model": 24, "heads": 8}, "3 wide"),
        ({"head_dim": 15}, "15 wide"),
        ({"residual": "midnorm"}, "residual"),
        ({"layers": 0}, "layers"),
        ({"widht": 3}, "widht"),
        ({"layers": "12"}, "layers"),
    ],
)
def test_shapes_that_cannot_work_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate(changes)


@pytest.mark.parametrize(
    ("changes", "rule", "remedy"),
    [
        ({"encoder_layers": 6}, "there is one stack", "Set encoder_layers to null"),
        (
            {"architecture": "encoder", "encoder_layers": 6},
            "whose depth is layers",
            "or architecture to encoder_decoder",
        ),
        ({"architecture": "encoder_decoder", "encoder_layers": 0}, "encoder_layers", ""),
        (
            {"architecture": "encoder", "attention": {"preset": "alibi"}},
            "looks ahead as well",
            "attention.position to rope",
        ),
        (
            {"architecture": "encoder_decoder", "attention": {"position": "alibi"}},
            "architecture encoder_decoder",
            "preset",
        ),
        (
            {"architecture": "encoder", "attention": {"preset": "hybrid"}},
            "attention.window_tokens, attention.log_n_scale",
            "gate",
        ),
        (
            {"architecture": "encoder", "attention": {"window_tokens": 4}},
            "encoder with attention.window_tokens:",
            "window_tokens to null",
        ),
        ({"architecture": "encoder", "attention": {"sink": True}}, "encoder with attention.sink:", "sink to false"),
        ({"architecture": "seq2seq"}, "'decoder', 'encoder' or 'encoder_decoder'", ""),
    ],
)
def test_architectures_refuse_what_they_do_not_take(changes: dict[str, object], rule: str, remedy: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ModelConfig.model_validate(changes)
    assert rule in str(caught.value)
    assert remedy in str(caught.value)


def test_windows_behind_an_encoder_are_the_decoders_alone() -> None:
    flags = {"preset": "hybrid", "window_tokens": 4, "sink": True}
    config = ModelConfig.model_validate({"architecture": "encoder_decoder", "layers": 4, "attention": flags})
    encoder, decoder = ([config.layer_attention(layer, stack) for layer in (0, 3)] for stack in config.stacks)
    assert [(kind.window, kind.log_n, kind.sink) for kind in encoder] == [(None, False, False)] * 2
    assert [(kind.window, kind.log_n, kind.sink) for kind in decoder] == [(4, False, True), (None, True, True)]


def test_an_encoder_that_rotates_needs_even_heads_whatever_the_decoder_does() -> None:
    keys = {"position": "rope", "window_tokens": 4, "pattern": "LG", "global_position": "nope"}
    shape = {"architecture": "encoder_decoder", "layers": 1, "head_dim": 15, "attention": keys}
    with pytest.raises(ValidationError, match="15 wide"):
        ModelConfig.model_validate(shape)
    assert ModelConfig.model_validate({**shape, "architecture": "decoder"}).head_width == 15


def test_depth_of_the_encoder_is_that_of_the_decoder_unless_it_is_given() -> None:
    assert ModelConfig(architecture="encoder_decoder", layers=5).encoder_depth == 5
    assert ModelConfig(architecture="encoder_decoder", layers=5, encoder_layers=7).encoder_depth == 7


@pytest.mark.parametrize(
    ("residual", "layers", "mode", "scale"),
    [
        ("auto", 12, "prenorm", 1.0),
        ("auto", 13, "scaled", 12 / 13),
        ("auto", 1000, "scaled", 0.012),
        ("scaled", 6, "scaled", 1.0),
        ("prenorm", 48, "prenorm", 1.0),
    ],
)
def test_residual_by_depth(residual: str, layers: int, mode: str, scale: float) -> None:
    config = ModelConfig.model_validate({"residual": residual, "layers": layers})
    assert config.residual_mode == mode
    assert branch_form(config, 0).scale == pytest.approx(scale)


def test_configuration_and_counts_need_no_torch() -> None:
    program = (
        "import sys, solomonov.model.config, solomonov.model.counts, solomonov.model.naming\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
