"""Many trainings of an experiment: what ended is kept when a worker dies."""

from __future__ import annotations

import argparse
import json
import os
import signal
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import BenchmarkError
from benchmarks.science.runs import conduct, options_of


@dataclass(frozen=True)
class Trained:
    """A training that ends, or whose process is killed."""

    seed: int
    killed: bool


def train(run: Trained) -> dict[str, Any]:
    if run.killed:
        os.kill(os.getpid(), signal.SIGKILL)
    return {**asdict(run), "process": os.getpid()}


def conducted(out: Path, *seeds: int, more: bool = False) -> list[dict[str, Any]]:
    words = ["--workers", "1", "--out", str(out), *["--more"] * more]
    options = options_of(argparse.ArgumentParser(prog="python -m here"), words)
    runs = [Trained(seed, killed=False) for seed in seeds]
    return conduct(runs, train, options, lambda records: [{"count": len(records)}], str)


def test_what_is_there_already_is_written_with_the_command_that_asked_for_it(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    assert [run["seed"] for run in conducted(out, 0)] == [0]
    first = json.loads(out.read_text())
    assert conducted(out, 0, more=True) == first["runs"]
    again = json.loads(out.read_text())
    assert again["runs"] == first["runs"]
    assert again["command"] == first["command"] + " --more"


def test_trainings_that_are_not_asked_for_are_not_lost(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    conducted(out, 0, 1)
    kept = out.read_bytes()
    with pytest.raises(BenchmarkError, match="holds 1 trainings that are not asked for"):
        conducted(out, 1, 2, more=True)
    assert out.read_bytes() == kept


@pytest.mark.spare
def test_a_killed_worker_ends_the_experiment_and_loses_nothing(tmp_path: Path) -> None:
    """One worker, so that the first training has ended when the second one's process dies."""
    out = tmp_path / "result.json"
    asked = ["--workers", "1", "--out", str(out)]

    def mixed(*runs: Trained, more: bool = False) -> list[dict[str, Any]]:
        parser = argparse.ArgumentParser(prog="python -m here")
        options = options_of(parser, [*asked, "--more"] if more else asked)
        return conduct(runs, train, options, lambda records: [{"count": len(records)}], str, about="nothing")

    with pytest.raises(BrokenProcessPool):
        mixed(Trained(0, killed=False), Trained(1, killed=True), Trained(2, killed=False))
    kept = json.loads(out.read_text())
    assert [run["seed"] for run in kept["runs"]] == [0]
    assert kept["command"] == " ".join(["python -m here", *asked])
    then = mixed(*(Trained(seed, killed=False) for seed in range(3)), more=True)
    assert [run["seed"] for run in then] == [0, 1, 2]
    assert then[0]["process"] == kept["runs"][0]["process"] != then[1]["process"] != os.getpid()
    whole = json.loads(out.read_text())
    assert whole["summary"] == [{"count": 3}]
    assert whole["about"] == "nothing"
