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
