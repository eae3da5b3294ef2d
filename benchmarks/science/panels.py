"""Pictures of experiments: panels in rows and columns, written as one file, and lines that show all seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DOTS_AN_INCH = 110


@contextmanager
def panels(picture: Path, rows: int, columns: int, *, width: float, height: float) -> Iterator[list[list[Any]]]:
    """Axes of matplotlib to draw on, by row and column; written at the end, the folder is made.

    Args:
        width, height: of a panel, in inches.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    yield [list(row) for row in axes]
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=DOTS_AN_INCH)
    pyplot.close(figure)


def bars(axis: Any, values: Mapping[float, Sequence[float]], **more: Any) -> None:
    """A line through the medians, with a bar from the least value to the largest at each place.

    Args:
        values: of all seeds, by place; places without any are left out.
        more: as of a line of matplotlib.
    """
    places = sorted(place for place, found in values.items() if found)
    medians = [statistics.median(values[place]) for place in places]
    below = [median - min(values[place]) for place, median in zip(places, medians, strict=True)]
    above = [max(values[place]) - median for place, median in zip(places, medians, strict=True)]
    look = {"marker": "o", "markersize": 3, "capsize": 2} | more
    axis.errorbar(places, medians, (below, above), **look)
