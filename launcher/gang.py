"""The ranks of one attempt: started together, watched together, ended together. Here those of this machine."""

from __future__ import annotations

import os
import selectors
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from launcher.child import Child, ChildCommand, start_child
from launcher.exits import RankExit, order_of_death
from launcher.hang import Beat
from launcher.heartbeat import VARIABLE, read_heartbeat
from launcher.job import JobSpec, heartbeat_path, log_path
from launcher.rank_env import RankEnvironment

MASTER_ADDR = "127.0.0.1"
ATTEMPT_VARIABLE = "SOLOMONOV_ATTEMPT"
"""Environment variable that tells a rank the number of its attempt, and that somebody supervises it."""


class Gang(Protocol):
    """The ranks of one attempt, wherever they run; a context manager: when it is left, no process of it remains."""

    @property
    def pids(self) -> list[int]:
        """Process ids in order of rank, as far as they are known here."""

    @property
    def alive(self) -> bool:
        """At least one rank has not ended, as far as `wait` has seen."""

    def wait(self, timeout: float | None, also: Sequence[int] = ()) -> list[RankExit]:
        """Sleep until a rank ends, the wake descriptor or one of `also` is readable, or `timeout` seconds are over.

        Returns:
            Ends not reported before, the likelier cause first where several came at once.
        """

    @property
    def world_size(self) -> int | None:
        """Ranks of this attempt; None while that is not known yet."""

    @property
    def resize_reason(self) -> str | None:
        """Why the gang should save, leave, and be started anew with another number of ranks; None: it should not."""

    def beats(self) -> dict[int, Beat]:
        """The last sign of life of each living rank that gave one."""

    def terminate(self) -> None:
        """Ask every living rank to save and leave."""

    def dump_stacks(self) -> None:
        """Ask every living rank for the stacks of its threads, in its log."""

    def kill(self) -> None:
        """End every living rank, and what it has started, at once."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class StartGang(Protocol):
    """Starts the ranks of an attempt."""

    def __call__(self, spec: JobSpec, folder: Path, *, attempt: int, master_port: int, wake_fd: int) -> Gang:
        """Start them.

        Args:
            spec: what to start.
            folder: existing folder for logs and heartbeats.
            attempt: number of the attempt.
            master_port: where the ranks meet.
            wake_fd: a file descriptor that makes `wait` return when it becomes readable.

        Raises:
            LaunchConfigurationError: a rank could not be started; those before it were ended.
        """


def rank_environment(
    spec: JobSpec, place: RankEnvironment, folder: Path, attempt: int, inherited: Mapping[str, str]
) -> dict[str, str]:
    """The whole environment of one rank: what we inherited, what the job adds, and what makes it a rank.

    OMP_NUM_THREADS, unless someone chose it, is this rank's share of the cores that we may use: without it
    the thread pool of each rank takes all of them, and two ranks on two cores run several times slower than
    one.
    """
    given = {**inherited, **spec.environment}
    share = max(1, usable_cores() // place.local_world_size)
    return {
        "OMP_NUM_THREADS": str(share),
        "PYTHONUNBUFFERED": "1",
        **given,
        **place.to_environment(),
        VARIABLE: str(heartbeat_path(folder, place.rank)),
        ATTEMPT_VARIABLE: str(attempt),
    }


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def local_places(ranks: int, master_port: int) -> list[RankEnvironment]:
    """The places of a world that is on this machine alone."""
    return [
        RankEnvironment(
            rank=rank,
            world_size=ranks,
            local_rank=rank,
            local_world_size=ranks,
            group_rank=0,
            master_addr=MASTER_ADDR,
            master_port=master_port,
        )
        for rank in range(ranks)
    ]


class LocalGang:
    """Ranks that are children of this process; see `Gang` and `StartGang`.

    Args:
        places: the ranks to start; None: the whole world, on this machine.
    """

    def __init__(
        self,
        spec: JobSpec,
        folder: Path,
        *,
        attempt: int,
        master_port: int,
        wake_fd: int,
        places: Sequence[RankEnvironment] | None = None,
    ) -> None:
        self.world_size = spec.world_size
        self.resize_reason: str | None = None
        self._folder = folder
        self._attempt = attempt
        self._children: dict[int, Child] = {}
        self._living: set[int] = set()
        self._selector = selectors.DefaultSelector()
        self._selector.register(wake_fd, selectors.EVENT_READ, None)
        complete = False
        try:
            for place in local_places(spec.ranks, master_port) if places is None else places:
                self._start(spec, place)
            complete = True
        finally:
            if not complete:
                self.close()

    def _start(self, spec: JobSpec, place: RankEnvironment) -> None:
        rank = place.rank
        heartbeat_path(self._folder, rank).unlink(missing_ok=True)
        child = start_child(
            ChildCommand(
                command=spec.command,
                environment=rank_environment(spec, place, self._folder, self._attempt, os.environ),
                log_path=log_path(self._folder, rank),
                working_directory=spec.working_directory,
                pass_fds=spec.pass_fds,
            )
        )
        self._children[rank] = child
        self._living.add(rank)
        self._selector.register(child.exit_fd, selectors.EVENT_READ, rank)

    @property
    def pids(self) -> list[int]:
        """Process ids, in order of rank."""
        return [child.pid for child in self._children.values()]

    @property
    def alive(self) -> bool:
        """At least one rank has not ended, as far as `wait` has seen."""
        return bool(self._living)

    def wait(self, timeout: float | None, also: Sequence[int] = ()) -> list[RankExit]:
        """See `Gang.wait`."""
        for fd in also:
            self._selector.register(fd, selectors.EVENT_READ, None)
        ready = self._selector.select(timeout)
        for fd in also:
            self._selector.unregister(fd)
        ended = []
        for key, _ in ready:
            if key.data is not None and (end := self._ended(key.data)) is not None:
                self._selector.unregister(key.fileobj)
                ended.append(end)
        return order_of_death(ended)

    def _ended(self, rank: int) -> RankExit | None:
        child = self._children[rank]
        code = child.exit_code()
        if code is None:
            return None
        self._living.discard(rank)
        heartbeat = read_heartbeat(heartbeat_path(self._folder, rank))
        return RankExit(
            rank=rank,
            pid=child.pid,
            code=code,
            killed=child.killed and code == -signal.SIGKILL,
            seconds=child.seconds(),
            step=heartbeat.step if heartbeat else None,
            section=heartbeat.section if heartbeat else None,
            heartbeat_age_seconds=heartbeat.age_seconds() if heartbeat else None,
        )

    def beats(self) -> dict[int, Beat]:
        """See `Gang.beats`: from the files that the ranks write."""
        found = {}
        for rank in self._living:
            if (beat := read_heartbeat(heartbeat_path(self._folder, rank))) is not None:
                # The clock is that of `time.monotonic`, the same one for all processes of a machine.
                found[rank] = Beat(beat.step, beat.section_id, beat.section, beat.monotonic_ns / 1e9)
        return found

    def dump_stacks(self) -> None:
        """SIGQUIT to every living rank."""
        for rank in self._living:
            self._children[rank].send_signal(signal.SIGQUIT)

    def terminate(self) -> None:
        """SIGTERM to every living rank: save and leave."""
        for rank in self._living:
            self._children[rank].send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the process group of every living rank."""
        for rank in self._living:
            self._children[rank].kill()

    def close(self) -> None:
        """End and reap whatever is left, helpers of ranks that have ended included."""
        for child in self._children.values():
            child.kill()
        for child in self._children.values():
            child.reap()
        self._selector.close()

    def __enter__(self) -> LocalGang:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
