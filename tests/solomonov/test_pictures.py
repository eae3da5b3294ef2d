"""Pictures by their headers and pixels: of signals and of layers, also where numbers cannot be drawn; and what is
refused before anything is measured."""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from solomonov import pictures
from solomonov.diagnostics import Diagnosis
from solomonov.errors import ConfigurationError
from solomonov.model.config import ModelConfig
from solomonov.model.signal import Signal
from solomonov.signal_check import SignalCheck, check_signal

pytestmark = pytest.mark.filterwarnings("error")


def png_size(path: Path) -> tuple[int, int]:
    """Width and height as the header says (PNG specification, sections 5.2 and 11.2.1)."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert head[12:16] == b"IHDR"
    width, height = struct.unpack(">II", head[16:])
    return width, height


def check(*gradients: float, stream: float = 1.0, depths: tuple[int, ...] | None = None) -> SignalCheck:
    streams, cosines = (stream,) * (len(gradients) + 1), (1.0,) * len(gradients)
    signal = Signal(4.0, streams, cosines, gradients, depths)
    return SignalCheck(len(gradients), 64, signal, "broken", "the gradient is what it is", "model.residual: scaled")


def test_a_signal_is_drawn(tmp_path: Path) -> None:
    shape = {"layers": 80, "d_model": 64, "heads": 4, "residual": "postnorm"}
    found = check_signal(ModelConfig.model_validate(shape))
    pictures.of_signal(found, pictures.checked_target(tmp_path / "signal.png"))
    assert png_size(tmp_path / "signal.png") == (880, 660)


def test_a_drawn_signal_says_its_verdict_and_shows_its_layers(tmp_path: Path) -> None:
    """A picture in SVG holds its texts, or here their outlines' comments, and a line each."""
    pictures.of_signal(check(4.0, 2.0, 1.0, 8.0, 0.5, depths=(2, 3)), tmp_path / "signal.svg")
    text = (tmp_path / "signal.svg").read_text()
    for words in ("signal broken: the gradient is what it is", "change model.residual: scaled", "encoder", "decoder"):
        assert f"<!-- {words} -->" in text, words
    assert "<!-- layer, of 5 (64 wide) -->" in text


@pytest.mark.parametrize(
    "found",
    [
        check(1.0),
        check(0.0, 0.0),
        check(math.inf, 1.0, math.nan),
        check(*[math.nan] * 3, stream=math.nan),
        check(1e-300, 1e300, stream=1e-30),
    ],
    ids=["one-layer", "zeros", "partly", "nothing", "far-apart"],
)
def test_a_signal_that_cannot_all_be_drawn_is_drawn_without(found: SignalCheck, tmp_path: Path) -> None:
    pictures.of_signal(found, tmp_path / "signal.png")
    assert png_size(tmp_path / "signal.png") == (880, 660)


def diagnosis(layers: int, heads: int, value: float = 1.0) -> Diagnosis:
    rows = ((value,) * heads,) * layers
    parts = min(8, layers)
    return Diagnosis((value,) * layers, (value,) * parts, (value,) * (layers + 1), (value,) * parts, rows, rows)


@pytest.mark.parametrize("value", [1.0, 0.0, -1.0, math.nan, math.inf, 1e300])
@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (3, 2), (100, 4)])
@pytest.mark.spare
def test_layers_are_drawn_whatever_was_measured(layers: int, heads: int, value: float) -> None:
    drawn = pictures.of_layers(diagnosis(layers, heads, value))
    assert (drawn.shape, drawn.dtype) == ((1210, 990, 3), np.uint8)
    assert drawn.min() == 0
    assert drawn.max() == 255


def test_updates_alone_are_one_panel() -> None:
    drawn = pictures.of_layers(Diagnosis((1e-3, 2e-3), (1e-3, 2e-3)))
    assert drawn.shape == (330, 990, 3)


def test_other_numbers_are_another_picture() -> None:
    first, second = (pictures.of_layers(diagnosis(12, 2, value)) for value in (1.0, 2.0))
    assert np.array_equal(first, pictures.of_layers(diagnosis(12, 2, 1.0)))
    assert not np.array_equal(first, second)


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    pictures.problem.cache_clear()
    yield
    pictures.problem.cache_clear()


@pytest.mark.usefixtures("without_matplotlib")
def test_without_matplotlib_the_extra_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"pip install 'solomonov\[science\]'") as found:
        pictures.checked_target(tmp_path / "signal.png")
    assert "leave --picture out" in str(found.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("signal", r"one of .png, .pdf, .svg[\s\S]*--picture \S*signal.png"),
        ("signal.txt", "one of .png, .pdf, .svg"),
        ("nowhere/signal.png", "make the folder"),
        ("folder.png", "name another file"),
    ],
)
def test_a_file_that_cannot_be_is_refused_beforehand(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ConfigurationError, match=words):
        pictures.checked_target(tmp_path / name)
    assert pictures.checked_target(tmp_path / "signal.svg") == tmp_path / "signal.svg"
