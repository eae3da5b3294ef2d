"""Decides what follows an attempt: done, again, or stop. A pure state machine; it starts and signals nothing.

READY -> RUNNING -> DONE                        every rank left with 0
                 -> SAVED                       every rank left with 75
                 -> FAILED                      2, 70, 74, 78, or no restart is left
                 -> WAITING -> RUNNING          a crash: back off, then the next attempt
         RUNNING -> STOPPING                    asked to save and leave
         RUNNING -> RESIZING -> WAITING         another number of ranks: save, leave, and the next attempt at once
         RESIZING -> STOPPING                   asked to save and leave meanwhile
         RUNNING, STOPPING -> KILLING           told to leave at once
         RUNNING -> KILLING -> FAILED           a companion of the ranks failed for good
         STOPPING -> FAILED                     the same, and the ranks did not save after it
         RESIZING -> FAILED                     the same: what they save is kept, and they are not started again
         READY, WAITING -> SAVED or CANCELLED   asked, or told, while nothing runs
         READY, WAITING -> FAILED               a companion failed while nothing runs
         READY, WAITING -> SAVED                another supervisor has taken the job over
"""

from __future__ import annotations

import enum
import signal
from dataclasses import dataclass

from launcher.config import LaunchConfig
from launcher.exits import ExitCode, Outcome, classify, describe, shell_code

MAX_BACKOFF_SECONDS = 60.0


class SupervisorState(enum.Enum):
    """Where a job stands."""

    READY = "ready"
    RUNNING = "running"
    RESIZING = "resizing"
    STOPPING = "stopping"
    KILLING = "killing"
    WAITING = "waiting"
    DONE = "done"
    SAVED = "saved"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def is_terminal(self) -> bool:
        """Nothing follows."""
        return self in _TERMINAL

    @property
    def has_ranks(self) -> bool:
        """An attempt is under way."""
        return self in _WITH_RANKS


_SAVE_SIGNALS = frozenset((-signal.SIGTERM, -signal.SIGUSR1, -signal.SIGUSR2, -signal.SIGINT))
"""Exit codes of a rank that a request to save ended."""

_WITH_RANKS = frozenset(
    {SupervisorState.RUNNING, SupervisorState.RESIZING, SupervisorState.STOPPING, SupervisorState.KILLING}
)
_TERMINAL = frozenset({SupervisorState.DONE, SupervisorState.SAVED, SupervisorState.CANCELLED, SupervisorState.FAILED})


class Action(enum.Enum):
    """What to do after an attempt."""

    DONE = "done"
    RESTART = "restart"
    STOP = "stop"


@dataclass(frozen=True)
class Decision:
    """The answer to the end of an attempt."""

    action: Action
    exit_code: int
    """0 to 255, what the job leaves with; for a restart, what it would have left with."""
    reason: str
    """One clause for people."""
    backoff_seconds: float = 0.0
    """Wait before a restart."""


@dataclass(frozen=True)
class RestartPolicy:
    """How often, and how fast, a crashed job is started again."""

    max_restarts: int
    max_no_progress: int
    backoff_seconds: float

    @classmethod
    def from_config(cls, config: LaunchConfig) -> RestartPolicy:
        """The policy that the `launch` section describes."""
        return cls(config.max_restarts, config.max_no_progress, config.restart_backoff_seconds)

    def backoff(self, without_progress: int) -> float:
        """Seconds to wait after that many crashes in a row without progress."""
        doublings = min(max(without_progress - 1, 0), 16)  # 2**16 seconds is far above the cap already
        return min(self.backoff_seconds * 2.0**doublings, max(self.backoff_seconds, MAX_BACKOFF_SECONDS))


class Supervisor:
    """The state of one job over its attempts.

    Args:
        policy: limits of restarting.
        step: durable step before the first attempt; None if there is none.
    """

    def __init__(self, policy: RestartPolicy, *, step: int | None = None) -> None:
        self.policy = policy
        self.state = SupervisorState.READY
        self.restarts = 0
        self.without_progress = 0
        self.best_step = step or 0
        self.exit_code: int | None = None
        self.reason = ""
        self.companion_was_the_cause = False
        """The job failed, and not by its ranks."""
        self._companion: tuple[int, str] | None = None
        self._idle_resizes = 0
        """Changes of the number of ranks in a row that no newer durable step came between."""
        self._step_at_resize = self.best_step

    def attempt_started(self) -> None:
        """The ranks of an attempt run."""
        if self.state not in (SupervisorState.READY, SupervisorState.WAITING):
            raise ValueError(f"an attempt cannot start while the job is {self.state.value}")
        self.state = SupervisorState.RUNNING

    def stop_requested(self) -> bool:
        """Someone asked the job to save and leave; True if that is news."""
        if self.state in (SupervisorState.RUNNING, SupervisorState.RESIZING):
            self.state = SupervisorState.STOPPING
            return True
        if self.state in (SupervisorState.READY, SupervisorState.WAITING):
            self._end(SupervisorState.SAVED, ExitCode.AGAIN, "asked to stop while no rank ran")
            return True
        return False

    def kill_requested(self) -> bool:
        """Someone told the job to leave at once; True if that is news."""
        if self.state in (SupervisorState.RUNNING, SupervisorState.RESIZING, SupervisorState.STOPPING):
            self.state = SupervisorState.KILLING
            return True
        if self.state in (SupervisorState.READY, SupervisorState.WAITING):
            self._end(SupervisorState.CANCELLED, ExitCode.INTERRUPTED, "told to leave at once")
            return True
        return False

    def companion_failed(self, code: int, reason: str) -> bool:
        """A process beside the ranks left with a verdict, which another try would only repeat.

        Ranks that are saving already may finish: what they save is worth having, and the job ends anyway.

        Args:
            code: its exit code.
            reason: one clause for people, for the case that this ends the job.

        Returns:
            The ranks, if there are any, are to be killed for it.
        """
        assert classify(code).is_verdict, f"{describe(code)} is no verdict"
        if self.state.is_terminal or self.state is SupervisorState.KILLING:
            return False
        if not self.state.has_ranks:
            self._companion_end(code, reason)
            return False
        self._companion = self._companion or (code, reason)
        if self.state in (SupervisorState.STOPPING, SupervisorState.RESIZING):
            return False
        self.state = SupervisorState.KILLING
        return True

    def resize_requested(self) -> bool:
        """The job should go on with another number of ranks; True if that is news, and if it does not only go round."""
        if self.state is not SupervisorState.RUNNING or self._idle_resizes >= self.policy.max_no_progress:
            return False
        self.state = SupervisorState.RESIZING
        return True

    def taken_over(self) -> None:
        """Another supervisor runs the job now; nothing that we could start belongs to it."""
        if self.state not in (SupervisorState.READY, SupervisorState.WAITING):
            raise ValueError(f"a job that is {self.state.value} has ranks, or has ended")
        self._end(SupervisorState.SAVED, ExitCode.AGAIN, "another supervisor has taken over")

    def attempt_ended(self, code: int, step: int | None = None) -> Decision:
        """Judge an attempt.

        Args:
            code: exit code of the attempt, that of its first cause; -n for a signal.
            step: newest step known to be kept; None if none is known, which counts as no progress.
        """
        if not self.state.has_ranks:
            raise ValueError(f"no attempt can end while the job is {self.state.value}")
        outcome = classify(code)
        if outcome is Outcome.DONE:
            return self._end(SupervisorState.DONE, ExitCode.DONE, "done")
        # A rank that had no handler yet when it was asked had nothing to save, either.
        unsaved = code in _SAVE_SIGNALS and self.state is SupervisorState.RESIZING
        if unsaved or (outcome is Outcome.AGAIN and self.state is SupervisorState.RESIZING):
            if self._companion is not None:
                return self._companion_end(*self._companion)
            came_further = step is not None and step > self._step_at_resize
            self._idle_resizes = 0 if came_further else self._idle_resizes + 1
            self._step_at_resize = max(self._step_at_resize, step or 0)
            self.state = SupervisorState.WAITING
            return Decision(Action.RESTART, int(ExitCode.AGAIN), "saved, to go on with another number of ranks")
        if outcome is Outcome.AGAIN:
            return self._end(SupervisorState.SAVED, ExitCode.AGAIN, "saved, wants to run again")
        if self._companion is not None:
            return self._companion_end(*self._companion)
        if self.state is SupervisorState.KILLING:
            return self._end(SupervisorState.CANCELLED, ExitCode.INTERRUPTED, "told to leave at once")
        if self.state is SupervisorState.STOPPING:
            if code in _SAVE_SIGNALS:  # before the rank could have had a handler, or anything to save
                return self._end(SupervisorState.SAVED, ExitCode.AGAIN, "stopped before there was more to save")
            return self._end(SupervisorState.FAILED, shell_code(code), f"{describe(code)} while stopping")
        if outcome is not Outcome.CRASH:
            return self._end(SupervisorState.FAILED, code, f"{describe(code)}; another try would only repeat it")
        return self._crashed(code, step)

    def _crashed(self, code: int, step: int | None) -> Decision:
        if step is not None and step > self.best_step:
            self.best_step, self.without_progress = step, 0
        else:
            self.without_progress += 1
        if self.restarts >= self.policy.max_restarts:
            reason = f"{describe(code)}; {self.restarts} restarts, launch.max_restarts, are used up"
            return self._end(SupervisorState.FAILED, shell_code(code), reason)
        if self.without_progress >= self.policy.max_no_progress:
            reason = (
                f"{describe(code)}; {self.without_progress} crashes in a row without progress past step "
                f"{self.best_step} (launch.max_no_progress)"
            )
            return self._end(SupervisorState.FAILED, shell_code(code), reason)
        self.restarts += 1
        self.state = SupervisorState.WAITING
        backoff = self.policy.backoff(self.without_progress)
        return Decision(Action.RESTART, shell_code(code), describe(code), backoff)

    def _companion_end(self, code: int, reason: str) -> Decision:
        self.companion_was_the_cause = True
        return self._end(SupervisorState.FAILED, code, reason)

    def _end(self, state: SupervisorState, exit_code: int, reason: str) -> Decision:
        self.state, self.exit_code, self.reason = state, int(exit_code), reason
        return Decision(Action.DONE if state is SupervisorState.DONE else Action.STOP, int(exit_code), reason)
