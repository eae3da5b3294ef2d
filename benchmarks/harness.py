"""What every benchmark needs: child processes, CPU time of a tree of processes, spreads, facts of the machine."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import select
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import psutil

from launcher.child import Child, ChildCommand, start_child

ROOT: Final = Path(__file__).resolve().parents[1]


class BenchmarkError(RuntimeError):
    """A program that a benchmark started did not do what it should: there is nothing to report."""


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, smallest and largest of some measurements, and the measurements."""
    exact = [round(value, 6) for value in values]
    return {"median": round(statistics.median(exact), 6), "min": min(exact), "max": max(exact), "values": exact}


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def cpu_seconds(root: int) -> dict[int, float]:
    """CPU seconds (user and system) so far of every process below `root`, by process."""
    found = {}
    for process in psutil.Process(root).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            found[process.pid] = times.user + times.system
    return found


def busy_seconds() -> float:
    """CPU seconds so far that anybody has used on this machine."""
    times = psutil.cpu_times()
    return float(times.user + times.system + times.nice + times.irq + times.softirq)


@contextmanager
def program(words: Sequence[str], log: Path, extra: Mapping[str, str]) -> Iterator[Child]:
    """`python WORDS` in the repository's root with one thread a library; none of its group outlives the context."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **extra}
    child = start_child(ChildCommand([sys.executable, *words], environment, log, working_directory=ROOT))
    try:
        yield child
    finally:
        child.reap()


def wait(child: Child, log: Path, *, seconds: float, expected: int = 0) -> None:
    """Waits for a program's end.

    Raises:
        BenchmarkError: it still runs after so many seconds, or ends with another code.
    """
    ended, _, _ = select.select([child.exit_fd], [], [], seconds)
    if not ended or child.exit_code() != expected:
        fate = f"ended with {child.exit_code()}" if ended else f"still runs after {seconds:g} s"
        raise BenchmarkError(f"a program {fate}:\n{log.read_text(errors='replace')[-4000:]}")


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("ray", "torch", "numpy")},
    }


NO_RESULTS = (":!docs/results", ":!benchmarks/results")
"""For git: but for what came out, which makes no figures, and is gone on with by --more."""


def provenance(command: str) -> dict[str, Any]:
    """When and from which source a result was made."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_commit": git("rev-parse", "HEAD"),
        "git_changed_files": len(git("status", "--porcelain", "--", ".", *NO_RESULTS).splitlines()),
        "machine": machine(),
    }


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as text: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if not at else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  " + "  ".join(cells).rstrip()

    return "\n".join([title, line(header), *map(line, rows), ""])


def run(
    module: str,
    about: str | None,
    measure: Callable[[bool, str], Mapping[str, Any]],
    report: Callable[[Mapping[str, Any]], str],
) -> None:
    """The command of a benchmark.

    Args:
        module: its name.
        about: for --help.
        measure: from whether --quick was given, and the command, to the result.
        report: the tables of a result.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the result there, as JSON")
    parser.add_argument("--quick", action="store_true", help="small, for tests")
    options = parser.parse_args()
    result = measure(options.quick, " ".join([f"python -m {module}", *sys.argv[1:]]))
    if options.out is not None:
        write_result(options.out, result)
    print(report(result))
