"""Does depth train, without retuning, and is it used? Every residual form at 24 to 1,000 layers, one learning rate.

    python -m benchmarks.science.depth [--layers 24 100] [--modes scaled deepnorm] [--seeds 3] [--out FILE] [--more]
    python -m benchmarks.science.depth --task text --layers 100 --seeds 1

permutation    The noisy permutation (`tasks`): uniform 4.159 nats, floor 0.729. A decoder of width 32 with 2 heads,
               feed-forward of 64, 16 tokens a row.
text           Bytes of Python's own library: uniform 5.545 nats. Width 64, 4 heads, feed-forward of 128, 64 tokens.

8 rows an update; AdamW (0.9, 0.95) with weight decay 0.1, norm clipped at 1, 20 updates of warm-up, the last fifth
decays to 0. One core a run.

loss        Held-out, in nats, after the last update; nan where an update was not finite.
skip        Rise of that loss when each eighth of the layers is passed by, first to last.
first       Share of the first eighth in the sum of the rises: 0.125 where all layers are used alike.
idle        Eighths whose absence changes the loss by less than 0.005.
ratio       Gradient of the first block over that of the last one, before the first update.
growth      Size of the stream behind the last block over that behind the embedding, after the last update.

What it can show is trainability and even use, not the value of depth: one layer can solve this task, and a shallow and
wide model of as many parameters is expected to win on it; its row is printed beside the others.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import groupby
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.harness import table
from benchmarks.science.runs import conduct, fit, options_of
from benchmarks.science.tasks import Batch, NoisyPermutation, Text, library_bytes
from solomonov.model.config import ModelConfig
from solomonov.model.counts import parameter_count
from solomonov.model.residual import MODES
from solomonov.model.signal import as_written, mean_loss, measure_signal, skip_eighths
from solomonov.model.transformer import Transformer

ROWS: Final = 8
HELD_OUT_ROWS: Final = 256
BASE_LAYERS: Final = 6
IDLE_NATS: Final = 0.005
WIDE: Final = "shallow and wide"


@dataclass(frozen=True)
class Setting:
    """What is trained on, and the sizes that fit it."""

    d_model: int
    heads: int
    vocabulary: int
    batch: Callable[[int, int, int], Batch]
    """From rows, number and seed."""
    limits: Mapping[str, float]
    """Losses to compare with, in nats."""

    def shape(self, layers: int) -> dict[str, Any]:
        """Fields of the deep model."""
        width = {"d_model": self.d_model, "heads": self.heads, "d_ff": 2 * self.d_model}
        return {**width, "layers": layers, "base_layers": BASE_LAYERS}


def unigram_nats(text: Tensor) -> float:
    """Entropy of single bytes."""
    share = torch.bincount(text.long(), minlength=1).double() / len(text)
    return float(-torch.special.xlogy(share, share).sum())


@cache
def setting_of(task: str) -> Setting:
    """The setting of a task, by its name."""
    if task == "permutation":
        permutation = NoisyPermutation()
        limits = {"uniform": permutation.uniform, "floor": permutation.floor}
        return Setting(32, 2, permutation.symbols, permutation.batch, limits)
    text = Text()
    limits = {"uniform": math.log(text.vocabulary), "unigram": unigram_nats(library_bytes())}
    return Setting(64, 4, text.vocabulary, lambda rows, number, seed: text.batch(rows, 64, number, seed), limits)


TASKS: Final = ("permutation", "text")


@dataclass(frozen=True)
class Run:
    """One training."""

    mode: str
    """A residual form, or WIDE: two layers of prenorm, so wide that they have the parameters of the deep model."""
    layers: int
    """Of the deep model."""
    lr: float
    """Peak learning rate."""
    seed: int
    """Of the weights and the rows."""
    steps: int
    """Updates."""
    warmup: int
    """Updates until the peak."""
    task: str = "permutation"


def model_of(run: Run) -> ModelConfig:
    """The model of a run: that of the table in the module's docstring, or its wide counterpart."""
    setting = setting_of(run.task)
    attention = {"preset": "rope"}
    deep = {**setting.shape(run.layers), "attention": attention}
    if run.mode != WIDE:
        return ModelConfig.model_validate({**deep, "residual": run.mode})
    wanted = parameter_count(ModelConfig.model_validate(deep), setting.vocabulary)
    width, head = setting.d_model, setting.d_model // setting.heads
    while True:
        shape = {"layers": 2, "d_model": width, "heads": width // head, "d_ff": 2 * width}
        wide = ModelConfig.model_validate({**shape, "residual": "prenorm", "attention": attention})
        if parameter_count(wide, setting.vocabulary) >= wanted:
            return wide
        width += head


def train(run: Run) -> dict[str, Any]:
    """The record of one training, on one thread."""
    torch.set_num_threads(1)
    setting = setting_of(run.task)
    model = Transformer(model_of(run), setting.vocabulary, seed=run.seed)

    def batch(step: int) -> Batch:
        return setting.batch(ROWS, step, run.seed)

    held_out = setting.batch(HELD_OUT_ROWS, -1, 0)
    first = measure_signal(model, *batch(0))
    losses = fit(model, batch, lr=run.lr, steps=run.steps, warmup=run.warmup)
    record: dict[str, Any] = {**asdict(run), "losses": [round(loss, 4) for loss in losses]}
    record |= {"gradient_ratio": first.gradient_ratio, "finite": len(losses) == run.steps}
    if record["finite"]:
        # With gradients, a few rows: 256 of them keep 16 GB in 1,000 layers.
        ids, documents, labels = (each[:ROWS] for each in held_out)
        with as_written(model.blocks()):  # compiling once more for other shapes takes longer
            last = measure_signal(model, ids, documents, labels)
            skip = skip_eighths(model, *held_out)
            record |= {"loss": mean_loss(model, *held_out), "growth": last.growth, "skip": list(skip)}
    return record


def first_share(record: dict[str, Any]) -> float:
    """Part of the first eighth in what all eighths are worth, those that do harm counted as nothing."""
    worth = [max(0.0, rise) for rise in record["skip"]]
    return worth[0] / sum(worth) if sum(worth) else math.nan


def idle(record: dict[str, Any]) -> int:
    """Eighths that may as well not be there."""
    return sum(abs(rise) < IDLE_NATS for rise in record["skip"])


def summary(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each form, depth and rate: medians over the seeds, and the least and largest loss."""
    rows = []
    key = lambda record: (record["layers"], record["mode"], record["lr"], record["warmup"])  # noqa: E731
    for (layers, mode, lr, warmup), group in groupby(sorted(records, key=key), key):
        runs = list(group)
        whole = [run for run in runs if run["finite"]]
        row = {"layers": layers, "mode": mode, "lr": lr, "warmup": warmup, "seeds": len(runs), "finite": len(whole)}
        row["steps"] = runs[0]["steps"]
        row["gradient_ratio"] = statistics.median(run["gradient_ratio"] for run in runs)
        if whole:
            row["loss"] = statistics.median(run["loss"] for run in whole)
            row["loss_range"] = [min(run["loss"] for run in whole), max(run["loss"] for run in whole)]
            row["first_share"] = statistics.median(first_share(run) for run in whole)
            row["idle"] = statistics.median(idle(run) for run in whole)
            row["growth"] = statistics.median(run["growth"] for run in whole)
        rows.append(row)
    return sorted(rows, key=lambda row: (row["layers"], row.get("loss", math.inf)))


def report(rows: Sequence[dict[str, Any]], limits: Mapping[str, float]) -> str:
    """The rows as a table, under the losses to compare them with."""
    heads = ["layers form", "lr", "steps", "seeds", "loss", "least to largest", "first", "idle", "ratio", "growth"]
    lines = []
    for row in rows:
        name = row["mode"] if row["warmup"] <= 20 else f"{row['mode']}, warm-up {row['warmup']}"
        line = [f"{row['layers']:4d} {name}", f"{row['lr']:g}", str(row["steps"]), f"{row['finite']}/{row['seeds']}"]
        if "loss" in row:
            low, high = row["loss_range"]
            line += [f"{row['loss']:.2f}", f"{low:.2f} to {high:.2f}", f"{row['first_share']:.2f}", f"{row['idle']:g}"]
        else:
            line += ["nan", "", "", ""]
        growth = f"{row['growth']:.1f}" if "growth" in row else ""
        lines.append([*line, f"{row['gradient_ratio']:.2g}", growth])
    title = ", ".join(f"{name} {nats:.3f} nats" for name, nats in limits.items())
    return table(title, heads, lines)


def runs_of(options: argparse.Namespace) -> list[Run]:
    """What is asked for: every form and depth, and at 100 layers two arms that are fair to the control."""
    runs = []
    for layers in options.layers:
        steps = options.steps or (1500 if options.task == "text" else 80 if layers >= 500 else 150)
        seeds = range(options.seeds if layers <= 100 else 1)
        for mode in options.modes:
            for lr in options.lrs if layers == 100 else [1e-3]:
                runs += [Run(mode, layers, lr, seed, steps, 20) for seed in seeds]
            if mode == "postnorm" and layers <= 100:  # a small rate and a long warm-up: how it is trained elsewhere
                runs += [Run(mode, layers, 1e-4, seed, 10 * steps, steps) for seed in seeds]
        if layers <= 100:
            runs += [Run(WIDE, layers, 1e-3, seed, steps, 20) for seed in seeds]
    runs = [replace(run, task=options.task) for run in runs]
    # The long ones first: the cores end together.
    return sorted(runs, key=lambda run: run.layers * run.steps, reverse=True)


def line(record: dict[str, Any]) -> str:
    """What is said when a training has ended."""
    loss = f"{record['loss']:.2f}" if record["finite"] else "not finite"
    return f"{record['layers']:5d} {record['mode']:18s} lr {record['lr']:g} seed {record['seed']}: {loss}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print, and keep what came out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.science.depth", description=__doc__.partition("\n")[0])
    parser.add_argument("--task", choices=TASKS, default="permutation")
    parser.add_argument("--layers", type=int, nargs="+", default=[24, 100, 200, 1000])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--lrs", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3], help="at 100 layers; elsewhere 1e-3"
    )
    parser.add_argument("--seeds", type=int, default=3, help="up to 100 layers; beyond one")
    parser.add_argument("--steps", type=int, help="default: 150, at 500 layers and more 80, of text 1500")
    options = options_of(parser, arguments)
    limits = dict(setting_of(options.task).limits)
    runs = runs_of(options)
    records = conduct(runs, train, options, summary, line, limits=limits)
    print(report(summary(records), limits))
    return 0


if __name__ == "__main__":
    sys.exit(main())
