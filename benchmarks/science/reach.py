"""How far does attention reach beyond the rows it was trained on? Each kind of attention, equal parameters and tokens.

    python -m benchmarks.science.reach [--tasks recall copy] [--kinds rope hybrid] [--seeds 3] [--out FILE] [--more]

A decoder of 4 layers of width 64 with 4 heads and a feed-forward of 128 (106 beside gates), trained on rows of 128
tokens, 16 rows an update, AdamW at 2e-3; then asked on rows of 1, 2, 4 and 8 times that length. One core a run.

recall, passkey, copy    Share of the asked tokens that are the likeliest one (see `tasks`).
text                     Held-out loss in nats a byte of 128 bytes, the same ones behind 0, 128, 384 and 896 others.

Medians over the seeds, with the least and largest. `vanilla` is the Transformer of 2017.
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
from benchmarks.science.panels import bars, panels
from benchmarks.science.runs import conduct, fit, options_of
from benchmarks.science.tasks import IGNORED, Batch, Copy, Passkey, Recall, Task, Text
from solomonov.model.config import ModelConfig
from solomonov.model.counts import parameter_count
from solomonov.model.transformer import Transformer

TOKENS: Final = 128
TIMES: Final = (1, 2, 4, 8)
TASKS: Final[dict[str, Task]] = {"recall": Recall(), "passkey": Passkey(), "copy": Copy(), "text": Text()}
STEPS: Final = {"recall": 2000, "passkey": 2000, "copy": 2000, "text": 2000}
KINDS: Final[dict[str, dict[str, Any]]] = {
    "vanilla": {"preset": "vanilla"},
    "rope": {"preset": "rope"},
    "nope": {"preset": "rope", "position": "nope"},
    "alibi": {"preset": "alibi"},
    "windows only": {"preset": "rope", "window_tokens": TOKENS // 4},
    "hybrid": {"preset": "hybrid", "train_tokens": TOKENS},
}


@dataclass(frozen=True)
class Run:
    """One training."""

    task: str
    kind: str
    seed: int
    steps: int
    rows: int = 16
    asked_rows: int = 256
    """At each length, in batches of 16."""
    lr: float = 2e-3


def model_of(run: Run) -> ModelConfig:
    """4 layers of width 64; where attention has more parameters than `rope`, gates, the feed-forward has fewer."""
    shape = {"layers": 4, "d_model": 64, "heads": 4, "residual": "prenorm"}
    vocabulary, inner = TASKS[run.task].vocabulary, 128
    most = parameter_count(ModelConfig.model_validate({**shape, "d_ff": inner, "attention": KINDS["rope"]}), vocabulary)
    while True:
        config = ModelConfig.model_validate({**shape, "d_ff": inner, "attention": KINDS[run.kind]})
        if parameter_count(config, vocabulary) <= most:
            return config
        inner -= 1


def train(run: Run) -> dict[str, Any]:
    """The record of one training, on one thread."""
    torch.set_num_threads(1)
    task = TASKS[run.task]
    config = model_of(run)
    model = Transformer(config, task.vocabulary, seed=run.seed)
    losses = fit(
        model, lambda step: task.batch(run.rows, TOKENS, step, run.seed), lr=run.lr, steps=run.steps, warmup=100
    )
    found = {str(times): asked(model, run, times) for times in TIMES}
    parameters = parameter_count(config, task.vocabulary)
    return {**asdict(run), "parameters": parameters, "losses": losses[:: max(1, run.steps // 200)], "found": found}


def rows_of(task: Task, times: int, number: int) -> Batch:
    """16 rows of so many times the length; those of text end alike at every length, and there they are asked about."""
    if not isinstance(task, Text):
        return task.batch(16, times * TOKENS, -1 - number, 0)
    ids, documents, labels = (each[:, -times * TOKENS :] for each in task.batch(16, TIMES[-1] * TOKENS, -1 - number, 0))
    labels = labels.clone()
    labels[:, :-TOKENS] = IGNORED
    return ids, documents, labels


@torch.no_grad()
def asked(model: Transformer, run: Run, times: int) -> float:
    """What a trained model finds in rows of so many times the length: a share, or nats."""
    task, right, sums, count = TASKS[run.task], 0, 0.0, 0
    for number in range(run.asked_rows // 16):
        ids, documents, labels = rows_of(task, times, number)
        logits = model(ids, documents)
        wanted = labels != IGNORED
        here, there = logits[wanted], labels[wanted]
        sums += float(torch.nn.functional.cross_entropy(here, there, reduction="sum"))
        right += int((here.argmax(-1) == there).sum())
        count += int(wanted.sum())
    return sums / count if run.task == "text" else right / count


def summary(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each task and kind: median, least and largest at each length."""
    rows = []
    key = lambda record: (list(TASKS).index(record["task"]), list(KINDS).index(record["kind"]))  # noqa: E731
    for _, group in groupby(sorted(records, key=key), key):
        runs = list(group)
        row = {"task": runs[0]["task"], "kind": runs[0]["kind"], "seeds": len(runs), "steps": runs[0]["steps"]}
        for times in map(str, TIMES):
            values = [run["found"][times] for run in runs]
            row[times] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        rows.append(row)
    return rows


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = []
    for row in rows:
        cells = [f"{c['median']:.2f} ({c['min']:.2f} to {c['max']:.2f})" for c in (row[str(t)] for t in TIMES)]
        lines.append([f"{row['task']:8s} {row['kind']}", *cells])
    heads = [f"{times} x {TOKENS}" for times in TIMES]
    return table("found in rows of so many tokens; trained on 128", ["task, attention", *heads], lines)


def draw(rows: Sequence[dict[str, Any]], picture: Path) -> None:
    """What is found against the length of the row, a panel a task, a line a kind, from the least seed to the best."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    with panels(picture, 1, len(tasks), width=5.0, height=4.0) as [axes]:
        for axis, task in zip(axes, tasks, strict=True):
            for row in (row for row in rows if row["task"] == task):
                found: dict[float, list[float]] = {times * TOKENS: list(row[str(times)].values()) for times in TIMES}
                bars(axis, found, label=row["kind"])
            what = "loss of the last tokens, nats a byte" if task == "text" else "share found"
            axis.set(title=f"{task}, trained on {TOKENS} tokens", xlabel="tokens of a row", ylabel=what)
            axis.set_xscale("log", base=2)
            axis.legend(fontsize=7)


def line(record: dict[str, Any]) -> str:
    """What is said when a training has ended."""
    found = " ".join(f"{record['found'][str(times)]:.2f}" for times in TIMES)
    return f"{record['task']:8s} {record['kind']:13s} seed {record['seed']}: {found}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, ask, print, and keep what came out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.science.reach", description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="updates (default: 2000)")
    parser.add_argument("--asked-rows", type=int, default=256, help="at each length (default: 256)")
    parser.add_argument("--picture", metavar="FILE", type=Path)
    options = options_of(parser, arguments)
    runs = [
        Run(task, kind, seed, options.steps or STEPS[task], asked_rows=options.asked_rows)
        for task in options.tasks
        for kind in options.kinds
        for seed in range(options.seeds)
    ]
    rows = summary(conduct(runs, train, options, summary, line))
    print(report(rows))
    if options.picture is not None:
        draw(rows, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
