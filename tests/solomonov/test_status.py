"""Where a run stands, by the events of its journal and by what its scheduler says, against a table of lives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from solomonov.errors import ConfigurationError
from solomonov.runfolder import RunFolder
from solomonov.status import LIVE, Live, RunStatus, read_status
from tests.support.runs import begin_run, model_state, write_checkpoint
from tests.support.user import User

NOBODY = Live()
LOCAL = ("submitted", {"backend": "local", "job": "4711"})
SLURM = ("submitted", {"backend": "slurm", "job": "77"})


@pytest.fixture
def begun(user: User) -> RunFolder:
    return begin_run(user, "training.total_steps=6")


def started(attempt: int) -> tuple[str, dict[str, Any]]:
    return ("attempt_started", {"attempt": attempt})


def finished(code: int, reason: str = "why") -> tuple[str, dict[str, Any]]:
    return ("finished", {"exit_code": code, "reason": reason})


def left(code: int, reason: str = "why") -> tuple[str, dict[str, Any]]:
    return ("left", {"exit_code": code, "reason": reason})


REQUEUED = ("requeued", {"exit_code": 75, "reason": "preempted"})


@pytest.mark.parametrize(
    ("events", "state", "code", "reason"),
    [
        ([], "created", None, None),
        ([LOCAL], "lost", None, None),
        ([started(1)], "lost", None, None),
        ([started(1), finished(75)], "saved", 75, "why"),
        ([started(1), finished(130)], "cancelled", 130, "why"),
        ([started(1), finished(78)], "failed", 78, "why"),
        ([started(1), finished(1)], "failed", 1, "why"),
        ([LOCAL, started(1), finished(75), LOCAL], "lost", None, None),  # submitted again, and never heard of
        ([started(1), finished(75), started(2)], "lost", None, None),
        ([SLURM, started(1), finished(75), REQUEUED], "lost", None, None),
        ([SLURM, started(1), finished(75), left(75, "cancelled")], "saved", 75, "cancelled"),
        ([SLURM, started(1), finished(75), left(1, "got nowhere")], "failed", 1, "got nowhere"),
        ([SLURM, started(1), finished(75), REQUEUED, started(2), finished(0), left(0, "done")], "done", 0, "done"),
    ],
)
def test_a_run_that_nobody_runs_is_what_its_journal_says(
    events: list[tuple[str, dict[str, Any]]], state: str, code: int | None, reason: str | None, begun: RunFolder
) -> None:
    for kind, fields in events:
        begun.journal.write(kind, **fields)
    found = read_status(begun, NOBODY)
    assert (found.state, found.exit_code, found.reason) == (state, code, reason)
    assert not found.is_live


@pytest.mark.parametrize("state", LIVE)
def test_whoever_runs_it_knows_better(state: str, begun: RunFolder) -> None:
    for kind, fields in (SLURM, started(1), finished(75)):
        begun.journal.write(kind, **fields)
    found = read_status(begun, Live(state, "Slurm: PENDING, Priority"))
    assert (found.state, found.is_live, found.reason) == (state, True, "Slurm: PENDING, Priority")


def test_what_ended_is_explained_by_its_scheduler_where_it_said_nothing(begun: RunFolder) -> None:
    begun.journal.write("submitted", backend="slurm", job="77")
    found = read_status(begun, Live(None, "Slurm: NODE_FAIL"))
    assert (found.state, found.reason) == ("lost", "Slurm: NODE_FAIL")
    begun.journal.write("finished", exit_code=74, reason="damaged")
    assert read_status(begun, Live(None, "Slurm: FAILED")).reason == "damaged"


def test_a_run_is_done_when_its_last_checkpoint_is_there(begun: RunFolder) -> None:
    begun.journal.write("attempt_started", attempt=1)
    begun.journal.write("training_finished", attempt=1, step=6)
    assert read_status(begun, NOBODY).state == "lost", "the checkpoint is not there"
    write_checkpoint(begun, 6, model_state(begun, 6))
    found = read_status(begun, NOBODY)
    assert (found.state, found.exit_code) == ("done", 0), "also where the supervisor could not say so any more"
    assert read_status(begun, Live("running")).exit_code is None


def test_the_numbers_of_a_run(begun: RunFolder) -> None:
    found = read_status(begun, NOBODY)
    assert (found.step, found.total_steps, found.loss, found.seconds_since_step) == (0, 6, None, None)
    assert (found.attempt, found.restarts, found.durable_step, found.job) == (0, 0, 0, None)
    for kind, fields in (
        LOCAL,
        started(1),
        ("restart", {"attempt": 2}),
        started(2),
        SLURM,
        ("checkpoint_durable", {"step": 2}),
        started(3),
        ("restart", {"attempt": 4}),
        ("restart", {"attempt": 5}),
        started(5),
        ("checkpoint_durable", {"step": 4}),
    ):
        begun.journal.write(kind, **fields)
    with begun.metrics.open("w") as file:
        for step in (4, 5):
            file.write(json.dumps({"step": step, "loss": 10.0 / step}) + "\n")
        file.write('{"step": 6, "lo')
    found = read_status(begun, Live("running"))
    assert (found.step, found.total_steps, found.loss) == (5, 6, 2.0)
    assert (found.attempt, found.restarts, found.durable_step) == (5, 2, 4), "restarts since it was submitted last"
    assert (found.backend, found.job, found.run) == ("slurm", "77", "own")
    assert found.seconds_since_step is not None
    assert found.seconds_since_step >= 0.0


def status(**changes: Any) -> RunStatus:
    values: dict[str, Any] = {
        "run": "own",
        "state": "running",
        "backend": "slurm",
        "job": "77",
        "step": 5,
        "total_steps": 6,
        "loss": 2.0,
        "durable_step": 4,
        "attempt": 3,
        "restarts": 1,
        "exit_code": None,
        "reason": None,
        "seconds_since_step": 1.5,
    }
    return RunStatus(**{**values, **changes})


def test_a_status_in_one_line() -> None:
    assert status().sentence() == "own: running, step 5 of 6, slurm job 77"
    assert status(job=None, reason="killed").sentence() == "own: running, step 5 of 6 (killed)"


def test_a_status_as_a_row_of_a_table() -> None:
    row = {"run": "own", "state": "running", "where": "slurm", "job": "77", "step": "5/6", "loss": "2.0000"}
    assert status().row() == {**row, "attempt": 3}
    bare = status(backend=None, job=None, loss=None).row()
    assert (bare["where"], bare["job"], bare["loss"]) == ("here", "", "")


def test_the_states_are_told_apart() -> None:
    states = ["created", "pending", "running", "stopping", "done", "saved", "cancelled", "failed", "lost"]
    assert [state for state in states if status(state=state).is_live] == ["pending", "running", "stopping"]


def test_what_is_no_run_has_no_status(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="not the folder of a run"):
        read_status(RunFolder(tmp_path), NOBODY)
