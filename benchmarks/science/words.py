"""Is there something that depth is needed for? The word problem of a group, for shallow and deep models.

    python -m benchmarks.science.words [--layers 4 24] [--modes scaled postnorm] [--seeds 3] [--out FILE] [--more]

Permutations of `--items` things stand in a row, and at each place is asked what all up to here make together (`tasks`).
Attention looks at all places at once, but a layer composes only so much: the number of layers that it takes grows with
the length of the row. A decoder of width 64 with 4 heads and feed-forward of 128, 32 rows an update, AdamW, one rate
for all depths, 100 updates of warm-up, the last fifth decays to 0. One core a run.

all       Share of all places where the likeliest element is the right one, of rows that were not trained on.
last      Likewise of the last quarter of a row, which takes the most.
chance    1 / (number of elements).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Final

import torch

from benchmarks.harness import table
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
    seed: int
    items: int
    tokens: int
    steps: int
    lr: float


def model_of(run: Run) -> ModelConfig:
    """Of the sizes in the module's docstring."""
    width = {"d_model": 64, "heads": 4, "d_ff": 128}
    rest = {"layers": run.layers, "residual": run.mode, "base_layers": 6, "attention": {"preset": "rope"}}
    return ModelConfig.model_validate({**width, **rest})


def train(run: Run) -> dict[str, Any]:
    """The record of one training, on one thread."""
    torch.set_num_threads(1)
    task = Words(run.items)
    model = Transformer(model_of(run), task.vocabulary, seed=run.seed)

    def batch(step: int) -> Batch:
        return task.batch(ROWS, run.tokens, step, run.seed)

    losses = fit(model, batch, lr=run.lr, steps=run.steps, warmup=min(100, run.steps))
    record = {**asdict(run), "finite": len(losses) == run.steps}
    record["losses"] = [round(loss, 4) for loss in losses[:: max(1, run.steps // 200)]]
    ids, documents, labels = task.batch(HELD_OUT_ROWS, run.tokens, -1, 0)
    with torch.no_grad():
        right = (model(ids, documents).argmax(-1) == labels).float()
    return {**record, "all": float(right.mean()), "last": float(right[:, -run.tokens // 4 :].mean())}


def summary(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each form and depth: medians over the seeds, with the least and largest."""
    rows = []
    key = lambda record: (record["layers"], record["mode"])  # noqa: E731
    for (layers, mode), group in groupby(sorted(records, key=key), key):
        runs = list(group)
        row: dict[str, Any] = {"layers": layers, "mode": mode, "seeds": len(runs)}
        for name in ("all", "last"):
            values = [run[name] for run in runs]
            row[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        rows.append(row)
    return rows


def report(rows: Sequence[dict[str, Any]], items: int) -> str:
    """The rows as a table."""
    lines = []
    for row in rows:
        cells = [f"{c['median']:.2f} ({c['min']:.2f} to {c['max']:.2f})" for c in (row["all"], row["last"])]
        lines.append([f"{row['layers']:3d} {row['mode']}", str(row["seeds"]), *cells])
    return table(f"chance {1 / Words(items).elements:.3f}", ["layers form", "seeds", "all", "last"], lines)


def line(record: dict[str, Any]) -> str:
    """What is said when a training has ended."""
    what = f"{record['layers']:3d} {record['mode']:10s} seed {record['seed']}"
    return f"{what}: all {record['all']:.2f}, last quarter {record['last']:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print, and keep what came out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.science.words", description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 24])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["prenorm", "scaled", "postnorm"])
    parser.add_argument("--items", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=3)
    options = options_of(parser, arguments)
    runs = [
        Run(mode, layers, seed, options.items, options.tokens, options.steps, options.lr)
        for layers in sorted(options.layers, reverse=True)
        for mode in options.modes
        for seed in range(options.seeds)
    ]
    chance = 1 / Words(options.items).elements
    records = conduct(runs, train, options, summary, line, chance=chance)
    print(report(summary(records), options.items))
    return 0


if __name__ == "__main__":
    sys.exit(main())
