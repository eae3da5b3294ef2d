"""Joining a Ray cluster, and Rays that do not let us."""

from __future__ import annotations

import socket
import sys
from concurrent.futures import Future
from pathlib import Path

import pytest

from data_pipeline.cluster import _Gate, _if_let_in
from tests.support.processes import program_environment, run_program

JOIN = """
import sys
import ray
from data_pipeline.cluster import ClusterLost, join

def refuse(**_):
    raise {error}

{patch}
try:
    join(sys.argv[1], "ours")
except ClusterLost as lost:
    print("LOST", lost)
print("joined:", ray.is_initialized())
"""
"""In a process of its own: Ray reads its settings when it is imported, once, and other tests have other ones."""


def joined(tmp_path: Path, error: str | None, *, listens: bool) -> str:
    """What a process says that joins; with `error`, ray.init raises it."""
    code = JOIN.format(error=error or "AssertionError", patch="ray.init = refuse" if error else "")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if not listens:
            server.close()
        command = [sys.executable, "-c", code, address]
        ended, output = run_program(command, log=tmp_path / "log", deadline=60.0, env=program_environment())
    assert ended == 0, output
    return output


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("OSError('no such socket')", "no such socket"),
        ("KeyError('an error that nobody foresaw')", "Ray gave up with an error"),
    ],
)
def test_a_ray_that_gives_up_is_not_joined(error: str, told: str, tmp_path: Path) -> None:
    """Else the first call after it would start a Ray of its own on this machine."""
    output = joined(tmp_path, error, listens=True)
    assert "LOST 127.0.0.1:" in output
    assert told in output
    assert "joined: False" in output


def test_where_nobody_listens_nothing_is_joined(tmp_path: Path) -> None:
    output = joined(tmp_path, None, listens=False)
    assert "LOST 127.0.0.1:" in output
    assert "refused" in output
    assert "joined: False" in output


class Called:
    """A gate as a task's process has it: each method is called by `remote`, and answers in the future."""

    def __init__(self, gate: _Gate) -> None:
        self._gate = gate
        self.let_in = self

    def remote(self, number: int) -> Called:
        self._answer: Future[bool] = Future()
        self._answer.set_result(self._gate.let_in(number))
        return self

    def future(self) -> Future[bool]:
        return self._answer


def test_behind_a_closed_gate_nothing_begins_and_what_has_is_known() -> None:
    gate = _Gate()
    began = []
    assert _if_let_in(Called(gate), 4, began.append, "four") is None
    assert _if_let_in(Called(gate), 7, lambda text: began.append(text) or len(text), "seven") == 5  # type: ignore[func-returns-value]
    assert gate.close() == {4, 7}
    assert _if_let_in(Called(gate), 5, began.append, "five") is None
    assert began == ["four", "seven"]
    assert gate.close() == {4, 7}
