"""Many trainings of an experiment, one a core, kept as they end, so that what was interrupted goes on."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.harness import BenchmarkError, write_result

RunT = TypeVar("RunT")
Record = dict[str, Any]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that every experiment has."""
    parser.add_argument("--out", metavar="FILE", type=Path, help="keep the result there, after every training")
    parser.add_argument("--more", action="store_true", help="take over the trainings that FILE already has")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="trainings at once")


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
        options: of `add_options`.
        facts: what stands in the result beside `commits`, `summary` and `runs`.
        summary: of the records, for the result.

    Raises:
        BenchmarkError: there is a result at the place of the new one, and --more was not given.
    """
    out: Path | None = options.out
    if out is not None and out.exists() and not options.more:
        raise BenchmarkError(f"{out} exists: give another --out, or --more to take over the trainings that it holds")
    old: list[Record] = json.loads(out.read_bytes())["runs"] if out is not None and out.exists() else []
    wanted = [asdict(run) for run in runs]  # type: ignore[call-overload]
    kept = {
        number: record for number, fields in enumerate(wanted) for record in old if fields.items() <= record.items()
    }
    yield from kept.values()
    missing = [number for number in range(len(runs)) if number not in kept]
    with multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=4) as pool:
        jobs = [(number, train, runs[number]) for number in missing]
        for number, record in pool.imap_unordered(_numbered, jobs):
            kept[number] = {**record, "commit": facts["git_commit"]}
            if out is not None:
                records = [kept[number] for number in sorted(kept)]
                commits = sorted({record["commit"] for record in records})
                write_result(out, {**facts, "commits": commits, "summary": summary(records), "runs": records})
            yield kept[number]


def _numbered(job: tuple[int, Callable[[Any], Record], Any]) -> tuple[int, Record]:
    number, train, run = job
    return number, train(run)
