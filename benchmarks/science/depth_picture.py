"""The curves of `benchmarks.science.depth` as a picture.

    python -m benchmarks.science.depth_picture RESULT.json PICTURE.png

Left: training loss against the update, the median of the seeds, in a band from the least to the largest; a line a
residual form, a panel a depth, one learning rate. Right: by how much the held-out loss rises when each eighth of the
layers is passed by, first to last, with bars over the seeds.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.science.panels import bars, panels

RATE = 1e-3
SMOOTHED = 5
"""Updates that a point of a curve is the mean of."""


def smoothed(losses: Sequence[float]) -> list[float]:
    """Means of the last few."""
    return [sum(losses[max(0, at - SMOOTHED + 1) : at + 1]) / min(SMOOTHED, at + 1) for at in range(len(losses))]


def draw(result: dict[str, Any], picture: Path) -> None:
    """Draw a result of `depth` as it was written."""
    runs = [run for run in result["runs"] if run["lr"] == RATE]
    depths = sorted({run["layers"] for run in runs})
    with panels(picture, len(depths), 2, width=5.5, height=3.2) as rows:
        for (left, right), layers in zip(rows, depths, strict=True):
            here = [run for run in runs if run["layers"] == layers]
            for number, mode in enumerate(dict.fromkeys(run["mode"] for run in here)):
                seeds = [run for run in here if run["mode"] == mode]
                updates = list(zip(*(smoothed(run["losses"]) for run in seeds), strict=False))
                medians, least, largest = (list(map(of, updates)) for of in (statistics.median, min, max))
                left.plot(medians, label=mode, color=f"C{number}", linewidth=1.2)
                left.fill_between(range(len(updates)), least, largest, color=f"C{number}", alpha=0.2, linewidth=0)
                skips = list(zip(*(run["skip"] for run in seeds if "skip" in run), strict=True))
                bars(right, dict(enumerate(skips, start=1)), color=f"C{number}")
            for name, level in result["limits"].items():
                left.axhline(level, color="grey", linestyle=":", linewidth=0.8)
                left.text(0, level, name, fontsize=7, color="grey", va="bottom")
            left.set(title=f"{layers} layers, learning rate {RATE:g}", xlabel="update", ylabel="training loss, nats")
            left.legend(fontsize=7, ncol=2)
            right.set(
                title="without an eighth of the layers", xlabel="eighth", ylabel="rise of the held-out loss, nats"
            )
            right.set_yscale("symlog", linthresh=0.01)
            right.axhline(0.0, color="grey", linewidth=0.5)


def main(arguments: Sequence[str] | None = None) -> int:
    """RESULT.json PICTURE.png"""
    result, picture = sys.argv[1:] if arguments is None else arguments
    draw(json.loads(Path(result).read_text(encoding="utf-8")), Path(picture))
    return 0


if __name__ == "__main__":
    sys.exit(main())
