"""One child process that cannot outlive us: own process group, killed by the kernel when its starter dies."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import LaunchConfigurationError

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

# Loaded before any fork: the child may only call what is in memory already.
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
if _LIBC is not None:
    _LIBC.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    _LIBC.prctl.restype = ctypes.c_int


@dataclass(frozen=True)
class ChildCommand:
    """What to start and how."""

    command: Sequence[str]
    environment: Mapping[str, str]
    """The whole environment of the child."""
    log_path: Path
    """Gets stdout and stderr, appended."""
    working_directory: Path | None = None
    pass_fds: Sequence[int] = ()
    output_fd: int | None = None
    """Gets stdout instead of the log."""
    input_fd: int | None = None
    """Is stdin; None: stdin is empty."""


class Child:
    """A started process, the leader of its own process group.

    It stays a zombie after its end until `reap`, so that its process group's number is not given to strangers
    and `kill` can also end what it left behind.

    Args:
        process: the started process.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.pid = process.pid
        self.exit_fd = _exit_fd(process)
        """Becomes readable when the process has ended."""
        self.killed = False
        """SIGKILL was sent before the end was seen."""
        self._started_ns = time.monotonic_ns()
        self._code: int | None = None

    def seconds(self) -> float:
        """Since the start."""
        return (time.monotonic_ns() - self._started_ns) / 1e9

    def exit_code(self) -> int | None:
        """The code, -n for signal n; None while it runs. Does not reap."""
        if self._code is None:
            self._code = _peek(self._process)
        return self._code

    def send_signal(self, number: signal.Signals) -> None:
        """Signal the process alone: its helpers are its own business (a writer outlives a save)."""
        if self._code is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL the whole process group, also when its leader has ended already."""
        if self.exit_code() is None:
            self.killed = True
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # nobody is left in the group (macOS says EPERM where only the zombie is left)

    def reap(self) -> None:
        """End the group and wait for the leader; the object is of no further use."""
        self.kill()
        self._process.wait()
        os.close(self.exit_fd)


def start_child(spec: ChildCommand) -> Child:
    """Start a process that the kernel kills (SIGKILL) when the calling *thread* ends.

    So call it from a thread that lives as long as the child may. Only Linux has this service; elsewhere the
    child is an ordinary process.

    Raises:
        LaunchConfigurationError: the log cannot be written or the program cannot be started.
    """
    try:
        log = spec.log_path.open("ab")
    except OSError as error:
        raise unwritable(spec.log_path, error) from error
    with log:
        try:
            process = subprocess.Popen(
                list(spec.command),
                stdin=subprocess.DEVNULL if spec.input_fd is None else spec.input_fd,
                stdout=log if spec.output_fd is None else spec.output_fd,
                stderr=log,
                env=dict(spec.environment),
                cwd=spec.working_directory,
                pass_fds=tuple(spec.pass_fds),
                process_group=0,
                preexec_fn=_die_with_parent(os.getpid()) if sys.platform == "linux" else None,
            )
        except OSError as error:
            raise LaunchConfigurationError(
                f"the command {spec.command[0]!r} cannot be started",
                got=f"{error.strerror}: {error.filename or spec.command[0]!r}",
                rule="an executable program, and a folder to start it in",
                remedy="check the path, its permissions, and the limits of this user (ulimit -a)",
            ) from error
    return Child(process)


def unwritable(path: Path, error: OSError) -> LaunchConfigurationError:
    """The error for a log folder or file that cannot be written."""
    return LaunchConfigurationError(
        "the ranks' logs cannot be written",
        got=f"{path}: {error.strerror}",
        rule="a folder in which this user may create files, on a disk that is not full",
        remedy="mend its permissions, or name another run folder",
    )


def _die_with_parent(parent: int) -> Callable[[], None]:
    """What the child does between fork and exec."""

    def in_child() -> None:
        if not tell_parents_end(parent, signal.SIGKILL):
            os.kill(os.getpid(), signal.SIGKILL)

    return in_child


def tell_parents_end(parent: int, number: signal.Signals) -> bool:
    """Have the kernel (Linux) send us a signal when the thread that started us ends, in place of any before.

    Returns:
        False if nobody will tell us: it could not be armed, or the parent died before it was.
    """
    assert _LIBC is not None, "loaded on Linux"
    armed = _LIBC.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) == 0
    return armed and os.getppid() == parent


def _exit_fd(process: subprocess.Popen[bytes]) -> int:
    """A file descriptor that becomes readable at the end of a process."""
    if sys.platform == "linux":
        try:
            return os.pidfd_open(process.pid)
        except OSError:
            pass  # kernels before 5.3, and sandboxes that forbid the call
    return exit_fd_by_thread(process)


def exit_fd_by_thread(process: subprocess.Popen[bytes]) -> int:
    """The same without kernel help: a thread waits and closes the other end of a pipe."""
    reader, writer = os.pipe()

    def wait() -> None:
        if sys.platform == "linux":
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        else:
            process.wait()
        os.close(writer)

    threading.Thread(target=wait, name=f"wait-{process.pid}", daemon=True).start()
    return reader


def _peek(process: subprocess.Popen[bytes]) -> int | None:
    """The exit code without reaping, where the system can tell."""
    if sys.platform == "linux":
        found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if found is None:
            return None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
    return process.poll()
