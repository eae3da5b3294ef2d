"""Forks a process for each case that it is asked for: saves, with SIGKILL at the given point.

A case is one line of JSON on stdin, `{"folder": ..., "end_at": n or null}`; the answer is one line on stdout:
how the process ended, and how many points it had passed (of a process that was not ended).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.solomonov.checkpoint.common import Run
from tests.support.kill_points import KillPoints

SAVES = ((3, 3), (3, 33), (4, 4), (5, 5))
"""(step, seed): the second save replaces the first, the third replaces a folder that was damaged."""


def live(folder: Path, end_at: int | None, tell: Callable[[str], Any]) -> KillPoints:
    """What attempt 2 does after steps 1 and 2: find, save, save over what is there, keep two."""
    points = KillPoints(end_at)
    run = Run(folder, attempt=2, keep_last=2)
    points.install()
    run.checkpointer.find()
    for step, seed in SAVES:
        if step == 4:
            (folder / "step-00000004").mkdir(exist_ok=True)
        if run.save(step, seed=seed) is not None:
            tell(json.dumps([step, seed]) + "\n")
    return points


def run_case(folder: Path, end_at: int | None) -> dict[str, Any]:
    """Forks, and says how the fork ended and which points it passed."""
    reading, writing = os.pipe()
    write = os.write
    declared = os.open(folder.parent / "declared", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    pid = os.fork()
    if not pid:
        points = live(folder, end_at, lambda text: write(declared, text.encode()))
        write(writing, json.dumps(points.names).encode())
        os._exit(0)
    os.close(writing)
    os.close(declared)
    with os.fdopen(reading, "rb") as pipe:
        names = pipe.read()
    _, status = os.waitpid(pid, 0)
    return {"code": os.waitstatus_to_exitcode(status), "points": json.loads(names or b"[]")}


if __name__ == "__main__":
    for line in sys.stdin:
        case = json.loads(line)
        print(json.dumps(run_case(Path(case["folder"]), case["end_at"])), flush=True)
