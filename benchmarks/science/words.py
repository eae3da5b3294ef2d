"""Is there something that depth is needed for? The word problem of a group, for shallow and deep models.

    python -m benchmarks.science.words [--layers 4 24] [--modes auto prenorm postnorm] [--windows 2] [--seeds 3]
                                       [--out FILE] [--more] [--picture FILE]

Permutations of `--items` things stand in a row, and at each place is asked what all up to here make together (`tasks`).
In a window of w tokens a layer composes what its neighbours know with what a token knows itself, and knowledge comes
w - 1 places further a layer: of L layers a place sees the last 1 + L (w - 1) permutations, and who is further from the
beginning can but guess what those before make together (`bound`). Whether deep models learn to use all their layers is
what is asked. A window of 0 is none: then a layer may look at all of the row, and shortcuts (arXiv 2210.10749) need
fewer layers.

A decoder of width 32 with 4 heads and a feed-forward of 64, 32 rows an update, AdamW, one rate for all depths, 100
updates of warm-up, the last fifth decays to 0. `auto` is what a model of that depth is by default. One core a run.

all       Share of all places where the likeliest element is the right one, of rows that were not trained on.
last      Likewise of the last quarter of a row, which takes the most.
places    Likewise of each place.
bound     What `all` can be at most, but for luck.
chance    1 / (number of elements).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.harness import table
from benchmarks.science.panels import panels
from benchmarks.science.runs import conduct, fit, options_of
from benchmarks.science.tasks import Batch, Words
from solomonov.model.config import ModelConfig
from solomonov.model.residual import MODES
from solomonov.model.transformer import Transformer

ROWS: Final = 32
HELD_OUT_ROWS: Final = 256


@dataclass(frozen=True)
class Run:
    """One training."""

    mode: str
    layers: int
    window: int
    seed: int
    items: int
    letters: str
    tokens: int
    steps: int
    lr: float


def model_of(run: Run) -> ModelConfig:
    """Of the sizes in the module's docstring."""
    width = {"d_model": 32, "heads": 4, "d_ff": 64}
    attention = {"preset": "rope", "window_tokens": run.window or None}
    return ModelConfig.model_validate({**width, "layers": run.layers, "residual": run.mode, "attention": attention})


def bound(run: Run) -> float:
    """Share of the places that can be known, and of the others what guessing gives."""
    task = task_of(run)
    # Behind the place from which the beginning is just seen there is one from which all but the beginning is.
    known = run.tokens if run.window == 0 else min(run.tokens, 2 + run.layers * (run.window - 1))
    return (known + sum(task.guess(1 + place) for place in range(run.tokens - known))) / run.tokens


def task_of(run: Run) -> Words:
    """What is asked."""
    return Words(run.items, run.letters)


def train(run: Run) -> dict[str, Any]:
    """The record of one training, on one thread."""
    torch.set_num_threads(1)
    task = task_of(run)
    model = Transformer(model_of(run), task.vocabulary, seed=run.seed)

    def batch(step: int) -> Batch:
        return task.batch(ROWS, run.tokens, step, run.seed)

    losses = fit(model, batch, lr=run.lr, steps=run.steps, warmup=min(100, run.steps))
    record = {**asdict(run), "bound": bound(run), "finite": len(losses) == run.steps}
    record["losses"] = [round(loss, 4) for loss in losses[:: max(1, run.steps // 200)]]
    ids, documents, labels = task.batch(HELD_OUT_ROWS, run.tokens, -1, 0)
    with torch.no_grad():
        right = (model(ids, documents).argmax(-1) == labels).float().mean(dim=0)
    record["places"] = [round(share, 4) for share in right.tolist()]
    return {**record, "all": float(right.mean()), "last": float(right[-run.tokens // 4 :].mean())}


def summary(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each window, depth and form: medians over the seeds, with the least and largest."""
    rows = []
    key = lambda record: (-record["window"], record["layers"], record["mode"])  # noqa: E731
    for (_, layers, mode), group in groupby(sorted(records, key=key), key):
        runs = list(group)
        row = {"window": runs[0]["window"], "layers": layers, "mode": mode, "seeds": len(runs)}
        row["bound"] = runs[0]["bound"]
        for name in ("all", "last"):
            values = [run[name] for run in runs]
            row[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        rows.append(row)
    return rows


def report(rows: Sequence[dict[str, Any]], chance: float) -> str:
    """The rows as a table."""
    lines = []
    for row in rows:
        cells = [f"{c['median']:.2f} ({c['min']:.2f} to {c['max']:.2f})" for c in (row["all"], row["last"])]
        window = f"{row['window']}" if row["window"] else "none"
        lines.append([window, f"{row['layers']:3d} {row['mode']}", f"{row['bound']:.2f}", str(row["seeds"]), *cells])
    heads = ["window", "layers form", "bound", "seeds", "all", "last"]
    return table(f"chance {chance:.3f}", heads, lines)


def draw(records: Sequence[dict[str, Any]], picture: Path) -> None:
    """What is right at each place, a panel a window, a line a depth and form: the median, and a band from the worst
    seed to the best."""
    windows = sorted({record["window"] for record in records})
    key = lambda record: (record["layers"], record["mode"])  # noqa: E731
    with panels(picture, 1, len(windows), width=5.0, height=4.0) as [axes]:
        for axis, window in zip(axes, windows, strict=True):
            here = sorted((record for record in records if record["window"] == window), key=key)
            for (layers, mode), group in groupby(here, key):
                columns = list(zip(*(record["places"] for record in group), strict=True))
                places = range(1, len(columns) + 1)
                [curve] = axis.plot(places, list(map(statistics.median, columns)), label=f"{layers} layers, {mode}")
                axis.fill_between(
                    places, list(map(min, columns)), list(map(max, columns)), color=curve.get_color(), alpha=0.2
                )
            title = f"a layer sees {window} tokens" if window else "a layer sees all tokens"
            axis.set(title=title, xlabel="permutations to compose", ylabel="share right", ylim=(0.0, 1.03))
            axis.legend(fontsize=7)


def line(record: dict[str, Any]) -> str:
    """What is said when a training has ended."""
    what = f"window {record['window']} {record['layers']:3d} {record['mode']:10s} seed {record['seed']}"
    return f"{what}: all {record['all']:.2f}, last quarter {record['last']:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print, and keep and draw what came out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.science.words", description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 24])
    parser.add_argument("--modes", nargs="+", choices=["auto", *MODES], default=["auto", "prenorm", "postnorm"])
    parser.add_argument("--windows", type=int, nargs="+", default=[2])
    parser.add_argument("--items", type=int, default=5)
    parser.add_argument("--letters", choices=["two", "all"], default="two")
    parser.add_argument("--tokens", type=int, default=13)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--picture", metavar="FILE", type=Path)
    options = options_of(parser, arguments)
    runs = [
        Run(mode, layers, window, seed, options.items, options.letters, options.tokens, options.steps, options.lr)
        for seed in range(options.seeds)
        for window in options.windows
        for layers in sorted(options.layers, reverse=True)
        for mode in options.modes
    ]
    chance = 1 / Words(options.items).elements
    records = conduct(runs, train, options, summary, line, chance=chance)
    print(report(summary(records), chance))
    if options.picture is not None:
        draw(records, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
