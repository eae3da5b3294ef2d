"""Starts the ranks of a job on this machine, watches them, and starts them again."""

from __future__ import annotations

import math
import os
import selectors
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType

from launcher.child import unwritable
from launcher.config import LaunchConfig
from launcher.exits import Outcome, RankExit, describe, signal_name
from launcher.gang import Gang
from launcher.job import Attempt, EventCallback, JobSpec, JobState, ignore_event, tail
from launcher.ports import free_port, require_free
from launcher.sidecar import SidecarFailure, Sidecars
from launcher.supervisor import Action, Decision, RestartPolicy, Supervisor, SupervisorState

PEER_EXIT_SECONDS = 2.0
"""What ranks get to leave by themselves after a peer has failed: their collective is broken, so they cannot
save, but they may be about to say why. NCCL and gloo notice a closed connection within milliseconds."""

SIDECAR_END_SECONDS = 5.0
"""What sidecars get at the end of the job, between SIGTERM and SIGKILL."""

_JOB_STATES = {
    SupervisorState.READY: JobState.PENDING,
    SupervisorState.WAITING: JobState.PENDING,
    SupervisorState.RUNNING: JobState.RUNNING,
    SupervisorState.STOPPING: JobState.STOPPING,
    SupervisorState.KILLING: JobState.STOPPING,
    SupervisorState.DONE: JobState.DONE,
    SupervisorState.SAVED: JobState.SAVED,
    SupervisorState.CANCELLED: JobState.CANCELLED,
    SupervisorState.FAILED: JobState.FAILED,
}


class LocalLauncher:
    """Runs jobs on this machine.

    Args:
        config: restarts, grace, port.
        on_event: gets every event of a job (see `EventCallback`).
        durable_step: tells the newest step that is safely kept, None if there is none; asked before the first
            and after every attempt. Without it the steps of the heartbeats count as progress.
    """

    def __init__(
        self,
        config: LaunchConfig,
        *,
        on_event: EventCallback = ignore_event,
        durable_step: Callable[[], int | None] | None = None,
    ) -> None:
        self.config = config
        self.on_event = on_event
        self.durable_step = durable_step

    def submit(self, spec: JobSpec) -> LocalJob:
        """Start a job in the background; like a future, it keeps the interpreter alive until it has ended.

        Raises:
            LaunchConfigurationError: logs not writable, port taken. Later errors come out of `Job.wait`.
        """
        job = LocalJob(self, spec)
        job._start()
        return job

    def run(self, spec: JobSpec) -> LocalJob:
        """Run a job to its end in the main thread, which must be the caller.

        SIGINT, SIGTERM, SIGUSR1, SIGUSR2 and SIGHUP ask the ranks to save and leave; a second SIGINT ends
        them at once.

        Raises:
            LaunchConfigurationError: logs not writable, port taken, or the command cannot be started.
        """
        job = LocalJob(self, spec)
        with closing(job._mailbox), _signals_go_to(job):
            job._supervise()
        return job


class LocalJob:
    """A job on this machine; made by `LocalLauncher`.

    Raises:
        LaunchConfigurationError: logs not writable, or port taken.
    """

    def __init__(self, launcher: LocalLauncher, spec: JobSpec) -> None:
        self.spec = spec
        self.attempts: list[Attempt] = []
        """Every attempt so far, the newest last."""
        self._config = launcher.config
        self._emit = launcher.on_event
        self._durable_step = launcher.durable_step
        require_writable(spec.log_folder)
        if self._config.master_port is not None:
            require_free(self._config.master_port)
        step = self._durable_step() if self._durable_step else None
        self._supervisor = Supervisor(RestartPolicy.from_config(self._config), step=step)
        self._mailbox = Mailbox()
        self._sidecars = Sidecars(spec, self._emit)
        self._failed_sidecar: SidecarFailure | None = None
        self._over = False
        self._future: Future[int] | None = None
        self._interrupts = 0

    @property
    def state(self) -> JobState:
        """Where it stands now."""
        if self._future is not None and self._future.done() and not self._over:
            return JobState.FAILED  # it ended in an error, which `wait` raises
        if self._supervisor.state.is_terminal and not self._over:
            return JobState.STOPPING  # its sidecars are being ended
        return _JOB_STATES[self._supervisor.state]

    @property
    def exit_code(self) -> int | None:
        """What it left with, 0 to 255; None until it has ended, or if an error ended it."""
        return self._supervisor.exit_code if self._over else None

    @property
    def reason(self) -> str:
        """Why it ended, one clause; empty until then."""
        return self._supervisor.reason if self._over else ""

    @property
    def tail(self) -> list[str]:
        """Last lines of the log that explains the end: of the sidecar that failed, or of the newest attempt's cause."""
        if self._failed_sidecar is not None and self._supervisor.companion_was_the_cause:
            return tail(self._failed_sidecar.log)
        return self.attempts[-1].tail if self.attempts else []

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; see `Job.wait`."""
        if self._future is not None:
            return self._future.result(timeout)
        assert self.exit_code is not None, "a job that `run` gave back has ended"
        return self.exit_code

    def cancel(self, *, now: bool = False) -> bool:
        """Ask the ranks to save and leave; `now`: end them at once. See `Job.cancel`."""
        return self._mailbox.put("cancel", now=now)

    def logs(self) -> list[Path]:
        """Log files of the newest attempt, in order of rank."""
        return self.attempts[-1].logs if self.attempts else []

    def _start(self) -> None:
        # One thread that starts all children and outlives them (the kernel kills them when it ends).
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="supervisor")
        self._future = executor.submit(self._supervise_and_close)
        executor.shutdown(wait=False)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
        self._mailbox.put(signal.Signals(number).name, now=number == signal.SIGINT and self._interrupts > 1)

    def _supervise_and_close(self) -> int:
        with closing(self._mailbox):
            return self._supervise()

    def _supervise(self) -> int:
        """Attempts until the supervisor says stop; returns the exit code."""
        supervisor = self._supervisor
        try:
            self._take_requests(None)
            if not supervisor.state.is_terminal:
                self._sidecars.start()
            while not supervisor.state.is_terminal:
                decision = self._run_attempt(self.spec.first_attempt + len(self.attempts))
                if decision.action is Action.RESTART:
                    self._back_off(decision)
        finally:
            self._end_sidecars()
        self._over = True
        code = supervisor.exit_code
        assert code is not None, "a terminal state has an exit code"
        self._emit("finished", exit_code=code, attempts=len(self.attempts), reason=supervisor.reason)
        return code

    def _run_attempt(self, number: int) -> Decision:
        folder = self.spec.attempt_folder(number)
        make_folder(folder)
        port = self._config.master_port
        if port is None:
            port = free_port()
        else:
            require_free(port)
        with Gang(self.spec, folder, master_port=port, wake_fd=self._mailbox.fd) as gang:
            attempt = Attempt(number=number, folder=folder, pids=gang.pids, master_port=port)
            self.attempts.append(attempt)
            self._supervisor.attempt_started()
            self._emit("attempt_started", attempt=number, ranks=self.spec.ranks, pids=attempt.pids, master_port=port)
            self._watch(gang, attempt)
        cause = attempt.cause
        assert cause is not None, "every rank has ended"
        step = self._durable_step() if self._durable_step else attempt.step
        return self._supervisor.attempt_ended(cause.code, step)

    def _watch(self, gang: Gang, attempt: Attempt) -> None:
        """Until no rank is left: note ends, obey requests, and kill those who outstay their time."""
        deadline = math.inf
        while gang.alive:
            wake_at = min(deadline, self._sidecars.next_start)
            remaining = None if math.isinf(wake_at) else max(0.0, wake_at - time.monotonic())
            for end in gang.wait(remaining, also=self._sidecars.exit_fds):
                attempt.exits.append(end)
                self._emit_exit(attempt.number, end)
                deadline = min(deadline, time.monotonic() + self._patience(end))
            if self._take_requests(gang):
                deadline = min(deadline, time.monotonic() + self._config.grace_seconds)
            self._tend_sidecars(gang)
            if time.monotonic() >= deadline:
                gang.kill()
                deadline = math.inf  # what SIGKILL does not end at once, nothing ends sooner

    def _patience(self, end: RankExit) -> float:
        """Seconds that the other ranks have after this end."""
        if end.outcome.is_failure:
            return min(PEER_EXIT_SECONDS, self._config.grace_seconds)
        return self._config.grace_seconds if end.outcome is Outcome.AGAIN else math.inf

    def _take_requests(self, gang: Gang | None) -> bool:
        """Obey what came in; True if the ranks were asked to leave."""
        asked = False
        for source, now in self._mailbox.take():
            if now:
                if self._supervisor.kill_requested():
                    self._emit("stopping", signal=source, now=True)
                    self._sidecars.kill()
                    if gang is not None:
                        gang.kill()
            elif self._supervisor.stop_requested():
                self._emit("stopping", signal=source, now=False)
                if gang is not None:
                    gang.terminate()
                    asked = True
        return asked

    def _tend_sidecars(self, gang: Gang | None) -> None:
        """Keep them alive; one that failed for good ends the ranks, and the job."""
        failure = self._sidecars.tend()
        if failure is None:
            return
        if self._failed_sidecar is None:
            self._failed_sidecar = failure
        if self._supervisor.companion_failed(failure.code, failure.reason) and gang is not None:
            gang.kill()

    def _end_sidecars(self) -> None:
        """SIGTERM, then SIGKILL to those who outstay their time; at once if the job was told to leave at once."""
        deadline = time.monotonic() + SIDECAR_END_SECONDS
        try:
            self._sidecars.terminate()
            while fds := self._sidecars.exit_fds:
                self._mailbox.wait(max(0.0, deadline - time.monotonic()), also=fds)
                self._sidecars.tend()
                if time.monotonic() >= deadline or any(now for _, now in self._mailbox.take()):
                    return
        finally:
            self._sidecars.close()

    def _back_off(self, decision: Decision) -> None:
        """Wait before the next attempt; a request ends the wait."""
        cause = self.attempts[-1].cause
        assert cause is not None, "the attempt has ended"
        self._emit(
            "restart",
            attempt=self.spec.first_attempt + len(self.attempts),
            cause=f"rank {cause.rank}: {describe(cause.code)}",
            backoff_seconds=decision.backoff_seconds,
        )
        deadline = time.monotonic() + decision.backoff_seconds
        while not self._supervisor.state.is_terminal:
            wake_at = min(deadline, self._sidecars.next_start)
            self._mailbox.wait(max(0.0, wake_at - time.monotonic()), also=self._sidecars.exit_fds)
            self._take_requests(None)
            self._tend_sidecars(None)
            if time.monotonic() >= deadline:
                return

    def _emit_exit(self, attempt: int, end: RankExit) -> None:
        self._emit(
            "rank_exited",
            attempt=attempt,
            rank=end.rank,
            pid=end.pid,
            exit_code=end.code if end.code >= 0 else None,
            signal=signal_name(end.code),
            killed_by_launcher=end.killed,
            step=end.step,
            section=end.section,
            heartbeat_age_seconds=end.heartbeat_age_seconds,
            seconds=end.seconds,
        )


class Mailbox:
    """Requests from signal handlers and other threads to the supervising one, which sleeps on `fd`."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._requests: deque[tuple[str, bool]] = deque()
        self._lock = threading.RLock()  # a signal handler may come while its own thread holds it
        self._open = True

    @property
    def fd(self) -> int:
        """Readable while there may be requests."""
        return self._reader

    @property
    def wake_fd(self) -> int:
        """A byte written here wakes the sleeper (`signal.set_wakeup_fd`)."""
        return self._writer

    def put(self, source: str, *, now: bool) -> bool:
        """Leave a request; False if nobody reads any more."""
        with self._lock:
            if not self._open:
                return False
            self._requests.append((source, now))
            try:
                os.write(self._writer, b"!")
            except BlockingIOError:
                pass  # a full pipe wakes the sleeper as well
            return True

    def take(self) -> list[tuple[str, bool]]:
        """All requests so far, oldest first."""
        try:
            while os.read(self._reader, 4096):
                pass
        except BlockingIOError:
            pass
        taken = []
        while self._requests:
            taken.append(self._requests.popleft())
        return taken

    def wait(self, timeout: float, also: Sequence[int] = ()) -> None:
        """Sleep until there is a request, a descriptor of `also` is readable, or `timeout` seconds are over."""
        with selectors.DefaultSelector() as selector:
            for fd in (self._reader, *also):
                selector.register(fd, selectors.EVENT_READ)
            selector.select(timeout)

    def close(self) -> None:
        """Take no more requests."""
        with self._lock:
            self._open = False
            os.close(self._reader)
            os.close(self._writer)


def make_folder(folder: Path) -> None:
    """Make a folder with its parents.

    Raises:
        LaunchConfigurationError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error


def require_writable(folder: Path) -> None:
    """Make a folder if need be, and check that files can be created in it.

    Raises:
        LaunchConfigurationError: they cannot.
    """
    make_folder(folder)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise unwritable(folder, error) from error


@contextmanager
def _signals_go_to(job: LocalJob) -> Iterator[None]:
    """Signals to this process become requests to the job.

    SIGHUP stays ignored where this process was started so (nohup). SIGINT does not, though shells start the
    background jobs of a script so: whoever stops the script does not want the ranks to go on. SIGCHLD must not
    be ignored, or the kernel throws the ranks' exit codes away.
    """
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:  # not in a child between fork and exec, which shares the pipe
            job._on_signal(number, frame)

    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            previous[number] = signal.signal(number, handle)
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        previous[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    wake = signal.set_wakeup_fd(job._mailbox.wake_fd, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wake)
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
