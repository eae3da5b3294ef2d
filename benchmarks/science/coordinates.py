"""Do updates move a wide and a deep model as far as a small one? The coordinate check, in numbers and as a picture.

    python -m benchmarks.science.coordinates [--widths 32 64 128] [--depths 4 16 64] [--out FILE] [--picture FILE.png]

As in arXiv 2203.03466, appendix D.1: a few updates of AdamW at one rate on the noisy permutation (`tasks`), and how far
they move what is computed, as a root mean square over rows, tokens and channels. Once with the width growing at 4
layers, once with the depth at width 32; `sp` and `mup` are pre-norm, `completep` scales the branches by 4 / layers.
What is flat in a column of the picture holds there, and so will a rate that was found on the small model.

stream    Moved behind the last block.
logits    Moved.
grows     Factor between what the largest of a kind's sizes is moved by and what the least one is.
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
from torch import Tensor

from benchmarks.harness import table
from benchmarks.science.panels import bars, panels
from benchmarks.science.runs import conduct, options_of
from benchmarks.science.tasks import NoisyPermutation
from solomonov.config import OptimizerConfig
from solomonov.model.config import ModelConfig
from solomonov.model.transformer import Transformer
from solomonov.optim import make_optimizer

WIDTH: Final = 32
DEPTH: Final = 4
ROWS: Final = 8
TASK: Final = NoisyPermutation()
KINDS: Final[dict[str, str]] = {"sp": "prenorm", "mup": "prenorm", "completep": "scaled"}
"""Parameterisation -> residual form."""
MOVED: Final = ("stream", "logits")
DASHES: Final = {"sp": "-", "mup": "--", "completep": "-"}
"""Of lines: at the base's width sp and mup are one."""


@dataclass(frozen=True)
class Run:
    """A model, and the updates that move it."""

    kind: str
    grows: str
    """`width` or `depth`: of which sweep it is."""
    width: int
    depth: int
    seed: int
    updates: int = 4
    lr: float = 1e-3


def model_of(run: Run) -> ModelConfig:
    """Heads of width 16, a feed-forward of twice the width."""
    shape = {"layers": run.depth, "d_model": run.width, "heads": run.width // 16, "d_ff": 2 * run.width}
    base = {"base_layers": DEPTH, **({} if run.kind == "sp" else {"base_d_model": WIDTH})}
    kind = {"parameterization": run.kind, "residual": KINDS[run.kind], "attention": {"preset": "rope"}}
    return ModelConfig.model_validate({**shape, **base, **kind})


def computed(model: Transformer, ids: Tensor, documents: Tensor) -> dict[str, Tensor]:
    """What is looked at: the stream (B, T, D) behind the last block, and the logits (B, T, V)."""
    found: dict[str, Tensor] = {}
    seen = model.layers[-1].register_forward_hook(lambda _, given, stream: found.update(stream=stream[0]))
    with seen, torch.no_grad():
        found["logits"] = model(ids, documents)
    return found


def train(run: Run) -> dict[str, Any]:
    """The record of one model, on one thread."""
    torch.set_num_threads(1)
    config = model_of(run)
    model = Transformer(config, TASK.symbols, seed=run.seed)
    settings = OptimizerConfig(lr=run.lr, weight_decay=0.0)
    optimizer = make_optimizer(model.named_parameters(), settings, config, fused=False)
    for group in optimizer.param_groups:
        group["lr"] = run.lr * group["lr_scale"]
    ids, documents, labels = TASK.batch(ROWS, 0, run.seed)
    before = computed(model, ids, documents)
    for _ in range(run.updates):
        optimizer.zero_grad()
        (model(ids, documents, labels) / labels.numel()).backward()
        optimizer.step()
    after = computed(model, ids, documents)
    return {**asdict(run), **{name: float((after[name] - before[name]).square().mean().sqrt()) for name in MOVED}}


def size_of(record: dict[str, Any]) -> int:
    """Of what grows."""
    return int(record[record["grows"]])


def summary(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each sweep of each kind: medians over the seeds by size."""
    rows: list[dict[str, Any]] = []
    key = lambda record: (record["grows"] != "width", list(KINDS).index(record["kind"]))  # noqa: E731
    for _, group in groupby(sorted(records, key=key), key):
        runs = sorted(group, key=size_of)
        row: dict[str, Any] = {name: runs[0][name] for name in ("kind", "grows", "updates", "lr")}
        for name in MOVED:
            by_size = {size: [run[name] for run in same] for size, same in groupby(runs, size_of)}
            medians = [[size, statistics.median(values)] for size, values in by_size.items()]
            row[name] = {"medians": medians, "grows": medians[-1][1] / medians[0][1]}
        row["seeds"] = min(len(list(same)) for _, same in groupby(runs, size_of))
        rows.append(row)
    return rows


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as tables, one a sweep."""
    parts = []
    for grows, group in groupby(rows, lambda row: row["grows"]):
        swept = list(group)
        sizes = sorted({size for row in swept for size, _ in row["stream"]["medians"]})
        lines = []
        for row in swept:
            for name in MOVED:
                moved = dict(row[name]["medians"])
                cells = [f"{moved[size]:.3g}" if size in moved else "" for size in sizes]
                lines.append([f"{row['kind']:10s} {name}", *cells, f"{row[name]['grows']:.2g}"])
        parts.append(
            table(f"moved by {swept[0]['updates']} updates, by {grows}", ["", *map(str, sizes), "grows"], lines)
        )
    return "\n\n".join(parts)


def draw(records: Sequence[dict[str, Any]], picture: Path) -> None:
    """A column for what grows, a row for what is moved, a line a kind."""
    sweeps = list(dict.fromkeys(record["grows"] for record in records))
    with panels(picture, len(MOVED), len(sweeps), width=5.0, height=3.2) as grid:
        for axes, name in zip(grid, MOVED, strict=True):
            for axis, grows in zip(axes, sweeps, strict=True):
                here = [record for record in records if record["grows"] == grows]
                for kind in sorted({record["kind"] for record in here}, key=list(KINDS).index):
                    moved: dict[float, list[float]] = {}
                    for record in here:
                        if record["kind"] == kind:
                            moved.setdefault(size_of(record), []).append(record[name])
                    bars(axis, moved, linestyle=DASHES[kind], label=kind)
                axis.set(xlabel=grows, ylabel=f"{name}, moved")
                axis.set_xscale("log", base=2)
                axis.set_ylim(bottom=0.0)
                axis.legend()


def line(record: dict[str, Any]) -> str:
    """What is said when one has been measured."""
    what = f"{record['kind']:10s} width {record['width']:4d} depth {record['depth']:4d} seed {record['seed']}"
    return f"{what}: stream {record['stream']:.3g}, logits {record['logits']:.3g}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Move, print, keep and draw what came out."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.science.coordinates", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--picture", metavar="FILE", type=Path)
    options = options_of(parser, arguments)
    sizes = [("width", width, DEPTH) for width in options.widths] + [
        ("depth", WIDTH, depth) for depth in options.depths
    ]
    runs = [
        Run(kind, grows, width, depth, seed, options.updates)
        for grows, width, depth in sizes
        for kind in KINDS
        for seed in range(options.seeds)
    ]
    records = conduct(runs, train, options, summary, line)
    print(report(summary(records)))
    if options.picture is not None:
        draw(records, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
