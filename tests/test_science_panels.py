"""Pictures of experiments: what stands in their panels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib import pyplot

from benchmarks.science import coordinates, depth_picture, reach, transfer
from benchmarks.science.panels import panels


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were closed, to look at."""
    found: list[Any] = []
    usual = pyplot.close

    def close(figure: Any) -> None:
        found.append(figure)
        usual(figure)

    monkeypatch.setattr(pyplot, "close", close)
    return found


def test_panels_are_by_row_and_column_and_nothing_stays_open(tmp_path: Path) -> None:
    picture = tmp_path / "made" / "here.svg"
    with panels(picture, 2, 3, width=2.0, height=1.0) as grid:
        for row, axes in enumerate(grid):
            for column, axis in enumerate(axes):
                axis.set_title(f"at {row} {column}")
        figure = grid[0][0].figure
    assert (len(grid), {len(axes) for axes in grid}) == (2, {3})
    assert tuple(figure.get_size_inches()) == (6.0, 2.0)
    assert [axis.get_title() for axis in figure.axes] == [
        f"at {row} {column}" for row in range(2) for column in range(3)
    ]
    assert picture.read_text().startswith("<?xml")
    assert not pyplot.get_fignums()
    assert matplotlib.get_backend().lower() == "agg", "no window is opened"


def test_reach_has_a_panel_a_task_with_medians_between_the_seeds(tmp_path: Path, kept: list[Any]) -> None:
    def row(task: str, kind: str, middle: float) -> dict[str, Any]:
        found = {
            str(times): {"median": middle, "min": middle - 0.1 * times, "max": middle + 0.5} for times in (1, 2, 4, 8)
        }
        return {"task": task, "kind": kind, **found}

    reach.draw([row("copy", "rope", 0.5), row("text", "rope", 2.0), row("text", "alibi", 3.0)], tmp_path / "reach.png")
    [figure] = kept
    assert [len(axis.containers) for axis in figure.axes] == [1, 2]
    _, of_text = figure.axes
    line, _, [bars] = of_text.containers[1]
    assert list(line.get_xdata()) == [128, 256, 512, 1024]
    assert list(line.get_ydata()) == [3.0] * 4
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [
        [pytest.approx(3.0 - 0.1 * times), 3.5] for times in (1, 2, 4, 8)
    ]
    assert [text.get_text() for text in of_text.get_legend().get_texts()] == ["rope", "alibi"]
    assert "nats" in of_text.get_ylabel()


def lines_of(axis: Any) -> list[tuple[list[float], list[list[float]]]]:
    """Medians, and the ends of the bars, of each line with bars."""
    return [
        (list(line.get_ydata()), [segment[:, 1].tolist() for segment in bars.get_segments()])
        for line, _, [bars] in axis.containers
    ]


def test_coordinates_have_a_column_for_what_grows_and_begin_at_nothing(tmp_path: Path, kept: list[Any]) -> None:
    records = [
        {"kind": kind, "grows": grows, grows: size, "stream": moved + seed, "logits": moved}
        for grows in ("width", "depth")
        for kind, far in (("sp", 9.0), ("completep", 1.5))
        for size, moved in ((2, 1.0), (4, far))
        for seed in (0.0, 0.25, 1.0)
    ]
    coordinates.draw(records, tmp_path / "coordinates.png")
    [figure] = kept
    assert [axis.get_xlabel() for axis in figure.axes] == ["width", "depth"] * 2
    for axis in figure.axes:
        assert axis.get_ylim()[0] == 0.0, "so that what is flat looks flat"
    of_stream, of_logits = figure.axes[0], figure.axes[2]
    assert [medians for medians, _ in lines_of(of_logits)] == [[1.0, 9.0], [1.0, 1.5]]
    assert lines_of(of_stream)[0] == ([1.25, 9.25], [[1.0, 2.0], [9.0, 10.0]])


def test_a_rate_at_which_nothing_was_finite_has_no_point(tmp_path: Path, kept: list[Any]) -> None:
    records = [
        {"kind": "sp", "layers": layers, "lr": lr, "finite": loss is not None, "loss": loss}
        for layers, lr, loss in ((6, 0.1, 2.0), (6, 0.1, 3.0), (6, 0.2, 1.0), (6, 0.2, None), (9, 0.1, 4.0))
    ] + [{"kind": "completep", "layers": 9, "lr": 0.4, "finite": False, "loss": None}]
    transfer.draw(records, tmp_path / "transfer.png")
    [figure] = kept
    assert [axis.get_title() for axis in figure.axes] == ["sp", "completep"]
    assert lines_of(figure.axes[0]) == [([2.5, 1.0], [[2.0, 3.0], [1.0, 1.0]]), ([4.0], [[4.0, 4.0]])]
    assert lines_of(figure.axes[1]) == [([], [])]


def test_depth_is_drawn_of_all_seeds_and_of_one_rate(tmp_path: Path, kept: list[Any]) -> None:
    def run(mode: str, seed: int, loss: float, **more: Any) -> dict[str, Any]:
        return {"mode": mode, "layers": 24, "lr": 1e-3, "seed": seed, "losses": [loss] * 3, "skip": [loss] * 8} | more

    runs = [run("scaled", seed, loss) for seed, loss in enumerate((1.0, 2.0, 4.0))]
    broken = {"mode": "postnorm", "layers": 24, "lr": 1e-3, "seed": 0, "losses": [5.0, 5.0]}
    runs += [broken, run("scaled", 0, 9.0, lr=3e-3)]
    depth_picture.draw({"runs": runs, "limits": {"floor": 0.5}}, tmp_path / "depth.png")
    [figure] = kept
    left, right = figure.axes
    assert [list(line.get_ydata()) for line in left.lines[:2]] == [[2.0] * 3, [5.0] * 2]
    [vertices] = [path.vertices[:, 1] for path in left.collections[0].get_paths()]
    assert (vertices.min(), vertices.max()) == (1.0, 4.0)
    assert lines_of(right) == [([2.0] * 8, [[1.0, 4.0]] * 8), ([], [])]
