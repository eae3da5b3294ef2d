"""Pictures with the layer on the x axis: the one door to matplotlib, which the extra `science` installs."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from solomonov.errors import ConfigurationError

if TYPE_CHECKING:
    from solomonov.diagnostics import Diagnosis
    from solomonov.signal_check import SignalCheck

REMEDY = "pip install 'solomonov[science]'"
SUFFIXES = (".png", ".pdf", ".svg")
DOTS_AN_INCH = 110
MOST = 1e30
"""A logarithmic axis reaches no further, nor below 1 / MOST: such numbers are no measurements."""
TITLE_CHARACTERS = 96
"""Of a line of the title, at the width of a picture."""


@cache
def problem() -> str | None:
    """Why nothing can be drawn here; None: it can."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        return f"matplotlib cannot be imported ({error}): {REMEDY}"
    return None


def checked_target(path: Path) -> Path:
    """The file, if a picture can be drawn into it.

    Raises:
        ConfigurationError: it cannot be: no matplotlib, another suffix, no such folder.
    """
    if problem() is not None:
        raise ConfigurationError(
            "no picture can be drawn here",
            got=f"--picture {path}: {problem()}",
            rule="pictures need matplotlib, which is not installed by default",
            remedy=f"{REMEDY}, or leave --picture out: --signal prints a row an eighth of the layers",
        )
    folder = path.parent
    if path.suffix not in SUFFIXES:
        raise ConfigurationError(
            "the picture's file has no suffix that says what it is",
            got=f"--picture {path}",
            rule=f"one of {', '.join(SUFFIXES)}",
            remedy=f"--picture {path.with_suffix('.png')}",
        )
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigurationError(
            "the picture cannot be written there",
            got=f"--picture {path}",
            rule="a file in a folder that is there and can be written",
            remedy="make the folder, or name another file",
        )
    return path


def of_signal(check: SignalCheck, path: Path) -> None:
    """Draw the stream and the gradient of each layer, as they were measured, the verdict above them.

    Args:
        path: what `checked_target` has let through.
    """
    signal = check.signal
    figure = _figure(8.0, 6.0)
    above, below = figure.subplots(2, 1, sharex=True)
    for colour, stack in enumerate(signal.stacks):
        name = "" if len(signal.stacks) == 1 else ("encoder", "decoder")[colour]
        _line(above, stack, [signal.stream_rms[layer + 1] for layer in stack], f"C{colour}", name)
        _line(below, stack, [signal.gradient_norms[layer] for layer in stack], f"C{colour}", name)
    above.set(ylabel="stream behind the layer, rms")
    below.set(ylabel="norm of the gradient", xlabel=f"layer, of {check.layers} ({check.width} wide)")
    for axes, values in ((above, signal.stream_rms), (below, signal.gradient_norms)):
        _logarithmic(axes, values)
    if len(signal.stacks) > 1:
        above.legend(fontsize=8)
    lines = textwrap.wrap(f"signal {check.verdict}: {check.reading}", TITLE_CHARACTERS)
    lines += [] if check.advice is None else textwrap.wrap(f"change {check.advice}", TITLE_CHARACTERS)
    figure.suptitle("\n".join(lines), fontsize=10)
    figure.savefig(path, dpi=DOTS_AN_INCH)


def of_layers(found: Diagnosis) -> NDArray[np.uint8]:
    """Draw all layers, and all heads of each, as they were measured after an update: (height, width, 3)."""
    looked = bool(found.stream_rms)
    layers = range(len(found.update_to_weight))
    figure = _figure(9.0, 11.0 if looked else 3.0)
    panels = list(figure.subplots(5 if looked else 1, 1, sharex=True, squeeze=False)[:, 0])
    _line(panels[0], layers, found.update_to_weight, "C0", "")
    panels[0].set(ylabel="update / weight")
    _logarithmic(panels[0], found.update_to_weight)
    panels[-1].set(xlabel="layer")
    if looked:
        _line(panels[1], layers, found.stream_rms[1:], "C0", "")
        panels[1].set(ylabel="stream, rms")
        _logarithmic(panels[1], found.stream_rms)
        edges = [part.start - 0.5 for part in found.parts] + [layers.stop - 0.5]
        panels[2].stairs(found.skip_eighth, edges, fill=True, color="C0", alpha=0.6)
        panels[2].axhline(0.0, color="grey", linewidth=0.5)
        panels[2].set(ylabel="loss without\nthe eighth, +nats")
        for axes, values, name in (
            (panels[3], found.distance, "distance, tokens"),
            (panels[4], found.entropy, "entropy, nats"),
        ):
            heads = len(values[0])
            axes.scatter(np.repeat(layers, heads), list(chain.from_iterable(values)), s=4.0, color="C0", alpha=0.4)
            _line(axes, layers, [sum(of_layer) / heads for of_layer in values], "C1", "mean of the heads")
            axes.set(ylabel=f"{name}\na point a head", ylim=(0.0, None))
            axes.legend(fontsize=8)
    return _pixels(figure)


def _figure(width: float, height: float) -> Any:
    """Inches. Without a window, and apart from matplotlib's own list of figures, which is not for several threads."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _pixels(figure: Any) -> NDArray[np.uint8]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(DOTS_AN_INCH)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba(), dtype=np.uint8)[..., :3]


def _line(axes: Any, layers: Sequence[int], values: Sequence[float], colour: str, label: str) -> None:
    axes.plot(layers, values, color=colour, label=label, linewidth=1.2, marker=".", markersize=3.0)


def _logarithmic(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic y axis of a decade at least, so that noise stays small, where there is something to show on it."""
    shown = [math.log10(value) for value in values if 1.0 / MOST <= value <= MOST]
    if not shown:
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    low, high = min(shown), max(shown)
    margin = max(0.05 * (high - low), (1.0 - (high - low)) / 2)
    if high - low + 2 * margin < 1.5:
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else "")
    else:
        axes.yaxis.set_minor_formatter("")
    axes.set_ylim(10.0 ** (low - margin), 10.0 ** (high + margin))
