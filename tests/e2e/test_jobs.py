"""Runs in the background of this machine, and what becomes of a gang that hangs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest

from tests.support.processes import assert_no_process, wait_for
from tests.support.sampling import sampler
from tests.support.user import User, unexpected

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def status(user: User) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(user.must("status", "own", "--json"))
    return found


def test_submitted_here_followed_cancelled_resumed_and_finished(user: User, undisturbed: User) -> None:
    steps = 240  # so many that the commands come while it still trains
    words = ("submit", "own.yaml", "--on", "local", f"training.total_steps={steps}")
    submitted = user.must(*words)
    assert "solomonov status runs/own" in submitted
    with user.command("logs", "own", "-f") as follower:
        wait_for(lambda: user.steps_done() >= 4, deadline=120, what="some updates are done")
        refused = user.command(*words)
        assert refused.wait(deadline=60) == 78
        assert "the run is running" in refused.output()
        user.must("cancel", "own")
        assert user.command("wait", "own").wait(deadline=120) == 75
        assert follower.wait(deadline=60) == 0, "it ends with the run"
        followed = follower.output()
    assert "--- attempt 1" in followed
    assert f"[0] step 3/{steps} " in followed
    saved = status(user)
    assert (saved["state"], saved["exit_code"]) == ("saved", 75)
    assert saved["step"] == saved["durable_step"] > 0
    [row] = [json.loads(line) for line in user.must("runs", "--json").splitlines()]
    assert (row["run"], row["state"], row["step"]) == ("own", "saved", f"{saved['step']}/{steps}")
    user.must("resume", "own")
    assert user.command("wait", "own").wait(deadline=180) == 0
    lines = user.metrics()
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    same = [line["data_digest"] for line in undisturbed.metrics()]
    assert [line["data_digest"] for line in lines[: len(same)]] == same
    assert user.journal("resumed")[-1]["step"] == saved["step"]
    assert "attempt 2, 2 ranks" in user.must("logs", "own", "--lines", "1")
    done = user.command("resume", "own")
    assert done.wait(deadline=60) == 78
    assert "the run is done" in done.output()
    assert not unexpected(user.journal())
    assert_no_process(f"supervise {user.folder}")


@pytest.mark.sampled(2, group="jobs")
@pytest.mark.spare
def test_of_two_submissions_at_once_one_is_refused(user: User) -> None:
    words = ("submit", "own.yaml", "--on", "local", "training.total_steps=400")
    with user.command(*words) as first, user.command(*words) as second:
        codes = sorted([first.wait(deadline=120), second.wait(deadline=120)])
        assert codes == [0, 78], first.output() + second.output()
        assert ("the run is " in first.output()) != ("the run is " in second.output())
    assert len(user.journal("submitted")) == 1
    user.must("cancel", "own", "--now")
    assert user.command("wait", "own").wait(deadline=60) == 130


def test_a_sweep_wants_a_cluster(user: User) -> None:
    code, output = user.solomonov("submit", "own.yaml", "--on", "local", "--sweep", "run.seed=1,2")
    assert code == 78
    assert "this machine trains one run at a time" in output
    assert not user.run("own-0").exists()


@pytest.mark.sampled(2, group="jobs")
@pytest.mark.spare
def test_what_is_submitted_is_the_code_of_that_moment(user: User) -> None:
    """The supervisor and its ranks run from the copy in the run's folder."""
    user.must("submit", "own.yaml", "--on", "local", "training.total_steps=400")
    wait_for(lambda: user.steps_done() >= 2, deadline=120, what="some updates are done")
    [code] = [path for path in (user.run() / "code").iterdir() if not path.name.startswith(".")]
    assert user.journal("submitted")[-1]["code"] == code.name
    for pid in user.journal("attempt_started")[-1]["pids"]:
        environment = psutil.Process(pid).environ()
        assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(code)
    asked = [sys.executable, "-c", "import solomonov.rank as rank; print(rank.__file__)"]
    done = subprocess.run(asked, env=environment, cwd=user.folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(code / "solomonov" / "rank.py")
    user.must("cancel", "own", "--now")
    assert user.command("wait", "own").wait(deadline=60) == 130
    assert status(user)["state"] == "cancelled"


@pytest.mark.sampled(2, group="jobs")
@pytest.mark.spare
def test_a_job_that_is_suspended_as_a_whole_does_not_hang(user: User, undisturbed: User) -> None:
    """As by `scontrol suspend`, or on a virtual machine that stands still: supervisor and ranks stop, and go on."""
    step = sampler("a job that is suspended").randrange(22, 27)
    with user.command("train", "own.yaml", "resilience.hang_minimum_seconds=4") as program:
        program.wait_for(lambda: user.steps_done() >= step, deadline=120, what="a step")
        stopped = [program.pid, *user.journal("attempt_started")[-1]["pids"]]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(8.0)  # longer than a rank may stay in any section that is known by now
        for pid in stopped:  # the supervisor first: it looks before the ranks have moved
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.5)
        assert program.wait(deadline=240) == 0, program.output()
    assert not user.journal("hang")
    assert len(user.journal("attempt_started")) == 1
    assert user.metrics() == undisturbed.metrics()
    assert not unexpected(user.journal())


@pytest.mark.sampled(2, group="jobs")
@pytest.mark.spare
def test_a_rank_that_stands_still_is_a_hang_with_stacks_of_all(user: User, undisturbed: User) -> None:
    """SIGSTOP to one rank: its peer waits in a collective. Both stacks, one sentence, and the run goes on."""
    # Between a save and an evaluation: of those it knows too little after so short a time.
    step = sampler("a rank that stands still").randrange(22, 27)
    settings = ("resilience.hang_minimum_seconds=4", "checkpoint.every_steps=20")
    with user.command("train", "own.yaml", *settings) as program:
        program.wait_for(lambda: user.steps_done() >= step, deadline=120, what="a step")
        os.kill(user.journal("attempt_started")[-1]["pids"][1], signal.SIGSTOP)
        assert program.wait(deadline=240) == 0, program.output()
        shown = program.output()
    [hang] = user.journal("hang")
    assert hang["seconds"] > hang["limit_seconds"] >= 4
    [incident] = user.journal("incident")
    assert incident["what"].startswith(f"rank {hang['rank']} did not move for ")
    assert f"incident {incident['what']}" in shown
    assert 0 < incident["steps_lost"] < 20
    # The one that stands still cannot write; the one that waits for it does.
    assert "(most recent call first)" in (user.run() / "logs/attempt-1/rank-0.log").read_text()
    first, second = user.journal("resumed")
    assert (first["step"], second["attempt"]) == (0, 2)
    assert second["step"] == 20
    assert user.metrics() == undisturbed.metrics()
    assert not unexpected(user.journal(), "hang")
