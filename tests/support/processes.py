"""Starts real programs for tests, watches conditions with a deadline, and leaves nothing running.

Nothing here sleeps for a fixed time: every wait polls a condition, and fails with what it saw when its
deadline passes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import psutil

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
PR_SET_PDEATHSIG = 1
POLL_SECONDS = 0.02
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def program_environment(**extra: str) -> dict[str, str]:
    """The environment for a program of ours: CPU, one thread, our packages importable from any folder."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    fixed = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return {**os.environ, **fixed, **extra}


def die_with_parent() -> None:
    """In a child before exec: asks the kernel for SIGKILL when the thread that started it ends (Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def wait_for(condition: Callable[[], T], *, deadline: float, what: str) -> T:
    """Polls until `condition()` is true and returns its value; TimeoutError with `what` after `deadline` seconds."""
    end = time.monotonic() + deadline
    while True:
        if value := condition():
            return value
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: still not so after {deadline:g} s")
        time.sleep(POLL_SECONDS)


def processes_with(token: str, folder: Path | None = None) -> list[psutil.Process]:
    """The live processes, zombies and this one left out, whose command line contains `token`.

    With `folder`, only those that work in it or below: another test's may have the same command line.
    """
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            if token not in line or process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if folder is None or Path(process.cwd()).is_relative_to(folder.resolve()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def assert_no_process(token: str, folder: Path | None = None, *, deadline: float = 30.0) -> None:
    """Fails when one of `processes_with(token, folder)` is still alive after `deadline` seconds."""
    end = time.monotonic() + deadline
    while left := processes_with(token, folder):
        if time.monotonic() > end:
            lines = []
            for process in left:
                try:
                    lines.append(f"  {process.pid} {process.status()} {' '.join(process.cmdline())}")
                except psutil.NoSuchProcess:
                    continue
            raise AssertionError(f"processes with {token!r} are still running:\n" + "\n".join(lines))
        time.sleep(POLL_SECONDS)


def kill_group(pid: int, number: int = signal.SIGKILL) -> None:
    """Sends a signal to the whole process group of `pid`, if there still is one."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


class Program:
    """A command in a session (and process group) of its own, its output in one file, dying with this process.

    Use it in a `with` statement: leaving it kills what is left of the group. `pid` is also the group's id.
    """

    def __init__(
        self,
        argv: Sequence[str | Path],
        *,
        log: Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        stdin: int = subprocess.DEVNULL,
    ) -> None:
        self.argv = [str(word) for word in argv]
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                self.argv,
                cwd=cwd,
                env=None if env is None else dict(env),
                stdin=stdin,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=tuple(pass_fds),
                preexec_fn=die_with_parent,
            )
        self.pid = self.process.pid

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def output(self) -> str:
        """Everything that the program wrote so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait(self, *, deadline: float) -> int:
        """The exit code (negative: the signal's number); fails with the output when the deadline passes."""
        try:
            return self.process.wait(timeout=deadline)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.argv} ran longer than {deadline:g} s:\n{self.output()}") from None

    def wait_for(self, condition: Callable[[], T], *, deadline: float, what: str) -> T:
        """As the function `wait_for`, but fails at once, with the output, when the program ends before."""

        def met() -> T:
            running = self.running  # asked first: what the condition sees may be the program's last act
            value = condition()
            if not value and not running:
                code = self.process.returncode
                raise AssertionError(f"{what}: {self.argv} ended with {code} before it\n{self.output()}")
            return value

        try:
            return wait_for(met, deadline=deadline, what=what)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self.argv} wrote:\n{self.output()}") from None

    def send(self, number: int) -> None:
        """Sends a signal to the program alone."""
        self.process.send_signal(number)

    def kill(self) -> int:
        """SIGKILL to the whole group; returns the program's exit code."""
        kill_group(self.pid)
        return self.process.wait()


def run_program(
    argv: Sequence[str | Path],
    *,
    log: Path,
    deadline: float,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """Runs a command to its end; returns its exit code and its output (stdout and stderr as they came)."""
    with Program(argv, log=log, cwd=cwd, env=env) as program:
        code = program.wait(deadline=deadline)
        return code, program.output()
