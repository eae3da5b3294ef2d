"""Verdicts on models whose fate is known, by their own measured numbers; the words and the rows of an answer."""

from __future__ import annotations

import math

import pytest

from solomonov.model.config import ModelConfig
from solomonov.model.residual import MODES
from solomonov.model.signal import Signal
from solomonov.signal_check import check_signal, facts, judge, lines, narrowed


def deep(residual: str, layers: int, **changes: object) -> ModelConfig:
    shape = {"layers": layers, "d_model": 1024, "heads": 16, "kv_heads": 4, "residual": residual, "base_layers": 6}
    return ModelConfig.model_validate(shape | changes)


@pytest.mark.parametrize(
    ("residual", "layers", "verdict"),
    [
        ("scaled", 200, "even"),
        ("deepnorm", 200, "even"),
        ("prenorm", 24, "even"),
        ("postnorm", 6, "even"),
        ("peri", 200, "uneven"),
        ("postnorm", 120, "broken"),
    ],
)
def test_known_fates(residual: str, layers: int, verdict: str) -> None:
    found = check_signal(deep(residual, layers))
    assert found.verdict == verdict, found.reading
    assert (found.advice is None) == (verdict == "even")
    assert verdict == "even" or "model.residual: scaled" in str(found.advice)
    assert len(found.signal.gradient_norms) == layers


@pytest.mark.parametrize(("residual", "verdict"), [("scaled", "even"), ("deepnorm", "even"), ("postnorm", "broken")])
def test_fates_of_two_stacks(residual: str, verdict: str) -> None:
    """DeepNorm's constants of an encoder before a decoder, against none of them."""
    found = check_signal(deep(residual, 100, architecture="encoder_decoder", encoder_layers=60))
    assert found.verdict == verdict, found.reading
    assert found.layers == len(found.signal.gradient_norms) == 160


@pytest.mark.parametrize(("kind", "architecture"), [("patches", "encoder"), ("frames", "encoder_decoder")])
def test_fates_behind_a_front(kind: str, architecture: str) -> None:
    """The same as without one: depth decides."""
    for residual, verdict in (("scaled", "even"), ("postnorm", "broken")):
        found = check_signal(deep(residual, 100, architecture=architecture, front={"kind": kind}))
        assert found.verdict == verdict, found.reading
        assert 0.5 < found.signal.stream_rms[0] < 2.0


@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
def test_rows_are_no_longer_than_learned_positions(architecture: str) -> None:
    flags = {"position": "learned", "train_tokens": 5}
    assert check_signal(deep("scaled", 70, architecture=architecture, attention=flags)).verdict == "even"


@pytest.mark.spare
def test_what_is_advised_is_even_at_a_thousand_layers() -> None:
    advice = str(check_signal(deep("postnorm", 120)).advice)
    for mode in ("scaled", "deepnorm"):
        assert mode in advice.partition("which is even at 1,000 layers")[0]
        assert check_signal(deep(mode, 1000)).verdict == "even"


@pytest.mark.parametrize("mode", MODES)
def test_the_copy_is_as_deep_and_of_the_same_kind(mode: str) -> None:
    flags = {"preset": "hybrid", "sink": True}
    model = deep(mode, 40, norm="layernorm", attention=flags, d_ff=4096)
    copy = narrowed(model)
    assert (copy.layers, copy.residual_mode, copy.norm, copy.attention) == (40, mode, "layernorm", model.attention)
    assert (copy.d_model, copy.heads, copy.kv_head_count, copy.head_width, copy.d_ff) == (64, 4, 1, 16, 256)


@pytest.mark.parametrize(("heads", "kv_heads"), [(64, 1), (128, 8), (3, 3), (6, 2), (1, 1)])
def test_the_copy_is_narrow_however_many_heads_share_a_key(heads: int, kv_heads: int) -> None:
    copy = narrowed(deep("scaled", 12, d_model=64 * heads, heads=heads, kv_heads=kv_heads))
    assert copy.d_model <= 64
    assert copy.heads // copy.kv_head_count == min(heads // kv_heads, 4)


def test_the_copy_of_a_mup_model_is_as_far_from_its_base() -> None:
    model = deep("scaled", 12, parameterization="mup", base_d_model=256)
    assert narrowed(model).base_d_model == 16


def _signal(gradients: list[float], growth: float = 1.0, loss: float = 4.0) -> Signal:
    return Signal(loss, (1.0, *[growth] * len(gradients)), tuple(1.0 for _ in gradients), tuple(gradients))


@pytest.mark.parametrize(
    ("signal", "verdict"),
    [
        (_signal([9.9, *[1.0] * 7]), "even"),
        (_signal([0.11, *[1.0] * 7]), "even"),
        (_signal([11.0, *[1.0] * 7]), "uneven"),
        (_signal([0.09, *[1.0] * 7]), "uneven"),
        (_signal([1.0] * 8, growth=10.1), "uneven"),
        (_signal([1001.0, *[1.0] * 7]), "broken"),
        (_signal([0.0, *[1.0] * 7]), "broken"),
        (_signal([1.0] * 7 + [0.0]), "broken"),
        (_signal([1.0] * 8, loss=math.nan), "broken"),
        (_signal([math.inf, *[1.0] * 7]), "broken"),
    ],
)
def test_where_the_verdicts_part(signal: Signal, verdict: str) -> None:
    assert judge(signal)[0] == verdict


def test_the_answer_has_a_row_an_eighth() -> None:
    check = check_signal(deep("postnorm", 80))
    short, whole = list(lines(check, whole=False)), list(lines(check, whole=True))
    assert short == whole[:2]
    assert short[0].startswith("signal      broken: the gradient of the first eighth is ")
    assert "80 layers, 64 wide" in short[0]
    assert "change model.residual: scaled" in short[1]
    rows = whole[4:]
    assert [row.split()[0] for row in rows] == [f"{begin}-{begin + 9}" for begin in range(0, 80, 10)]
    bars = [row.count("#") for row in rows]
    assert bars == sorted(bars, reverse=True)
    assert bars[-1] == 1
    assert facts(check)["gradient_norms"] == list(check.signal.gradient_norms)
