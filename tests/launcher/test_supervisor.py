"""Single decisions of the supervisor against the table in its module; sequences are in tests/property."""

from __future__ import annotations

import pytest

from launcher.config import LaunchConfig
from launcher.supervisor import Action, RestartPolicy, Supervisor, SupervisorState

POLICY = RestartPolicy(max_restarts=3, max_no_progress=2, backoff_seconds=1.0)


def running(policy: RestartPolicy = POLICY, *, step: int | None = None) -> Supervisor:
    supervisor = Supervisor(policy, step=step)
    supervisor.attempt_started()
    return supervisor


@pytest.mark.parametrize(
    ("code", "action", "state", "exit_code"),
    [
        (0, Action.DONE, SupervisorState.DONE, 0),
        (75, Action.STOP, SupervisorState.SAVED, 75),
        (2, Action.STOP, SupervisorState.FAILED, 2),
        (70, Action.STOP, SupervisorState.FAILED, 70),
        (74, Action.STOP, SupervisorState.FAILED, 74),
        (78, Action.STOP, SupervisorState.FAILED, 78),
        (1, Action.RESTART, SupervisorState.WAITING, 1),
        (-9, Action.RESTART, SupervisorState.WAITING, 137),
    ],
)
def test_the_first_attempt(code: int, action: Action, state: SupervisorState, exit_code: int) -> None:
    supervisor = running()
    decision = supervisor.attempt_ended(code, None)
    assert (decision.action, supervisor.state, decision.exit_code) == (action, state, exit_code)
    assert state.is_terminal == (supervisor.exit_code is not None)


@pytest.mark.parametrize(
    ("code", "state", "exit_code"),
    [
        (75, SupervisorState.SAVED, 75),
        (0, SupervisorState.DONE, 0),
        (-15, SupervisorState.SAVED, 75),  # died of our TERM before it had a handler
        (-9, SupervisorState.FAILED, 137),
        (1, SupervisorState.FAILED, 1),
        (78, SupervisorState.FAILED, 78),
    ],
)
def test_an_attempt_that_was_asked_to_stop_is_not_restarted(code: int, state: SupervisorState, exit_code: int) -> None:
    supervisor = running()
    assert supervisor.stop_requested()
    assert not supervisor.stop_requested()
    supervisor.attempt_ended(code, 100)
    assert (supervisor.state, supervisor.exit_code) == (state, exit_code)


@pytest.mark.parametrize(("code", "exit_code"), [(-9, 130), (1, 130), (75, 75), (0, 0)])
def test_told_to_leave_at_once(code: int, exit_code: int) -> None:
    supervisor = running()
    assert supervisor.stop_requested()
    assert supervisor.kill_requested()
    assert supervisor.attempt_ended(code, None).exit_code == exit_code


def test_requests_while_nothing_runs_end_the_job() -> None:
    waiting = running()
    waiting.attempt_ended(1, None)
    assert waiting.stop_requested()
    assert (waiting.state, waiting.exit_code) == (SupervisorState.SAVED, 75)
    ready = Supervisor(POLICY)
    assert ready.kill_requested()
    assert (ready.state, ready.exit_code) == (SupervisorState.CANCELLED, 130)


def test_a_companion_that_failed_ends_a_running_job() -> None:
    supervisor = running()
    assert supervisor.companion_failed(78, "data-service: exit code 78")
    assert supervisor.state is SupervisorState.KILLING
    assert not supervisor.companion_failed(70, "the second is not asked")
    decision = supervisor.attempt_ended(-9, 100)
    assert (decision.action, decision.exit_code) == (Action.STOP, 78)
    assert (supervisor.state, supervisor.reason) == (SupervisorState.FAILED, "data-service: exit code 78")
    assert supervisor.companion_was_the_cause


@pytest.mark.parametrize(
    ("code", "exit_code", "blamed"), [(75, 75, False), (0, 0, False), (1, 74, True), (-9, 74, True), (-15, 74, True)]
)
def test_a_companion_that_failed_lets_ranks_save(code: int, exit_code: int, blamed: bool) -> None:
    supervisor = running()
    assert supervisor.stop_requested()
    assert not supervisor.companion_failed(74, "first")
    assert not supervisor.companion_failed(78, "second")
    assert supervisor.state is SupervisorState.STOPPING
    assert supervisor.attempt_ended(code, None).exit_code == exit_code
    assert supervisor.companion_was_the_cause == blamed


def test_a_companion_that_fails_while_nothing_runs_or_too_late() -> None:
    ready = Supervisor(POLICY)
    assert not ready.companion_failed(2, "called wrongly")
    assert (ready.state, ready.exit_code) == (SupervisorState.FAILED, 2)
    killed = running()
    assert killed.kill_requested()
    assert not killed.companion_failed(78, "too late")
    assert killed.attempt_ended(-9, None).exit_code == 130
    assert not killed.companion_failed(78, "later still")
    assert (killed.state, killed.companion_was_the_cause) == (SupervisorState.CANCELLED, False)
    with pytest.raises(AssertionError, match="no verdict"):
        running().companion_failed(1, "a crash")


def test_no_progress_stops_and_progress_counts_anew() -> None:
    supervisor = running(step=100)
    assert supervisor.attempt_ended(1, 100).action is Action.RESTART  # no progress: first
    supervisor.attempt_started()
    assert supervisor.attempt_ended(1, 200).action is Action.RESTART  # progress
    supervisor.attempt_started()
    assert supervisor.attempt_ended(1, 150).action is Action.RESTART  # less than before: first again
    supervisor.attempt_started()
    last = supervisor.attempt_ended(-11, None)
    assert (last.action, last.exit_code) == (Action.STOP, 139)


def test_a_number_of_ranks_that_changes_to_no_avail_is_kept() -> None:
    supervisor = running(step=100)
    for step in (100, None):
        assert supervisor.resize_requested()
        assert supervisor.attempt_ended(75, step).action is Action.RESTART
        supervisor.attempt_started()
    assert not supervisor.resize_requested(), "twice without a newer step, launch.max_no_progress"
    assert supervisor.state is SupervisorState.RUNNING
    other = running(step=100)
    for step in (101, 102, 103, 104):
        assert other.resize_requested()
        assert other.attempt_ended(75, step).action is Action.RESTART
        other.attempt_started()


def test_no_progress_is_named_as_the_reason() -> None:
    supervisor = running(RestartPolicy(max_restarts=9, max_no_progress=1, backoff_seconds=0.0), step=40)
    decision = supervisor.attempt_ended(-9, 40)
    assert decision.action is Action.STOP
    assert "without progress past step 40" in decision.reason
    assert "killed by SIGKILL" in decision.reason


def test_the_budget_of_restarts_holds_even_with_progress() -> None:
    supervisor = Supervisor(POLICY)
    for attempt in range(4):
        supervisor.attempt_started()
        decision = supervisor.attempt_ended(1, 10 * (attempt + 1))
    assert (decision.action, supervisor.restarts) == (Action.STOP, 3)
    assert "launch.max_restarts" in decision.reason


def test_backoff_doubles_without_progress_up_to_a_minute() -> None:
    policy = RestartPolicy.from_config(LaunchConfig(restart_backoff_seconds=1.5))
    assert [policy.backoff(n) for n in range(5)] == [1.5, 1.5, 3.0, 6.0, 12.0]
    assert policy.backoff(10_000) == 60.0
    assert RestartPolicy(1, 1, 90.0).backoff(5) == 90.0
    assert RestartPolicy(1, 1, 0.0).backoff(5) == 0.0


def test_calls_out_of_order_are_programming_errors() -> None:
    supervisor = Supervisor(POLICY)
    with pytest.raises(ValueError, match="ready"):
        supervisor.attempt_ended(0, None)
    supervisor.attempt_started()
    with pytest.raises(ValueError, match="running"):
        supervisor.attempt_started()
