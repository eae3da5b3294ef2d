"""Supervises a job from this machine: starts its ranks, watches them, starts them again.

The ranks are children of this process, or wherever another kind of gang starts them (see `launcher.gang.StartGang`).
"""

from __future__ import annotations

import math
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

from launcher.child import unwritable
from launcher.config import LaunchConfig
from launcher.errors import LaunchConfigurationError
from launcher.exits import ExitCode, Outcome, RankExit, signal_name
from launcher.gang import Gang, LocalGang, StartGang
from launcher.hang import GangWatch
from launcher.job import Attempt, EventCallback, JobSpec, JobState, ignore_event, tail, take_request
from launcher.mailbox import Mailbox
from launcher.ports import free_port, require_free
from launcher.sidecar import SidecarFailure, Sidecars
from launcher.stacks import culprit, innermost_call
from launcher.supervisor import Action, Decision, RestartPolicy, Supervisor, SupervisorState

PEER_EXIT_SECONDS = 2.0
"""What ranks get to leave by themselves after a peer has failed: their collective is broken, so they cannot
save, but they may be about to say why. NCCL and gloo notice a closed connection within milliseconds."""

HANG_LOOK_SECONDS = 0.25
"""Between two looks at the heartbeats."""

REQUEST_LOOK_SECONDS = 1.0
"""Between two looks at the request file."""

STACKS_SECONDS = 2.0
"""What the ranks of a gang that hangs get to write their stacks."""

SIDECAR_END_SECONDS = 5.0
"""What sidecars get at the end of the job, between SIGTERM and SIGKILL."""

_JOB_STATES = {
    SupervisorState.READY: JobState.PENDING,
    SupervisorState.WAITING: JobState.PENDING,
    SupervisorState.RUNNING: JobState.RUNNING,
    SupervisorState.RESIZING: JobState.RUNNING,
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
        start_gang: starts the ranks of an attempt; by default on this machine.
        still_ours: asked before each attempt; False: another supervisor has taken over, so start nothing.
    """

    def __init__(
        self,
        config: LaunchConfig,
        *,
        on_event: EventCallback = ignore_event,
        durable_step: Callable[[], int | None] | None = None,
        start_gang: StartGang = LocalGang,
        still_ours: Callable[[], bool] = lambda: True,
    ) -> None:
        self.config = config
        self.on_event = on_event
        self.durable_step = durable_step
        self.start_gang = start_gang
        self.still_ours = still_ours

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
        self._start_gang = launcher.start_gang
        self._still_ours = launcher.still_ours
        if spec.nodes > 1 and self._start_gang is LocalGang:
            raise _one_machine(spec.nodes)
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
        self._request_look_seconds = REQUEST_LOOK_SECONDS if spec.request_file is not None else math.inf

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
                if not self._still_ours():
                    supervisor.taken_over()
                    break
                decision = self._run_attempt(self.spec.first_attempt + len(self.attempts))
                if decision.action is Action.RESTART:
                    self._back_off(decision)
        finally:
            self._end_sidecars()
        self._over = True
        code = supervisor.exit_code
        assert code is not None, "a terminal state has an exit code"
        end = {"exit_code": code, "reason": supervisor.reason, "rank": self._rank_of_cause()}
        self._emit("finished", attempts=len(self.attempts), **end)
        return code

    def _run_attempt(self, number: int) -> Decision:
        folder = self.spec.attempt_folder(number)
        make_folder(folder)
        port = self._config.master_port
        if port is None:
            port = free_port()
        else:
            require_free(port)
        with self._start_gang(self.spec, folder, attempt=number, master_port=port, wake_fd=self._mailbox.fd) as gang:
            attempt = Attempt(number, folder, self.spec.world_size, gang.pids, port)
            self.attempts.append(attempt)
            self._supervisor.attempt_started()
            self._emit("attempt_started", attempt=number, ranks=attempt.ranks, pids=attempt.pids, master_port=port)
            self._watch(gang, attempt)
        cause = attempt.cause
        assert cause is not None, "every rank has ended"
        step = self._durable_step() if self._durable_step else attempt.step
        return self._supervisor.attempt_ended(cause.code, step)

    def _watch(self, gang: Gang, attempt: Attempt) -> None:
        """Until no rank is left: note ends, obey requests, and kill those who outstay their time, or hang."""
        watch = GangWatch(self.spec.hang) if self.spec.hang is not None else None
        deadline = math.inf
        while gang.alive:
            now = time.monotonic()
            look_at = now + HANG_LOOK_SECONDS if watch is not None else math.inf
            wake_at = min(deadline, self._sidecars.next_start, look_at, now + self._request_look_seconds)
            remaining = None if math.isinf(wake_at) else max(0.0, wake_at - now)
            for end in gang.wait(remaining, also=self._sidecars.exit_fds):
                attempt.exits.append(end)
                self._emit_exit(attempt.number, end)
                deadline = min(deadline, time.monotonic() + self._patience(end))
            if self._take_requests(gang):
                deadline = min(deadline, time.monotonic() + self._config.grace_seconds)
            self._tend_sidecars(gang)
            if gang.world_size is not None and gang.world_size != attempt.ranks:
                attempt.ranks = gang.world_size
                self._emit("world", attempt=attempt.number, ranks=attempt.ranks)
            if gang.resize_reason is not None and self._supervisor.resize_requested():
                self._emit("resize", attempt=attempt.number, reason=gang.resize_reason)
                gang.terminate()
                deadline = min(deadline, time.monotonic() + self._config.grace_seconds)
            if watch is not None and not attempt.exits and self._hangs(gang, attempt, watch):
                watch = None
                deadline = min(deadline, time.monotonic())
            if time.monotonic() >= deadline:
                gang.kill()
                deadline = math.inf  # what SIGKILL does not end at once, nothing ends sooner

    def _hangs(self, gang: Gang, attempt: Attempt, watch: GangWatch) -> bool:
        """Look at the heartbeats; of a gang that hangs, take the stacks and say so."""
        hang = watch.look(gang.beats(), time.monotonic())
        if hang is None:
            return False
        logs = {rank: attempt.logs[rank] for rank in (hang.rank, *hang.beside)}
        before = {rank: log.stat().st_size if log.exists() else 0 for rank, log in logs.items()}
        gang.dump_stacks()
        time.sleep(STACKS_SECONDS)  # nothing tells that a dump is complete; who is frozen gives none
        calls = {rank: innermost_call(_text_from(log, before[rank])) for rank, log in logs.items()}
        attempt.hang = hang = replace(hang, rank=culprit(calls), beside=())
        self._emit(
            "hang",
            attempt=attempt.number,
            rank=hang.rank,
            step=hang.step,
            section=hang.section,
            seconds=hang.seconds,
            limit_seconds=hang.limit_seconds,
            call=calls[hang.rank],
        )
        return True

    def _patience(self, end: RankExit) -> float:
        """Seconds that the other ranks have after this end."""
        if end.outcome.is_failure:
            return min(PEER_EXIT_SECONDS, self._config.grace_seconds)
        return self._config.grace_seconds if end.outcome is Outcome.AGAIN else math.inf

    def _take_requests(self, gang: Gang | None) -> bool:
        """Obey what came in; True if the ranks were asked to leave."""
        asked = False
        if self.spec.request_file is not None:
            request = take_request(self.spec.request_file)
            if request is not None:
                self._mailbox.put("request", now=request == "now")
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
        number = self.spec.first_attempt + len(self.attempts)
        resized = decision.exit_code == ExitCode.AGAIN
        self._emit(
            "restart",
            attempt=number,
            cause=decision.reason if resized else self.attempts[-1].describe(),
            rank=None if resized else self._rank_of_cause(),
            backoff_seconds=decision.backoff_seconds,
        )
        deadline = time.monotonic() + decision.backoff_seconds
        while not self._supervisor.state.is_terminal:
            now = time.monotonic()
            wake_at = min(deadline, self._sidecars.next_start, now + self._request_look_seconds)
            self._mailbox.wait(max(0.0, wake_at - time.monotonic()), also=self._sidecars.exit_fds)
            self._take_requests(None)
            self._tend_sidecars(None)
            if time.monotonic() >= deadline:
                return

    def _rank_of_cause(self) -> int | None:
        """The rank whose end explains that of the newest attempt; None before the first."""
        cause = self.attempts[-1].cause if self.attempts else None
        return cause.rank if cause is not None else None

    def _emit_exit(self, attempt: int, end: RankExit) -> None:
        self._emit(
            "rank_exited",
            attempt=attempt,
            rank=end.rank,
            host=end.host,
            pid=end.pid,
            exit_code=end.code if end.code >= 0 else None,
            signal=signal_name(end.code),
            killed_by_launcher=end.killed,
            lost=end.lost,
            step=end.step,
            section=end.section,
            heartbeat_age_seconds=end.heartbeat_age_seconds,
            seconds=end.seconds,
        )


def _one_machine(nodes: int) -> LaunchConfigurationError:
    return LaunchConfigurationError(
        "ranks on other machines cannot be started from here",
        got=f"launch.nodes = {nodes}",
        rule="on this machine alone a run has one node",
        remedy="set launch.nodes: 1, or submit the run: solomonov submit CONFIG --on slurm",
    )


def _text_from(path: Path, offset: int) -> str:
    """What was written to a text file after an offset; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""


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
