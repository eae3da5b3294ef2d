"""What a person reads while training runs, from real files of a run: plain lines, and a bar on a real terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from solomonov import exits
from solomonov.display import TrainingDisplay, last_line
from solomonov.runfolder import RunFolder
from tests.support.processes import ROOT, program_environment, wait_for

PLAN = "4 rows x 2 accumulated"


@pytest.fixture
def empty(tmp_path: Path) -> RunFolder:
    (tmp_path / "own").mkdir()
    return RunFolder(tmp_path / "own")


def log_step(run: RunFolder, step: int, loss: float | None = 2.5) -> None:
    with run.metrics.open("a") as file:
        file.write(json.dumps({"step": step, "loss": loss}) + "\n")


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """Standard output on one line."""
    return " ".join(capsys.readouterr().out.split())


def test_last_line_is_the_newest_whole_one(empty: RunFolder) -> None:
    assert last_line(empty) is None
    log_step(empty, 1)
    with empty.metrics.open("a") as file:
        file.write('{"step": 2, "lo')
    assert last_line(empty) == {"step": 1, "loss": 2.5}
    with empty.metrics.open("a") as file:
        file.write("\n[3]\n\n")
    assert last_line(empty) == {"step": 1, "loss": 2.5}


def test_last_line_of_a_long_file(empty: RunFolder) -> None:
    for step in range(1, 400):
        log_step(empty, step)
    assert empty.metrics.stat().st_size > 8192
    assert last_line(empty) == {"step": 399, "loss": 2.5}


def test_a_run_is_introduced_and_followed(empty: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    empty.journal.write("resumed", step=40)  # of an earlier attempt: no news
    with TrainingDisplay(empty, 60, PLAN):
        log_step(empty, 12)
        empty.journal.write("resumed", step=0)  # the beginning: no news
        empty.journal.write("branched", step=10, parent="runs/old", digest="ab")
        empty.journal.write("resumed", step=10)
        empty.journal.write("evaluated", step=12, loss=3.25, bits_per_byte=1.5, rows=8)
        empty.journal.write("evaluated", step=14, loss=3.0, bits_per_byte=1.25, ema_loss=2.5, rows=8)
        empty.journal.write("ema_begun", step=10, decay=0.9, reason="there was none")
        empty.journal.write("ema_dropped", step=11, reason="it is not wanted")
        empty.journal.write("diagnostics_left_out", what="the picture of all layers", reason="no matplotlib")
        empty.journal.write("diagnosed", step=12, seconds=0.5)
        empty.journal.write("fallback", what="torch.compile", to="eager", reason="no compiler")
        empty.journal.write("checkpoint_failed", step=12, cause="ENOSPC", message="no space", path="step-12")
        empty.journal.write("metrics_failed", attempt=1, message="[Errno 28]")
        empty.journal.write("checkpoint_durable", step=12)  # not news either
        empty.journal.write("preflight", verdict="good", nodes=[{"host": "one"}, {"host": "two"}])
        empty.journal.write("signal", verdict="broken", reading="0 comes through", advice="change model.residual")
        empty.journal.write("signal", verdict="even", reading="all comes through", advice=None)  # as it should be
        workers = [{"worker": number, "worker_node": "one"} for number in range(2)]
        empty.journal.write("data_service_started", namespace="n", workers=workers)
        empty.journal.write("data_worker_died", worker=1, cause="ActorDiedError", seconds=3.0)
        empty.journal.write("data_worker_frozen", worker=0, worker_pid=7, worker_host="far")
        empty.journal.write("data_worker_refused", worker=0, message="no shards")
        empty.journal.write("data_workers_waiting", worker=0, cpus_free=0.0, cpus=2.0)
        empty.journal.write("data_workers_back", workers=2)
        empty.journal.write("data_served", rank=0, rows_by_pid={})  # nor this
    output = said(capsys)
    for words in (
        f"run {empty.path} batch {PLAN} watch solomonov tensorboard {empty.path}",
        "branched from step 10 of runs/old",
        "resumed from the checkpoint of step 10",
        "held-out loss 3.2500 (1.500 bits a byte) at step 12",
        "held-out loss 3.0000 (1.250 bits a byte), 2.5000 of the averaged weights at step 14",
        "average of the weights begins anew, as the weights at step 10: there was none",
        "average of the weights is dropped at step 11: it is not wanted",
        "diagnostics without the picture of all layers: no matplotlib",
        "torch.compile: eager instead (no compiler)",
        "no checkpoint at step 12, training goes on: no space (step-12)",
        'metrics failed: {"message": "[Errno 28]"}',
        "step 12/60 loss 2.500",
        "hosts one, two: good",
        "signal broken: 0 comes through; change model.residual",
        "rows from 2 data workers on 1 Ray node",
        "data worker 1 died: starting it again; its requests go to others",
        "data worker 0 holds still (process 7 on far): ending it",
        "data worker 0 cannot serve: no shards",
        "data worker 0 has not begun yet; 0 of the cluster's 2 CPUs are free",
        "data workers answer again (2): rows come from them",
    ):
        assert words in output
    assert "step 40" not in output
    assert "step 0" not in output
    assert "durable" not in output
    assert "served" not in output
    assert "all comes through" not in output
    assert "diagnosed" not in output


def test_a_line_that_is_being_written_is_waited_for(empty: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    display = TrainingDisplay(empty, 60, PLAN)
    line = json.dumps({"event": "resumed", "step": 20})
    empty.journal.path.write_text(line[:9])
    display._refresh()
    assert "resumed" not in said(capsys)
    empty.journal.path.write_text("damaged\n" + line + "\n")
    display._refresh()
    display._refresh()
    assert said(capsys).count("resumed from the checkpoint of step 20") == 1


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        (
            "rank_exited",
            {"rank": 1, "signal": "SIGKILL", "exit_code": None, "step": 7},
            "rank 1 ended: SIGKILL, at step 7",
        ),
        ("rank_exited", {"rank": 0, "exit_code": 1, "step": 7}, "rank 0 ended: exit code 1, at step 7"),
        ("rank_exited", {"rank": 0, "exit_code": 1, "step": None}, "rank 0 ended: exit code 1, before its first step"),
        ("rank_exited", {"rank": 0, "exit_code": 1, "step": 0}, "rank 0 ended: exit code 1, at step 0"),
        ("rank_exited", {"rank": 0, "exit_code": exits.DONE, "step": 7}, ""),
        ("rank_exited", {"rank": 0, "exit_code": exits.AGAIN, "step": 7}, ""),
        ("rank_exited", {"rank": 0, "signal": "SIGKILL", "exit_code": None, "killed_by_launcher": True}, ""),
        ("restart", {"attempt": 2, "cause": "rank 1 died"}, "starting again (attempt 2): rank 1 died"),
        ("stopping", {"signal": "SIGTERM"}, "stopping (SIGTERM): saving"),
        ("attempt_started", {"attempt": 1}, ""),
        (
            "sidecar_restart",
            {"name": "data-service", "cause": "killed by SIGKILL"},
            "data-service ended (killed by SIGKILL): starting it again, training goes on",
        ),
    ],
)
def test_events_of_the_launcher(
    kind: str, fields: dict[str, Any], words: str, empty: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    TrainingDisplay(empty, 60, PLAN).event(kind, fields)
    assert said(capsys) == words


def test_good_ends_are_said_on_stdout(empty: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    log_step(empty, 57)
    display = TrainingDisplay(empty, 60, PLAN)
    display.verdict(exits.DONE, ["last words"])
    display.verdict(exits.AGAIN, ["last words"])
    empty.journal.write("checkpoint_durable", step=55)
    display.verdict(exits.AGAIN, ["last words"])
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "done    step 57/60, loss 2.5000",
        "stopped at step 57/60, loss 2.5000; step 0 is saved, and the same command goes on from there",
        "stopped at step 57/60, loss 2.5000; step 55 is saved, and the same command goes on from there",
    ]
    assert captured.err == ""


def test_bad_ends_are_said_on_stderr_with_the_rank_s_last_words(
    empty: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    TrainingDisplay(empty, 60, PLAN).verdict(exits.NUMERICAL, ["error: the gradients", "  got: nan"])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "  | error: the gradients\n  |   got: nan\n" in captured.err
    assert "ended with exit code 70, before the first step" in captured.err
    assert str(empty.logs) in captured.err


TERMINAL = """
import sys
from pathlib import Path
from solomonov.display import TrainingDisplay
from solomonov.runfolder import RunFolder
with TrainingDisplay(RunFolder(Path(sys.argv[1])), 60, "plan"):
    sys.stdin.readline()
"""


@pytest.mark.e2e
def test_a_terminal_gets_a_bar(empty: RunFolder) -> None:
    """On a real pseudo-terminal, until a key is pressed; a loss that is not finite is said so."""
    log_step(empty, 12, None)
    ours, theirs = pty.openpty()
    environment = program_environment(TERM="xterm", COLUMNS="120")
    argv = [sys.executable, "-c", TERMINAL, str(empty.path)]
    process = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=environment)
    os.close(theirs)
    seen = ""

    def shown() -> bool:
        nonlocal seen
        if select.select([ours], [], [], 0)[0]:
            seen += os.read(ours, 65536).decode(errors="replace")
        return "12/60" in seen and "loss not finite" in seen

    try:
        wait_for(shown, deadline=60, what="the bar")
        assert "training" in seen
        os.write(ours, b"\n")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
