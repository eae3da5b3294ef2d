"""Does the learning rate found at 6 layers hold at 24 and 96? Under the parameterisations sp and completep.

    python -m benchmarks.science.transfer [--task text] [--layers 6 24 96] [--seeds 2] [--out FILE] [--more]

The noisy permutation or text (`tasks`) at the sizes of `benchmarks.science.depth`, 100 updates; learning rates a factor
of two apart. `sp` is pre-norm, one rate for all parameters; `completep` scales the branches by 6 / layers, and initial
values, rates and eps with them. The permutation is all but solved by then, at most rates; text is not.

best      The rate with the least held-out loss, median over the seeds; a loss that is not finite is the worst.
off by    Factor between the best rate here and the best one at the least depth: 1 where it holds.
price     What it costs, in nats, to take here the rate that is best at the least depth, over the best rate here.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.harness import table
from benchmarks.science.depth import BASE_LAYERS, HELD_OUT_ROWS, ROWS, TASKS, setting_of
from benchmarks.science.panels import bars, panels
from benchmarks.science.runs import conduct, fit, options_of
from benchmarks.science.tasks import Batch
from solomonov.model.config import ModelConfig
from solomonov.model.signal import mean_loss
from solomonov.model.transformer import Transformer

RATES: Final = [2.0**exponent for exponent in range(-12, -4)]
KINDS: Final[dict[str, dict[str, Any]]] = {
    "sp": {"parameterization": "sp", "residual": "prenorm"},
    "completep": {"parameterization": "completep", "residual": "scaled"},
}


@dataclass(frozen=True)
class Run:
    """One training."""

    kind: str
    layers: int
    lr: float
    seed: int
    steps: int = 100
    task: str = "permutation"


def train(run: Run) -> dict[str, Any]:
    """The record of one training, on one thread."""
    torch.set_num_threads(1)
    setting = setting_of(run.task)
    config = ModelConfig.model_validate(
        {**setting.shape(run.layers), **KINDS[run.kind], "attention": {"preset": "rope"}}
    )
    model = Transformer(config, setting.vocabulary, seed=run.seed)

    def batch(step: int) -> Batch:
        return setting.batch(ROWS, step, run.seed)

    losses = fit(model, batch, lr=run.lr, steps=run.steps, warmup=20)
    finite = len(losses) == run.steps
    loss = mean_loss(model, *setting.batch(HELD_OUT_ROWS, -1, 0)) if finite else None
    return {**asdict(run), "finite": finite, "loss": loss, "losses": [round(loss, 4) for loss in losses]}


def summary(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each parameterisation and depth."""
    rows: list[dict[str, Any]] = []
    key = lambda record: (list(KINDS).index(record["kind"]), record["layers"])  # noqa: E731
    for _, group in groupby(sorted(records, key=key), key):
        runs = list(group)
        row: dict[str, Any] = {name: runs[0][name] for name in ("kind", "layers", "steps")}
        by_rate: dict[float, list[float]] = {}
        for run in runs:
            by_rate.setdefault(run["lr"], []).append(run["loss"] if run["finite"] else math.inf)
        medians = {rate: statistics.median(losses) for rate, losses in sorted(by_rate.items())}
        row["best"] = min(medians, key=lambda rate: medians[rate])
        row["seeds"] = min(map(len, by_rate.values()))
        row["losses"] = [[rate, loss if math.isfinite(loss) else None] for rate, loss in medians.items()]
        first = next((other for other in rows if other["kind"] == row["kind"]), row)
        there = medians.get(first["best"], math.inf)
        row["off_by"] = row["best"] / first["best"]
        row["price"] = there - medians[row["best"]] if math.isfinite(there) else None
        rows.append(row)
    return rows


def report(rows: Sequence[dict[str, Any]], limits: dict[str, float]) -> str:
    """The rows as a table: the loss at every rate."""
    rates = sorted({rate for row in rows for rate, _ in row["losses"]})
    lines = []
    for row in rows:
        losses = dict(row["losses"])
        cells = ["" if rate not in losses else f"{losses[rate]:.2f}" if losses[rate] else "nan" for rate in rates]
        price = "nan" if row["price"] is None else f"{row['price']:.2f}"
        lines.append([f"{row['kind']:10s} {row['layers']:3d} layers", *cells, f"{row['off_by']:g}", price])
    title = "held-out loss by learning rate; " + ", ".join(f"{name} {nats:.3f}" for name, nats in limits.items())
    return table(title, ["", *(f"{rate:.2g}" for rate in rates), "off by", "price"], lines)


def draw(records: Sequence[dict[str, Any]], picture: Path) -> None:
    """Loss against the rate, a panel a parameterisation, a line a depth; what was not finite is not drawn."""
    kinds = sorted({record["kind"] for record in records}, key=list(KINDS).index)
    with panels(picture, 1, len(kinds), width=5.5, height=4.0) as [axes]:
        for axis in axes[1:]:
            axis.sharey(axes[0])
        for axis, kind in zip(axes, kinds, strict=True):
            here = [record for record in records if record["kind"] == kind]
            for layers in sorted({record["layers"] for record in here}):
                losses: dict[float, list[float]] = {}
                for record in here:
                    if record["layers"] == layers and record["finite"]:
                        losses.setdefault(record["lr"], []).append(record["loss"])
                bars(axis, losses, label=f"{layers} layers")
            axis.set(title=kind, xlabel="learning rate", ylabel="held-out loss, nats")
            axis.set_xscale("log", base=2)
            axis.legend()


def line(record: dict[str, Any]) -> str:
    """What is said when a training has ended."""
    loss = f"{record['loss']:.2f}" if record["finite"] else "not finite"
    return f"{record['kind']:10s} {record['layers']:3d} lr {record['lr']:.2g} seed {record['seed']}: {loss}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print, keep and draw what came out."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.science.transfer", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--task", choices=TASKS, default="permutation")
    parser.add_argument("--layers", type=int, nargs="+", default=[BASE_LAYERS, 24, 96])
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--picture", metavar="FILE", type=Path)
    options = options_of(parser, arguments)
    limits = dict(setting_of(options.task).limits)
    runs = [
        Run(kind, layers, lr, seed, options.steps, options.task)
        for layers in sorted(options.layers, reverse=True)
        for kind in KINDS
        for lr in options.rates
        for seed in range(options.seeds)
    ]
    records = conduct(runs, train, options, summary, line, limits=limits)
    rows = summary(records)
    print(report(rows, limits))
    if options.picture is not None:
        draw(records, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
