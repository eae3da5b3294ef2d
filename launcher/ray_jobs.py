"""Submits jobs to a Ray cluster (Ray Jobs) and follows them from outside; what runs there is a supervisor."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.config import LaunchConfig
from launcher.errors import LaunchConfigurationError, RayError
from launcher.exits import ExitCode
from launcher.job import JobState, write_request
from launcher.ray import check_cluster, client_environment, require_ray
from launcher.shared_storage import require_shared
from launcher.slurm import newest_logs

if TYPE_CHECKING:
    from launcher.ray_door import JobsClient

POLL_SECONDS = 1.0
ADDRESS = "SOLOMONOV_LAUNCH_ON_RAY"
"""Environment variable that tells a supervisor the cluster on which it starts its ranks."""
MODULE = "solomonov.cli"
STOP_MARGIN_SECONDS = 30.0
"""What a supervisor needs beyond the grace of its ranks."""

_STATES = {
    "PENDING": JobState.PENDING,
    "RUNNING": JobState.RUNNING,
    "SUCCEEDED": JobState.DONE,
    "STOPPED": JobState.CANCELLED,
    "FAILED": JobState.FAILED,
}


@dataclass(frozen=True)
class RayRequest:
    """A job for a Ray cluster."""

    name: str
    """Of the submission: the cluster takes each name once."""
    folder: Path
    """Given to the supervisor; a run's folder."""
    log_folder: Path
    config: LaunchConfig
    python: str = sys.executable
    module: str = MODULE
    """The module whose `supervise FOLDER` the job runs."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to the job's."""

    @property
    def address(self) -> str:
        """host:port of the cluster's head.

        Raises:
            LaunchConfigurationError: none is configured.
        """
        if self.config.ray_address is None:
            raise LaunchConfigurationError(
                "no Ray cluster is named",
                got=f"launch.ray_address = {self.config.ray_address}",
                rule="a run is submitted to a cluster that runs",
                remedy="set launch.ray_address to host:port of its head; start one with `ray start --head --port 6379`",
            )
        return self.config.ray_address

    @property
    def command(self) -> str:
        """The command line, for the shell in which Ray starts it."""
        return shlex.join([self.python, "-m", self.module, "supervise", str(self.folder.absolute())])

    @property
    def job_environment(self) -> dict[str, str]:
        """What the job finds in its environment."""
        return {
            **client_environment(),
            ADDRESS: self.address,
            # Ray would kill a job 3 s after it has asked it to stop.
            "RAY_JOB_STOP_WAIT_TIME_S": str(int(self.config.grace_seconds + STOP_MARGIN_SECONDS)),
            **self.environment,
        }


class RayLauncher:
    """Submits jobs to Ray clusters."""

    def check(self, request: RayRequest) -> str:
        """Look at the cluster; returns the address of its dashboard, through which jobs are submitted.

        Raises:
            LaunchConfigurationError: it cannot be joined, takes no jobs, or does not see the run's folder.
        """
        require_ray()
        look = cache(lambda: check_cluster(request.address, {}))
        if request.config.nodes > 1:
            require_shared(request.folder, request.config, lambda: look().elsewhere)
        dashboard = look().dashboard
        problem = "no dashboard" if dashboard is None else self._problem(dashboard)
        if dashboard is None or problem is not None:
            raise LaunchConfigurationError(
                "the Ray cluster takes no jobs",
                got=f"{request.address}: {problem}",
                rule="jobs are submitted through the dashboard of the head, which `ray[default]` serves",
                remedy="pip install 'ray[default]' on the head, and start it with --include-dashboard=true",
            )
        return dashboard

    def _problem(self, dashboard: str) -> str | None:
        """Why no jobs can be submitted there; None where they can."""
        from launcher.ray_door import JobsClient

        try:
            JobsClient(dashboard)
        except (ConnectionError, RuntimeError) as error:
            return f"{dashboard}: {str(error).strip().splitlines()[0]}"
        return None

    def submit(self, request: RayRequest) -> RayJob:
        """Check a request and hand it to the cluster.

        Raises:
            LaunchConfigurationError: it cannot work.
            RayError: the cluster refuses it, or does not answer.
        """
        dashboard = self.check(request)
        job = RayJob(request.name, dashboard, request.log_folder)
        try:
            job.client.submit(request.name, request.command, request.job_environment)
        except RuntimeError as error:
            raise RayError(
                "Ray refuses the job",
                got=str(error).strip().splitlines()[-1],
                rule="each name is taken once, and the cluster has an agent on its head",
                remedy="see the dashboard: " + dashboard,
            ) from error
        return job


class RayJob:
    """A job that was submitted to a Ray cluster, followed by its name; see `launcher.job.Job`.

    Args:
        name: of the submission.
        dashboard: http address of the cluster's dashboard.
        log_folder: of the job.
    """

    def __init__(self, name: str, dashboard: str, log_folder: Path) -> None:
        self.name, self.dashboard, self.log_folder = name, dashboard, log_folder
        self._client: JobsClient | None = None

    @property
    def client(self) -> JobsClient:
        """The door to the cluster's jobs; RayError where it does not answer."""
        from launcher.ray_door import JobsClient

        if self._client is None:
            try:
                self._client = JobsClient(self.dashboard)
            except (ConnectionError, RuntimeError) as error:
                raise RayError(
                    "the dashboard of the Ray cluster does not answer",
                    got=f"{self.dashboard}: {error}",
                    rule="jobs are submitted and followed through it",
                    remedy="see whether the head runs; a run that it took down goes on with `solomonov resume`",
                ) from error
        return self._client

    def record(self) -> tuple[JobState, int | None, str] | None:
        """State, exit code and message; None where the cluster does not know the job."""
        found = self.client.status(self.name)
        if found is None:
            return None
        state, code, message = found
        return _state(state, code), code, message

    @property
    def state(self) -> JobState:
        """Where it stands now."""
        found = self.record()
        return found[0] if found is not None else JobState.FAILED

    @property
    def exit_code(self) -> int | None:
        """What it left with, 0 to 255; None until it has ended."""
        found = self.record()
        if found is None or not found[0].is_terminal:
            return None
        return exit_code_of(found[0], found[1])

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; see `Job.wait`."""
        deadline = time.monotonic() + timeout if timeout is not None else None
        while (code := self.exit_code) is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"Ray's job {self.name} has not ended")
            time.sleep(POLL_SECONDS)
        return code

    def cancel(self, *, now: bool = False) -> bool:
        """Ask the ranks to save and leave; `now`: end them at once. See `Job.cancel`."""
        if self.exit_code is not None:
            return False
        # Not by Ray's own stop: that has one meaning only, and leaves no exit code.
        write_request(request_file(self.log_folder, self.name), now=now)
        return True

    def logs(self) -> list[Path]:
        """Log files of the newest attempt, in order of rank."""
        return newest_logs(self.log_folder)


def request_file(log_folder: Path, name: str) -> Path:
    """Where the supervisor of a job looks for requests to leave."""
    return log_folder / f"ray-{name}.request"


def _state(state: str, code: int | None) -> JobState:
    found = _STATES.get(state, JobState.FAILED)
    if found is JobState.FAILED and code == ExitCode.AGAIN:
        return JobState.SAVED
    if found is JobState.FAILED and code == ExitCode.INTERRUPTED:
        return JobState.CANCELLED
    return found


def exit_code_of(state: JobState, code: int | None) -> int:
    """What a job that has ended left with."""
    if state is JobState.CANCELLED:
        return ExitCode.INTERRUPTED
    if code is None:
        return 0 if state is JobState.DONE else 1
    return 128 - code if code < 0 else code
