"""Processes beside the ranks of a job: kept alive until the job ends, over restarts of the ranks."""

from __future__ import annotations

import math
import os
import select
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.child import Child, ChildCommand, start_child
from launcher.errors import LaunchConfigurationError
from launcher.exits import classify, describe, signal_name
from launcher.heartbeat import VARIABLE
from launcher.job import EventCallback, JobSpec, Sidecar, sidecar_log_path
from launcher.rank_env import RankEnvironment

MAX_BACKOFF_SECONDS = 30.0
STEADY_SECONDS = 60.0
"""Who lived this long was well: its next death is the first again."""

_OF_A_RANK = frozenset((*RankEnvironment(0, 1, 0, 1, 0, "", 1).to_environment(), VARIABLE))


def sidecar_environment(spec: JobSpec, sidecar: Sidecar, inherited: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of a sidecar. It is no rank: what would make it one is not passed on."""
    passed_on = {name: value for name, value in inherited.items() if name not in _OF_A_RANK}
    return {"PYTHONUNBUFFERED": "1", **passed_on, **spec.environment, **sidecar.environment}


def backoff(first_seconds: float, deaths: int) -> float:
    """Seconds to wait after that many deaths in a row."""
    doublings = min(max(deaths - 1, 0), 16)  # 2**16 of the shortest sensible wait is above the cap already
    return min(first_seconds * 2.0**doublings, max(first_seconds, MAX_BACKOFF_SECONDS))


@dataclass(frozen=True)
class SidecarFailure:
    """A sidecar left with a verdict: another try would only repeat it."""

    name: str
    code: int
    log: Path

    @property
    def reason(self) -> str:
        """One clause for people."""
        return f"{self.name}: {describe(self.code)}"


class Sidecars:
    """The sidecars of one job, for the thread that supervises it; when it is closed, none of their processes is left.

    Args:
        spec: the job.
        emit: gets the events of its sidecars.
    """

    def __init__(self, spec: JobSpec, emit: EventCallback) -> None:
        self._keepers = [_Keeper(spec, sidecar, emit) for sidecar in spec.sidecars]
        self._ending = False

    def start(self) -> None:
        """Start all of them.

        Raises:
            LaunchConfigurationError: one cannot be started.
        """
        for keeper in self._keepers:
            keeper.start()

    @property
    def exit_fds(self) -> list[int]:
        """Each becomes readable when a sidecar has ended; to be asked for anew after each `tend`."""
        return [keeper.child.exit_fd for keeper in self._keepers if keeper.child is not None]

    @property
    def next_start(self) -> float:
        """When `tend` has a sidecar to start again, by `time.monotonic`; infinite if none waits for it."""
        return min((keeper.start_at for keeper in self._keepers), default=math.inf)

    def tend(self) -> SidecarFailure | None:
        """Note the ends, start again what is due.

        Returns:
            The first verdict that was met. Who left with one stays away.
        """
        failures = [failure for keeper in self._keepers if (failure := keeper.tend(again=not self._ending))]
        return failures[0] if failures else None

    def terminate(self) -> None:
        """Ask all of them to leave; none is started again."""
        self._ending = True
        for keeper in self._keepers:
            keeper.retire()
            if keeper.child is not None:
                keeper.child.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End all of them at once; none is started again."""
        self._ending = True
        for keeper in self._keepers:
            keeper.retire()
            if keeper.child is not None:
                keeper.child.kill()

    def close(self) -> None:
        """End and reap whatever is left."""
        self.kill()
        try:
            for keeper in self._keepers:
                keeper.note_end()
        finally:  # an event could not be noted
            for keeper in self._keepers:
                keeper.reap()


class _Keeper:
    """Keeps one sidecar alive."""

    def __init__(self, spec: JobSpec, sidecar: Sidecar, emit: EventCallback) -> None:
        self._spec = spec
        self._sidecar = sidecar
        self._emit = emit
        self._log = sidecar_log_path(spec, sidecar)
        self._starts = 0
        self._deaths = 0
        """In a row."""
        self.child: Child | None = None
        self.start_at = math.inf

    def start(self) -> None:
        """Start it, for the first time or again."""
        self.start_at = math.inf
        self.child = start_child(
            ChildCommand(
                command=self._sidecar.command,
                environment=sidecar_environment(self._spec, self._sidecar, os.environ),
                log_path=self._log,
                working_directory=self._spec.working_directory,
            )
        )
        self._starts += 1
        self._emit("sidecar_started", name=self._sidecar.name, pid=self.child.pid, starts=self._starts)

    def tend(self, *, again: bool) -> SidecarFailure | None:
        """Note its end, or start it if that is due; `again`: an end is followed by a start."""
        if self.child is not None and (code := self.child.exit_code()) is not None:
            lived = self.child.seconds()
            self._ended(self.child, code)
            if again and classify(code).is_verdict:
                return SidecarFailure(self._sidecar.name, code, self._log)
            if again:
                self._wait(describe(code), lived)
        elif time.monotonic() >= self.start_at:
            try:
                self.start()
            except LaunchConfigurationError as error:  # it could be started once: the machine is short of something
                self._wait(f"{error.what} ({error.got})", 0.0)
        return None

    def _wait(self, cause: str, lived: float) -> None:
        self._deaths = 1 if lived >= STEADY_SECONDS else self._deaths + 1
        seconds = backoff(self._sidecar.restart_backoff_seconds, self._deaths)
        self.start_at = time.monotonic() + seconds
        self._emit("sidecar_restart", name=self._sidecar.name, cause=cause, backoff_seconds=seconds)

    def _ended(self, child: Child, code: int) -> None:
        seconds = child.seconds()
        self.reap()
        self._emit(
            "sidecar_exited",
            name=self._sidecar.name,
            pid=child.pid,
            exit_code=code if code >= 0 else None,
            signal=signal_name(code),
            seconds=seconds,
        )

    def note_end(self) -> None:
        """Wait for the end of what was killed."""
        if self.child is not None:
            select.select([self.child.exit_fd], [], [])
            code = self.child.exit_code()
            assert code is not None, "its exit descriptor says that it has ended"
            self._ended(self.child, code)

    def retire(self) -> None:
        """Do not start it again."""
        self.start_at = math.inf

    def reap(self) -> None:
        """End what is left of it, its helpers included."""
        if self.child is not None:
            child, self.child = self.child, None
            child.reap()
