"""The nouns of launching, in the shape of `concurrent.futures`: what to run, the job, its attempts."""

from __future__ import annotations

import enum
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

from launcher.exits import RankExit, describe, first_cause
from launcher.hang import Hang, HangLimits

STARTER_LOGS = ("holder.log", "srun.log")
"""Of what starts the ranks of an attempt on Ray and on Slurm; in the attempt's folder."""
TAIL_LINES = 20
TAIL_BYTES = 16384
SIDECAR_NAME = r"[a-z][a-z0-9-]{0,39}"


class JobState(enum.Enum):
    """Where a job stands, the same words for every place that it may run in."""

    PENDING = "pending"
    """Submitted; no rank runs (yet, or between two attempts)."""
    RUNNING = "running"
    STOPPING = "stopping"
    """Asked to leave; its ranks are saving or being ended."""
    DONE = "done"
    """Exit code 0."""
    SAVED = "saved"
    """Exit code 75: saved, run it again."""
    CANCELLED = "cancelled"
    """Ended at once on request; what was not durable is lost."""
    FAILED = "failed"

    @property
    def is_terminal(self) -> bool:
        """Nothing follows."""
        return self in (JobState.DONE, JobState.SAVED, JobState.CANCELLED, JobState.FAILED)


@dataclass(frozen=True)
class Sidecar:
    """A process beside the ranks: started before them, started again whenever it dies, ended with the job.

    The ranks are not touched by its death; how long they wait for it is theirs to decide. Only a verdict (exit
    code 2, 70, 74 or 78) ends the job.

    Raises:
        ValueError: a bad name, no command, a bad variable name, a NUL byte, or no back-off.
    """

    name: str
    """What it is called in events and reasons; its log is `NAME.log` in the job's log folder, appended."""
    command: Sequence[str]
    """Program and arguments, passed on unchanged; no shell is involved."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to the job's."""
    restart_backoff_seconds: float = 0.5
    """Wait before the first start after a death; doubled for each further one, at most half a minute."""

    def __post_init__(self) -> None:
        if not re.fullmatch(SIDECAR_NAME, self.name):
            raise ValueError(f"the name of a sidecar matches {SIDECAR_NAME}, {self.name!r} does not")
        _require_passable(self.command, self.environment)
        if not (math.isfinite(self.restart_backoff_seconds) and self.restart_backoff_seconds > 0.0):
            raise ValueError(f"a back-off is a positive number of seconds, not {self.restart_backoff_seconds}")


@dataclass(frozen=True)
class JobSpec:
    """A command line that is started once a rank.

    Raises:
        ValueError: no command, no rank, a bad variable name, a NUL byte, which no argument can hold, or two
            sidecars of one name.
    """

    command: Sequence[str]
    """Program and arguments, passed on unchanged; no shell is involved."""
    log_folder: Path
    """Gets `attempt-K/rank-R.log`, stdout and stderr of each rank, the heartbeat files beside them, and the logs of
    the sidecars."""
    ranks: int = 1
    """Processes on each machine."""
    nodes: int = 1
    """Machines."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to the launcher's own environment; the torchrun variables win over it."""
    working_directory: Path | None = None
    """Where the ranks start; None: here."""
    pass_fds: Sequence[int] = ()
    """Open file descriptors that the ranks inherit under the same numbers."""
    first_attempt: int = 1
    """Number of the first attempt: a run that goes on counts on."""
    sidecars: Sequence[Sidecar] = ()
    """Processes beside the ranks, in the order of their start."""
    request_file: Path | None = None
    """A file by which others ask the job to leave, from wherever they see it (`write_request`); None: by signal."""
    hang: HangLimits | None = None
    """When ranks that write heartbeats count as hanging, and are killed for it; None: never."""

    def __post_init__(self) -> None:
        _require_passable(self.command, self.environment)
        if self.ranks < 1 or self.nodes < 1:
            raise ValueError(f"a job has at least one rank on one machine, not {self.ranks} on {self.nodes}")
        names = [sidecar.name for sidecar in self.sidecars]
        if len(set(names)) < len(names):
            raise ValueError(f"each sidecar has a name of its own, not {names}")

    def to_json(self) -> dict[str, Any]:
        """For `from_json` in another process; open files (`pass_fds`) stay behind."""
        return {
            **{each.name: getattr(self, each.name) for each in fields(self)},
            "command": list(self.command),
            "log_folder": str(self.log_folder.absolute()),
            "environment": dict(self.environment),
            "working_directory": str(self.working_directory) if self.working_directory is not None else None,
            "pass_fds": [],
            "request_file": str(self.request_file.absolute()) if self.request_file is not None else None,
            "sidecars": [asdict(sidecar) for sidecar in self.sidecars],
            "hang": {**asdict(replace(self.hang, allowances={})), "allowances": dict(self.hang.allowances)}
            if self.hang is not None
            else None,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> JobSpec:
        """What `to_json` gave."""
        given = dict(record)
        folder, hang, request = given["working_directory"], given["hang"], given["request_file"]
        given["log_folder"] = Path(given["log_folder"])
        given["working_directory"] = Path(folder) if folder is not None else None
        given["request_file"] = Path(request) if request is not None else None
        given["sidecars"] = [Sidecar(**sidecar) for sidecar in given["sidecars"]]
        given["hang"] = HangLimits(**{**hang, "every_step": tuple(hang["every_step"])}) if hang is not None else None
        return cls(**given)

    @property
    def world_size(self) -> int:
        """Ranks on all machines together."""
        return self.nodes * self.ranks

    def attempt_folder(self, attempt: int) -> Path:
        """Absolute folder of one attempt's logs."""
        return self.log_folder.absolute() / f"attempt-{attempt}"


@dataclass
class Attempt:
    """One start of all ranks, to the end of the last of them."""

    number: int
    folder: Path
    ranks: int
    """In the whole world."""
    pids: list[int]
    """In order of rank, as far as they are known on this machine."""
    master_port: int
    exits: list[RankExit] = field(default_factory=list)
    """Ends of ranks so far, in order of death."""
    hang: Hang | None = None
    """Why all of them were killed, if they were killed for that."""

    @property
    def cause(self) -> RankExit | None:
        """The end that explains the attempt; None while every rank runs."""
        for end in self.exits:
            if self.hang is not None and end.rank == self.hang.rank:
                return end
        return first_cause(self.exits) if self.exits else None

    def describe(self) -> str:
        """Why it ended, one clause for people."""
        if self.hang is not None:
            return self.hang.describe()
        assert self.cause is not None, "it has ended"
        return f"rank {self.cause.rank}: {describe(self.cause.code)}"

    @property
    def step(self) -> int | None:
        """Highest step of any rank's last heartbeat; None without heartbeats."""
        return max((end.step for end in self.exits if end.step is not None), default=None)

    @property
    def logs(self) -> list[Path]:
        """The ranks' log files, in order of rank."""
        return [log_path(self.folder, rank) for rank in range(self.ranks)]

    @property
    def tail(self) -> list[str]:
        """Last lines of the log of the rank that was the cause, or of what should have started it; empty while every
        rank runs."""
        if self.cause is None:
            return []
        logs = [log_path(self.folder, self.cause.rank), *(self.folder / name for name in STARTER_LOGS)]
        return next((tail(log) for log in logs if log.exists()), [])


def _require_passable(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Check that a process can be given these; ValueError if not."""
    if isinstance(command, str) or not command:
        raise ValueError(f"a command is a list of program and arguments, not {command!r}")
    for text in (*command, *environment, *environment.values()):
        if "\0" in text:
            raise ValueError(f"a NUL byte cannot be passed to a process: {text!r}")
    for name in environment:
        if not name or "=" in name:
            raise ValueError(f"not a name of an environment variable: {name!r}")


def write_request(path: Path, *, now: bool) -> None:
    """Ask a job to save and leave, or to end at once, by its request file."""
    aside = path.with_suffix(".tmp")
    aside.write_text("now" if now else "save", encoding="ascii")
    aside.rename(path)


def take_request(path: Path) -> str | None:
    """`save` or `now`, which is then no longer there; None where nobody has asked."""
    taken = path.with_suffix(".taken")
    try:
        path.rename(taken)  # not read and then deleted: a second request may come in between
    except FileNotFoundError:
        return None
    request = taken.read_text(encoding="ascii")
    taken.unlink()
    return request


def sidecar_log_path(spec: JobSpec, sidecar: Sidecar) -> Path:
    """Where stdout and stderr of a sidecar go, absolute."""
    return spec.log_folder.absolute() / f"{sidecar.name}.log"


def log_path(folder: Path, rank: int) -> Path:
    """Where stdout and stderr of a rank go."""
    return folder / f"rank-{rank}.log"


def heartbeat_path(folder: Path, rank: int) -> Path:
    """Where a rank writes its heartbeat."""
    return folder / f"heartbeat-{rank}"


def tail(path: Path, *, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a text file, from its last 16 KiB; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            text = file.read()
    except OSError:
        return []
    return text.decode("utf-8", errors="replace").splitlines()[-lines:]


class Job(Protocol):
    """A submitted command line, wherever it runs."""

    @property
    def state(self) -> JobState:
        """Where it stands now."""

    @property
    def exit_code(self) -> int | None:
        """What it left with, 0 to 255; None until it has ended."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end, at most `timeout` seconds.

        Returns:
            The exit code.

        Raises:
            TimeoutError: it has not ended in time; it goes on.
            LauncherError: it could not be started.
        """

    def cancel(self, *, now: bool = False) -> bool:
        """Ask the ranks to save and leave; `now`: end them at once. Does not wait.

        Returns:
            False if the job has ended already.
        """

    def logs(self) -> list[Path]:
        """Log files of the newest attempt, in order of rank; empty before the first."""


class EventCallback(Protocol):
    """Receives each event of a job, in order, in the thread that supervises it.

    * attempt_started: attempt, ranks, pids (those on this machine), master_port
    * rank_exited: attempt, rank, host (None: this machine), pid, exit_code (None: a signal), signal (its name or None),
      seconds, killed_by_launcher, lost (nobody saw it end), and of the last heartbeat, or None: step, section,
      heartbeat_age_seconds
    * hang: attempt, rank, step, section, seconds, limit_seconds, call (where its main thread was, or None)
    * world: attempt, ranks (where that turned out after the start)
    * resize: attempt, reason: its ranks are asked to save, and are started again in another number
    * restart: attempt (the one that will start), cause, rank (whose end that was; None: of another number of ranks),
      backoff_seconds
    * stopping: signal (its name, or `cancel`), now
    * sidecar_started: name, pid, starts (1 for the first)
    * sidecar_exited: name, pid, exit_code (None: a signal), signal (its name or None), seconds
    * sidecar_restart: name, cause, backoff_seconds
    * finished: exit_code, attempts (how many ran), reason, rank (whose end explains it; None: no rank's)
    """

    def __call__(self, kind: str, /, **fields: object) -> None:
        """Take note of one event; an exception ends the job and comes out of `run` or `wait`."""


def ignore_event(kind: str, /, **fields: object) -> None:
    """An event callback that does nothing."""
