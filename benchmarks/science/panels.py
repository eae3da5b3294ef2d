"""Pictures of experiments: panels in rows and columns, written as one file."""

from __future__ import annotations

from collections.abc import Iterator
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
