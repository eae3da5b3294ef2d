"""SIGKILL of a real process at the points of its saves: afterwards a verified checkpoint loads, never an older one
than the last that was called durable, and the next save clears up. All points under SOLOMONOV_FULL=1."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from solomonov.checkpoint import store
from tests.solomonov.checkpoint.common import Run, make_state, write
from tests.solomonov.checkpoint.kill_child import SAVES
from tests.support.processes import die_with_parent
from tests.support.sampling import ROOT, sample

Case = Callable[[Path, int | None], dict[str, Any]]
NORMAL = 12


@pytest.fixture(scope="module")
def run_case() -> Iterator[Case]:
    """Runs one case in a fork of one child, which has imported torch once."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.solomonov.checkpoint.kill_child"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=die_with_parent,
    )
    assert child.stdin
    assert child.stdout

    def ask(folder: Path, end_at: int | None) -> dict[str, Any]:
        assert child.stdin
        assert child.stdout
        child.stdin.write(json.dumps({"folder": str(folder), "end_at": end_at}) + "\n")
        child.stdin.flush()
        answer: dict[str, Any] = json.loads(child.stdout.readline())
        return answer

    yield ask
    child.stdin.close()
    assert child.wait(30) == 0
    child.stdout.close()


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 and 2, durable, and what a dead writer of attempt 1 left."""
    folder = tmp_path_factory.mktemp("begun") / "checkpoints"
    for step in (1, 2):
        write(folder, step)
    shutil.copytree(folder / "step-00000002", folder / "step-00000009.tmp-a1-00c0ffee")
    return folder


def check_aftermath(folder: Path, point: str) -> None:
    """What attempt 3 finds, and that it can go on."""
    declared = [(2, 2)]
    declared += [tuple(json.loads(line)) for line in (folder.parent / "declared").read_text().splitlines()]
    for found in store.survey(folder):  # step 4 was damaged on purpose, before it was saved
        assert isinstance(found, store.CheckpointInfo) or found.step == 4, f"{point}: {found}"
    run = Run(folder, attempt=3, keep_last=2)
    reader = run.checkpointer.find()
    assert reader is not None, point
    assert reader.step >= declared[-1][0], f"{point}: {declared[-1]} was durable, {reader.step} was found"
    possible = [(2, 2), *SAVES]
    possible = possible[possible.index(declared[-1]) :]
    matching = [
        (step, seed)
        for step, seed in possible
        if step == reader.step
        and all(torch.equal(reader.read_tensor(*key), tensor) for key, tensor in make_state(seed).items())
    ]
    assert matching, f"{point}: step {reader.step} holds other numbers than were saved since {declared[-1]}"
    assert run.save(6) is not None, point
    left = {path.name.split(".set-aside")[0] for path in folder.iterdir()} - {store.LATEST, store.CLAIM}
    assert {"step-00000006", f"step-{reader.step:08d}"} <= left, point
    assert not any("." in name for name in left), f"{point}: {left}"


def test_kill_at_every_point_of_a_save(run_case: Case, begun: Path, tmp_path: Path) -> None:
    def prepared(case: str) -> Path:
        return Path(shutil.copytree(begun, tmp_path / case / "checkpoints"))

    whole = run_case(prepared("whole"), None)
    points = whole["points"]
    assert whole["code"] == 0
    assert {"write", "half write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "open"} == set(points)
    assert len(points) >= 80
    check_aftermath(tmp_path / "whole" / "checkpoints", "not killed")
    for end_at in sample(range(len(points)), NORMAL, "kill points"):
        folder = prepared(str(end_at))
        ended = run_case(folder, end_at)
        assert ended["code"] == -9, f"point {end_at} was not reached"
        check_aftermath(folder, f"killed at point {end_at}, {points[end_at]}")
        shutil.rmtree(folder.parent)
