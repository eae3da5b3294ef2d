"""Kill what you like: the same command goes on, and the records equal an undisturbed run's.

Everything is asserted from the run's own journal and metrics: the step that an attempt resumed from, the steps lost
(at most the checkpoint interval), the number of attempts, and that no fall-back happened that the test did not cause.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.support.processes import assert_no_process, program_environment, run_program
from tests.support.sampling import sampler
from tests.support.user import User, unexpected

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
INTERVAL = 5


def rank_pid(user: User, rank: int) -> int:
    """Process id of a rank of the newest attempt."""
    return int(user.journal("attempt_started")[-1]["pids"][rank])


def assert_steps_lost_within_interval(user: User, reached: list[int]) -> None:
    """Attempt k resumed at most one interval below what the attempt before had reached."""
    resumed = [event["step"] for event in user.journal("resumed")]
    for step, before in zip(resumed[1:], reached, strict=True):
        assert step > 0, "an attempt began anew although a checkpoint was there"
        assert before - step <= INTERVAL, f"resumed at {step} after reaching {before}"


def digest(user: User) -> str:
    return str(json.loads(user.must("checkpoints", "digest", "own", "--json"))["digest"])


def test_five_kills_of_the_whole_process_group(user: User, undisturbed: User) -> None:
    """kill -9 of the user's whole command at drawn moments, one of them inside a save; then the same command."""
    draw = sampler("kills of the process group")
    targets = sorted(draw.sample(range(INTERVAL + 1, 51), 5))
    inside_save = draw.randrange(5)
    reached = []
    for number, drawn in enumerate(targets):
        target = max(drawn, reached[-1] + 1 if reached else 0)  # in this attempt: the last may have come further
        with user.command("train", "own.yaml") as program:
            if number == inside_save:
                program.wait_for(lambda t=target: user.steps_done() >= t, deadline=120, what="a step")  # type: ignore[misc]
                program.wait_for(
                    lambda: list(user.run().glob("checkpoints/*.tmp-*")), deadline=120, what="a save under way"
                )
            else:
                program.wait_for(lambda t=target: user.steps_done() >= t, deadline=120, what="a step")  # type: ignore[misc]
            assert program.kill() == -signal.SIGKILL
        assert_no_process("solomonov.rank runs/own", user.folder)
        reached.append(user.steps_done())
    user.must("train", "own.yaml")
    assert user.metrics() == undisturbed.metrics()
    assert digest(user) == digest(undisturbed)
    assert len(user.journal("attempt_started")) == 6
    assert_steps_lost_within_interval(user, reached)
    assert not unexpected(user.journal())


@pytest.mark.sampled(4, group="recovery")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_started_again_unattended(rank: int, user: User, undisturbed: User) -> None:
    target = sampler(f"kill of rank {rank}").randrange(INTERVAL + 1, 50)
    with user.command("train", "own.yaml") as program:
        program.wait_for(lambda: user.steps_done() >= target, deadline=120, what="a step")
        os.kill(rank_pid(user, rank), signal.SIGKILL)
        assert program.wait(deadline=180) == 0, program.output()
        assert "starting again (attempt 2)" in program.output()
    exits = [event for event in user.journal("rank_exited") if event["attempt"] == 1]
    assert exits[0]["rank"] == rank
    assert exits[0]["signal"] == "SIGKILL"
    resumed = user.journal("resumed")
    assert [event["attempt"] for event in resumed] == [1, 2]
    assert target - INTERVAL <= resumed[1]["step"]
    assert user.metrics() == undisturbed.metrics()
    assert digest(user) == digest(undisturbed)
    assert not unexpected(user.journal())


@pytest.mark.sampled(4, group="recovery")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.spare
def test_a_request_to_stop_saves_and_the_same_command_goes_on(
    number: signal.Signals, user: User, undisturbed: User
) -> None:
    with user.command("train", "own.yaml") as program:
        program.wait_for(lambda: user.steps_done() >= 7, deadline=120, what="a step")
        program.send(number)
        assert program.wait(deadline=60) == 75, program.output()
        assert "is saved, and the same command goes on from there" in program.output()
    assert_no_process("solomonov.rank runs/own", user.folder)
    stopped = user.steps_done()
    assert (user.run() / f"checkpoints/step-{stopped:08d}/MANIFEST.json").exists()
    assert user.journal("preempted")[-1]["step"] == stopped
    user.must("train", "own.yaml")
    assert user.journal("resumed")[-1]["step"] == stopped
    assert user.metrics() == undisturbed.metrics()
    assert not (user.run() / "metrics.superseded.jsonl").exists(), "a clean stop replays nothing"
    assert not unexpected(user.journal())


@pytest.mark.sampled(4, group="recovery")
@pytest.mark.spare
def test_a_signal_to_one_rank_stops_all_at_the_same_step(user: User) -> None:
    with user.command("train", "own.yaml") as program:
        program.wait_for(lambda: user.steps_done() >= 7, deadline=120, what="a step")
        os.kill(rank_pid(user, 1), signal.SIGUSR2)
        assert program.wait(deadline=60) == 75, program.output()
    exits = user.journal("rank_exited")
    assert [event["exit_code"] for event in exits] == [75, 75]
    assert exits[0]["step"] == exits[1]["step"]


@pytest.mark.sampled(4, group="recovery")
@pytest.mark.spare
def test_the_second_interrupt_leaves_at_once(user: User) -> None:
    with user.command("train", "own.yaml") as program:
        program.wait_for(lambda: user.steps_done() >= 3, deadline=120, what="a step")
        os.kill(rank_pid(user, 1), signal.SIGSTOP)  # a rank that cannot answer the first
        program.send(signal.SIGINT)
        program.wait_for(lambda: user.journal("stopping"), deadline=30, what="the first interrupt")
        program.send(signal.SIGINT)
        assert program.wait(deadline=30) == 130, program.output()
    assert_no_process("solomonov.rank runs/own", user.folder)


@pytest.mark.sampled(4, group="recovery")
@pytest.mark.spare
def test_a_killed_supervisor_leaves_no_rank(user: User, undisturbed: User) -> None:
    with user.command("train", "own.yaml") as program:
        program.wait_for(lambda: user.steps_done() >= 7, deadline=120, what="a step")
        os.kill(program.pid, signal.SIGKILL)  # the supervisor alone, not its group
        assert_no_process("solomonov.rank runs/own", user.folder)
    user.must("train", "own.yaml")
    assert user.metrics() == undisturbed.metrics()


@pytest.mark.sampled(4, group="recovery")
@pytest.mark.parametrize(
    "overrides",
    [
        ("launch.ranks_per_node=1", "parallel.zero_stage=0"),
        ("launch.ranks_per_node=1", "parallel.zero_stage=3", "training.micro_batch_sequences=2"),
        ("launch.ranks_per_node=2", "training.micro_batch_sequences=2"),
    ],
    ids=["one-rank-zero0", "one-rank-zero3", "two-ranks-smaller-micro-batches"],
)
@pytest.mark.spare
def test_a_run_moves_to_another_layout(overrides: tuple[str, ...], user: User, undisturbed: User) -> None:
    """Stopped on two ranks with ZeRO 1, continued elsewhere: the same rows, and losses within the bound."""
    with user.command("train", "own.yaml") as program:
        program.wait_for(lambda: user.steps_done() >= 22, deadline=120, what="a step")
        program.kill()
    user.must("train", "own.yaml", *overrides)
    moved, stayed = user.metrics(), undisturbed.metrics()
    assert [line["data_digest"] for line in moved] == [line["data_digest"] for line in stayed]
    assert [line["tokens"] for line in moved] == [line["tokens"] for line in stayed]
    for left, right in zip(moved, stayed, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
    assert user.journal("resumed")[-1]["step"] > 0
    assert not unexpected(user.journal()), "a replayed step differed by more than its bound"


def test_training_does_not_leave_processes(undisturbed: User) -> None:
    assert_no_process("solomonov", undisturbed.folder)
    assert not unexpected(undisturbed.journal())
    assert [line["step"] for line in undisturbed.metrics()] == list(range(1, 61))


def test_running_a_finished_run_again_says_so_at_once(undisturbed: User, tmp_path: Path) -> None:
    user = undisturbed.copy(tmp_path / "work")
    before = user.metrics()
    assert "done, 60 updates" in user.must("train", "own.yaml")
    assert user.metrics() == before
    assert len(user.journal("attempt_started")) == 1


def test_a_crash_leaves_its_traceback_in_the_ranks_log(tmp_path: Path) -> None:
    """torch.distributed wraps the hook of uncaught errors; what a rank prints last must get through all the same."""
    code = (
        "import sys, torch.distributed as dist, solomonov.rank as rank\n"
        "sys.excepthook = rank._leave_on_crash\n"
        f"dist.init_process_group('gloo', init_method='file://{tmp_path}/meet', rank=0, world_size=1)\n"
        "raise RuntimeError('an error that nobody foresaw')\n"
    )
    found, output = run_program(
        [sys.executable, "-c", code], log=tmp_path / "log", deadline=60, env=program_environment()
    )
    assert found == 1
    assert "RuntimeError: an error that nobody foresaw" in output
    assert "Traceback" in output
