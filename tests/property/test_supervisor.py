"""The supervisor under any sequence of ends and requests: it ends, keeps its budgets, repeats no verdict."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from launcher.exits import classify
from launcher.supervisor import Action, RestartPolicy, Supervisor, SupervisorState

VERDICTS = (2, 70, 74, 78)
TERMINAL = tuple(state for state in SupervisorState if state.is_terminal)
codes = st.one_of(st.sampled_from((0, 75, 1, 137, -9, -15, -11, *VERDICTS)), st.integers(1, 255), st.integers(-64, -1))
steps = st.one_of(st.none(), st.integers(0, 50))
policies = st.builds(
    RestartPolicy,
    max_restarts=st.integers(0, 6),
    max_no_progress=st.integers(1, 4),
    backoff_seconds=st.floats(0.0, 100.0),
)


class SupervisorMachine(RuleBasedStateMachine):
    """Drives a supervisor as a launcher would, with crashes, requests and ends in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.attempts = 0
        self.asked = False
        self.companion_failed = False
        self.crashes_since_progress = 0
        self.resizes = 0

    @initialize(policy=policies, step=steps)
    def submit(self, policy: RestartPolicy, step: int | None) -> None:
        self.supervisor = Supervisor(policy, step=step)
        self.best = step or 0

    @precondition(lambda self: self.supervisor.state in (SupervisorState.READY, SupervisorState.WAITING))
    @rule()
    def start(self) -> None:
        self.supervisor.attempt_started()
        self.attempts += 1

    @precondition(lambda self: self.supervisor.state.has_ranks)
    @rule(code=codes, step=steps)
    def end(self, code: int, step: int | None) -> None:
        before = self.supervisor.state
        decision = self.supervisor.attempt_ended(code, step)
        assert 0 <= decision.exit_code <= 255
        # -n: a signal that asks to save, before the rank had a handler
        if before is SupervisorState.RESIZING and code in (75, -15, -12, -10, -2):
            assert (decision.action is Action.RESTART) != self.companion_failed, "it goes on in another number"
            assert decision.backoff_seconds == 0.0
            self.resizes += 1
            return
        if step is not None and step > self.best:
            self.best, self.crashes_since_progress = step, 0
        else:
            self.crashes_since_progress += 1
        if decision.action is Action.RESTART:
            assert classify(code).name == "CRASH"
            assert not self.asked, "a job that was asked to leave does not start again"
            assert self.crashes_since_progress < self.supervisor.policy.max_no_progress
            assert decision.backoff_seconds >= self.supervisor.policy.backoff_seconds
        else:
            assert self.supervisor.state.is_terminal
            assert self.supervisor.exit_code == decision.exit_code
            assert (decision.exit_code == 0) == (code == 0), "success is neither invented nor hidden"
        if code in VERDICTS or self.companion_failed:
            assert decision.action is not Action.RESTART

    @rule()
    def ask(self) -> None:
        self.asked = True
        self.supervisor.stop_requested()

    @rule()
    def resize(self) -> None:
        before = self.supervisor.state
        assert self.supervisor.resize_requested() == (before is SupervisorState.RUNNING), "only ranks at work resize"

    @precondition(lambda self: self.supervisor.state in (SupervisorState.READY, SupervisorState.WAITING))
    @rule()
    def lose(self) -> None:
        self.supervisor.taken_over()
        assert (self.supervisor.state, self.supervisor.exit_code) == (SupervisorState.SAVED, 75)

    @rule()
    def tell(self) -> None:
        self.asked = True
        self.supervisor.kill_requested()

    @rule(code=st.sampled_from(VERDICTS))
    def companion(self, code: int) -> None:
        before = self.supervisor.state
        kill = self.supervisor.companion_failed(code, "companion")
        assert kill == (before is SupervisorState.RUNNING), "ranks that save, or are being killed, are left alone"
        if kill:
            assert self.supervisor.state is SupervisorState.KILLING
        elif before in (SupervisorState.READY, SupervisorState.WAITING):
            assert (self.supervisor.state, self.supervisor.exit_code) == (SupervisorState.FAILED, code)
        else:
            assert self.supervisor.state is before
        self.companion_failed = self.companion_failed or before not in (*TERMINAL, SupervisorState.KILLING)

    @invariant()
    def blame_is_just(self) -> None:
        if self.supervisor.companion_was_the_cause:
            assert self.companion_failed
            assert (self.supervisor.state, self.supervisor.reason) == (SupervisorState.FAILED, "companion")
        elif self.companion_failed and self.supervisor.state.is_terminal:
            assert self.supervisor.exit_code in (0, 75), "only what the ranks finished outranks a verdict"

    @invariant()
    def budgets_hold(self) -> None:
        policy = self.supervisor.policy
        assert self.supervisor.restarts <= policy.max_restarts
        assert self.attempts <= policy.max_restarts + self.resizes + 1
        assert self.supervisor.without_progress <= policy.max_no_progress

    @invariant()
    def only_an_ended_job_has_an_exit_code(self) -> None:
        assert self.supervisor.state.is_terminal == (self.supervisor.exit_code is not None)


TestSupervisorMachine = SupervisorMachine.TestCase


@given(policies, st.lists(st.tuples(codes, steps), min_size=8, max_size=8), steps)
def test_every_job_ends_within_its_budget(
    policy: RestartPolicy, ends: list[tuple[int, int | None]], first: int | None
) -> None:
    supervisor = Supervisor(policy, step=first)
    attempts = 0
    for code, step in ends:
        supervisor.attempt_started()
        attempts += 1
        if supervisor.attempt_ended(code, step).action is not Action.RESTART:
            break
    assert supervisor.state.is_terminal
    assert attempts <= policy.max_restarts + 1


@given(policies, st.sampled_from(VERDICTS), steps)
def test_a_verdict_is_never_retried(policy: RestartPolicy, code: int, step: int | None) -> None:
    supervisor = Supervisor(policy)
    supervisor.attempt_started()
    assert supervisor.attempt_ended(code, step).action is Action.STOP
    assert (supervisor.exit_code, supervisor.restarts) == (code, 0)
