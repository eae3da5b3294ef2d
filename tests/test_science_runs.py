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


@pytest.mark.spare
def test_a_killed_worker_ends_the_experiment_and_loses_nothing(tmp_path: Path) -> None:
    """One worker, so that the first training has ended when the second one's process dies."""
    out = tmp_path / "result.json"
    asked = ["--workers", "1", "--out", str(out)]

    def conducted(*runs: Trained, more: bool = False) -> list[dict[str, Any]]:
        parser = argparse.ArgumentParser(prog="python -m here")
        options = options_of(parser, [*asked, "--more"] if more else asked)
        return conduct(runs, train, options, lambda records: [{"count": len(records)}], str, about="nothing")

    with pytest.raises(BrokenProcessPool):
        conducted(Trained(0, killed=False), Trained(1, killed=True), Trained(2, killed=False))
    kept = json.loads(out.read_text())
    assert [run["seed"] for run in kept["runs"]] == [0]
    assert kept["command"] == " ".join(["python -m here", *asked])
    then = conducted(*(Trained(seed, killed=False) for seed in range(3)), more=True)
    assert [run["seed"] for run in then] == [0, 1, 2]
    assert then[0]["process"] == kept["runs"][0]["process"] != then[1]["process"] != os.getpid()
    whole = json.loads(out.read_text())
    assert whole["summary"] == [{"count": 3}]
    assert whole["about"] == "nothing"
