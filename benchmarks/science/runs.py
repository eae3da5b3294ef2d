"""Many trainings of an experiment, one a core, kept as they end, so that what was interrupted goes on."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from benchmarks.harness import BenchmarkError, provenance, write_result
from benchmarks.science.tasks import IGNORED, Batch
from solomonov.config import OptimizerConfig
from solomonov.model.transformer import Transformer, compile_blocks
from solomonov.optim import make_optimizer

SCHEMA_VERSION: Final = 1
# Compiling takes 20 s, once for all trainings of a process, and then 1 ms a layer and update instead of 4 where blocks
# are small. What a test trains is far below.
COMPILE_LAYERS: Final = 12
COMPILE_LAYER_UPDATES: Final = 3000
RunT = TypeVar("RunT")
Record = dict[str, Any]


def options_of(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """What was asked for, with the options that every experiment has; `command` makes the same result again.

    Args:
        arguments: None: those of this process.
    """
    parser.add_argument("--out", metavar="FILE", type=Path, help="keep the result there, after every training")
    parser.add_argument("--more", action="store_true", help="take over the trainings that FILE already has")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="trainings at once")
    words = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(words)
    options.command = " ".join([parser.prog, *words])
    return options


def run_all(
    runs: Sequence[RunT],
    train: Callable[[RunT], Record],
    options: argparse.Namespace,
    facts: Record,
    summary: Callable[[list[Record]], list[Record]],
) -> Iterator[Record]:
    """Train what is not kept yet, as many at once as there are workers; yields every record when it is there.

    Args:
        runs: dataclasses; a record holds the fields of its run, and `commit`, the source that it was trained with.
        options: of `options_of`.
        facts: what stands in the result beside `commits`, `summary` and `runs`.
        summary: of the records, for the result.

    Raises:
        BenchmarkError: there is a result at the place of the new one, and --more was not given, or it holds trainings
            that are not asked for.
        BrokenProcessPool: a worker was killed; what had ended is kept.
    """
    out: Path | None = options.out
    if out is not None and out.exists() and not options.more:
        raise BenchmarkError(f"{out} exists: give another --out, or --more to take over the trainings that it holds")
    old: list[Record] = json.loads(out.read_bytes())["runs"] if out is not None and out.exists() else []
    wanted = [asdict(run) for run in runs]  # type: ignore[call-overload]
    kept = {
        number: record for number, fields in enumerate(wanted) for record in old if fields.items() <= record.items()
    }
    alien = len(old) - len({id(record) for record in kept.values()})
    if alien:
        raise BenchmarkError(
            f"{out} holds {alien} trainings that are not asked for, which would be lost: ask for them too, or give "
            "another --out"
        )

    def keep() -> None:
        if out is not None:
            records = [kept[number] for number in sorted(kept)]
            commits = sorted({record["commit"] for record in records})
            write_result(out, {**facts, "commits": commits, "summary": summary(records), "runs": records})

    if kept:
        keep()  # with this command, where nothing is missing as well
    yield from kept.values()
    missing = [number for number in range(len(runs)) if number not in kept]
    pool = ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn"))
    try:
        jobs = {pool.submit(train, runs[number]): number for number in missing}
        for job, number in _ended(jobs):
            kept[number] = {**job.result(), "commit": facts["git_commit"]}
            keep()
            yield kept[number]
    finally:
        pool.shutdown(cancel_futures=True)


def conduct(
    runs: Sequence[RunT],
    train: Callable[[RunT], Record],
    options: argparse.Namespace,
    summary: Callable[[list[Record]], list[Record]],
    line: Callable[[Record], str],
    **facts: Any,
) -> list[Record]:
    """Train them all, say what came of each, and keep the result.

    Args:
        options: of `options_of`.
        line: what is said of a record.
        facts: more that stands in the result.
    """
    print(f"{len(runs)} trainings", flush=True)
    whole = {"schema_version": SCHEMA_VERSION, **provenance(options.command), **facts}
    records = []
    for record in run_all(runs, train, options, whole, summary):
        records.append(record)
        print(line(record), flush=True)
    return records


def schedule(step: int, lr: float, steps: int, warmup: int) -> float:
    """Learning rate of an update, from 0: linear warm-up, constant, linear decay over the last fifth."""
    return lr * min(1.0, (step + 1) / warmup, (steps - step) / (steps // 5))


def fit(model: Transformer, batch: Callable[[int], Batch], *, lr: float, steps: int, warmup: int) -> list[float]:
    """Train with AdamW (0.9, 0.95), weight decay 0.1 and norms clipped at 1; compiles deep models in place.

    Args:
        batch: from the number of an update, from 0, to its rows.
        lr: the peak, times what the parameterisation says of each parameter.

    Returns:
        the training loss of each update in nats a label; fewer than `steps` where one, or its gradient, is not finite.
    """
    settings = OptimizerConfig(lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer = make_optimizer(model.named_parameters(), settings, model.config, fused=True)
    if model.config.layers >= COMPILE_LAYERS and model.config.layers * steps >= COMPILE_LAYER_UPDATES:
        compile_blocks(model)
    losses: list[float] = []
    for step in range(steps):
        ids, documents, labels = batch(step)
        loss = model(ids, documents, labels) / (labels != IGNORED).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]) or not math.isfinite(float(norm)):
            return losses[:-1]
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, lr, steps, warmup) * group["lr_scale"]
        optimizer.step()
    return losses


def _ended(jobs: Mapping[Future[Record], int]) -> Iterator[tuple[Future[Record], int]]:
    """Each with its number when it ends; of those that ended together what failed last, so that the others are kept."""
    waiting = set(jobs)
    while waiting:
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        for job in sorted(done, key=lambda job: (job.exception() is not None, jobs[job])):
            yield job, jobs[job]
