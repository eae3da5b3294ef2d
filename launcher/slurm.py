"""Submits jobs to Slurm, and follows them from outside: what is asked, what is checked before, what became of it."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launcher.config import LaunchConfig
from launcher.errors import LaunchConfigurationError, SlurmError
from launcher.exits import ExitCode
from launcher.job import JobState, write_request
from launcher.shared_storage import other_machine, require_shared
from launcher.slurm_commands import (
    JobRecord,
    Partition,
    batch_environment,
    node_addresses,
    partitions,
    run_slurm,
    show_job,
    srun_has,
)
from launcher.slurm_cycle import cancel_mark

POLL_SECONDS = 1.0
"""Between two questions to the controller while a job is waited for."""
MODULE = "solomonov.cli"

_STATES = {
    "PENDING": JobState.PENDING,
    "CONFIGURING": JobState.PENDING,
    "REQUEUED": JobState.PENDING,
    "REQUEUE_HOLD": JobState.PENDING,
    "REQUEUE_FED": JobState.PENDING,
    "RESV_DEL_HOLD": JobState.PENDING,
    "SPECIAL_EXIT": JobState.PENDING,
    "RUNNING": JobState.RUNNING,
    "SUSPENDED": JobState.RUNNING,
    "STOPPED": JobState.RUNNING,
    "SIGNALING": JobState.RUNNING,
    "RESIZING": JobState.RUNNING,
    "COMPLETING": JobState.STOPPING,
    "STAGE_OUT": JobState.STOPPING,
    "COMPLETED": JobState.DONE,
    "CANCELLED": JobState.CANCELLED,
}


@dataclass(frozen=True)
class SlurmRequest:
    """A job for Slurm.

    Raises:
        LaunchConfigurationError: a name or a path that Slurm cannot be given.
    """

    name: str
    folder: Path
    """Given to the supervisor; a run's folder."""
    log_folder: Path
    """Gets the log of the batch script; must exist."""
    config: LaunchConfig
    ranks_per_node: int
    script: Path
    """`slurm/train.sbatch`."""
    python: str = sys.executable
    module: str = MODULE
    """The module whose `supervise FOLDER` and `requeue FOLDER CODE` the batch script runs."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to the environment that the job gets."""
    elements: int | None = None
    """Of an array; `%a` in both folders is then the number of the element, from 0."""
    at_once: int | None = None
    """Elements of the array that may run at a time; None: all."""

    def __post_init__(self) -> None:
        texts = {
            "the job's name": self.name,
            "the folder's path": str(self.folder),
            "the logs' path": str(self.log_folder),
        }
        for what, text in texts.items():
            if not text or not text.isprintable():
                raise LaunchConfigurationError(
                    f"{what} cannot be given to Slurm",
                    got=repr(text),
                    rule="text on one line, without control characters",
                    remedy="choose another name (run.name) or folder (run.folder)",
                )

    @property
    def command(self) -> list[str]:
        """The sbatch command line."""
        slurm, config = self.config.slurm, self.config
        # A backslash anywhere in the pattern would switch the replacement of %j off.
        folder, number, array = str(self.log_folder.absolute()), "%j", None
        if self.elements is not None:
            limit = f"%{self.at_once}" if self.at_once is not None else ""
            number, array = "%A_%a", f"0-{self.elements - 1}{limit}"
            pattern = "%a".join(part.replace("%", "%%") for part in folder.split("%a"))
        else:
            pattern = folder.replace("%", "%%")
        options: list[tuple[str, object]] = [
            ("job-name", self.name),
            ("nodes", config.nodes),
            ("ntasks-per-node", self.ranks_per_node),
            ("output", f"{pattern}/slurm-{number}.log"),
            ("array", array),
            ("open-mode", "append"),
            ("signal", f"B:USR1@{slurm.save_seconds}"),
            ("export", "ALL"),
            ("partition", config.partition),
            ("account", slurm.account),
            ("qos", slurm.qos),
            ("constraint", slurm.constraint),
            ("time", slurm.time_minutes),
            ("gpus-per-node", slurm.gpus_per_node or None),
            ("cpus-per-task", slurm.cpus_per_rank),
            ("mem", f"{slurm.memory_mib_per_node}M" if slurm.memory_mib_per_node is not None else None),
            ("exclude", ",".join(slurm.exclude) or None),
            ("dependency", slurm.dependency),
        ]
        given = [f"--{name}={value}" for name, value in options if value is not None]
        given += ["--requeue", *(["--exclusive"] if slurm.exclusive else []), *slurm.options]
        words = [str(self.script), str(self.folder.absolute()), self.python, self.module]
        return ["sbatch", "--parsable", *given, *words]

    @property
    def job_environment(self) -> dict[str, str]:
        """The environment of sbatch, which the job inherits."""
        setup = self.config.slurm.setup_script
        extra = {"SOLOMONOV_SETUP": str(_expanded(setup).absolute())} if setup is not None else {}
        return {**batch_environment(), **extra, **self.environment}


def check_request(request: SlurmRequest, found: Sequence[Partition]) -> None:
    """Refuse what Slurm would refuse, and what it would let wait for ever.

    Args:
        found: the cluster's partitions.

    Raises:
        LaunchConfigurationError: with the remedy.
    """
    config, slurm = request.config, request.config.slurm
    names = ", ".join(part.name for part in found)
    if config.partition is not None:
        chosen = [part for part in found if part.name in config.partition.split(",")]
    else:
        chosen = [part for part in found if part.is_default]
    if not chosen:
        raise LaunchConfigurationError(
            "there is no such partition" if config.partition else "this cluster has no default partition",
            got=f"launch.partition = {config.partition}",
            rule=f"one of this cluster's partitions: {names or 'sinfo shows none'}",
            remedy="name one of them: launch.partition=NAME",
        )
    part = max(chosen, key=lambda each: each.nodes)
    if not any(each.is_up for each in chosen):
        raise LaunchConfigurationError(
            "the partition is down",
            got=f"{part.name}: see `sinfo`",
            rule="a partition that takes jobs",
            remedy=f"wait, or choose another one of {names}",
        )
    if config.nodes > part.nodes:
        raise LaunchConfigurationError(
            "the partition has fewer nodes than the run wants",
            got=f"launch.nodes = {config.nodes}, {part.name} has {part.nodes}",
            rule="Slurm would let such a job wait for ever",
            remedy=f"set launch.nodes to at most {part.nodes}, or choose another partition of {names}",
        )
    limit = part.time_limit_minutes
    if slurm.time_minutes is not None and limit is not None and slurm.time_minutes > limit:
        raise LaunchConfigurationError(
            "the time limit is above the partition's",
            got=f"launch.slurm.time_minutes = {slurm.time_minutes}, {part.name} allows {limit}",
            rule="Slurm would let such a job wait for ever, or refuse it",
            remedy=f"set it to at most {limit}: the run saves before the limit and goes on in the next start",
        )
    if slurm.gpus_per_node is not None and slurm.gpus_per_node > part.gpus_per_node:
        raise LaunchConfigurationError(
            "the partition's nodes have fewer GPUs than the run wants",
            got=f"launch.slurm.gpus_per_node = {slurm.gpus_per_node}, nodes of {part.name} have {part.gpus_per_node}",
            rule="all GPUs of a rank are on one node",
            remedy="lower it with launch.ranks_per_node and raise launch.nodes, or choose another partition",
        )
    _check_setup(request)
    _check_container(request.config)
    require_shared(request.folder, config, lambda: other_machine(node_addresses([each.name for each in chosen])))


def _expanded(path: str) -> Path:
    """With the home folder in place of `~`; as it is where there is no such user, unlike `Path.expanduser`."""
    return Path(os.path.expanduser(path))


def _check_setup(request: SlurmRequest) -> None:
    setup = request.config.slurm.setup_script
    if setup is not None and not os.access(_expanded(setup), os.R_OK):
        raise LaunchConfigurationError(
            "the setup script cannot be read",
            got=f"launch.slurm.setup_script = {setup}",
            rule="a bash file on storage that all nodes share",
            remedy="mend the path",
        )


def _check_container(config: LaunchConfig) -> None:
    """Refuse a container where srun knows no such thing: the job would end with its first step, perhaps days later."""
    image, mounts = config.slurm.container_image, config.slurm.container_mounts
    if image is None and mounts is None:
        return
    if image is None:
        raise LaunchConfigurationError(
            "folders for a container, and no container",
            got=f"launch.slurm.container_mounts = {mounts}",
            rule="they are mounted into launch.slurm.container_image",
            remedy="set launch.slurm.container_image, or leave container_mounts out",
        )
    if not srun_has("container-image"):
        raise LaunchConfigurationError(
            "this cluster starts no containers",
            got=f"launch.slurm.container_image = {image}; `srun --help` here has no --container-image",
            rule="the option comes with the Pyxis plug-in, which an administrator installs",
            remedy="leave container_image out, and prepare the nodes' own environment with launch.slurm.setup_script",
        )


class SlurmLauncher:
    """Submits jobs to the cluster that this machine belongs to."""

    def submit(self, request: SlurmRequest) -> SlurmJob:
        """Check a request and hand it to Slurm.

        Raises:
            LaunchConfigurationError: it cannot work.
            SlurmError: Slurm refuses it, or does not answer.
        """
        return SlurmJob(self._submit(request), request.log_folder)

    def submit_array(self, request: SlurmRequest) -> list[SlurmJob]:
        """The same for an array; returns the jobs of its elements."""
        assert request.elements is not None, "an array"
        number = self._submit(request)
        folder = str(request.log_folder)
        return [
            SlurmJob(f"{number}_{element}", Path(folder.replace("%a", str(element))))
            for element in range(request.elements)
        ]

    def _submit(self, request: SlurmRequest) -> str:
        check_request(request, partitions())
        return run_slurm(request.command, environment=request.job_environment).strip().partition(";")[0]


class SlurmJob:
    """A job that was submitted to Slurm, followed by its number; see `launcher.job.Job`.

    Args:
        job_id: Slurm's number.
        log_folder: of the job; its supervisor looks for requests in the file `request` there.
    """

    def __init__(self, job_id: str, log_folder: Path) -> None:
        self.job_id = job_id
        self.log_folder = log_folder
        self._last: JobRecord | None = None

    def record(self) -> JobRecord | None:
        """What the controller says of it, or said last: it forgets a job some minutes after its end."""
        shown = show_job(self.job_id)
        if shown is not None:
            self._last = shown
        return self._last

    @property
    def state(self) -> JobState:
        """Where it stands now."""
        shown = self.record()
        return state_of(shown) if shown is not None else JobState.FAILED

    @property
    def exit_code(self) -> int | None:
        """What it left with, 0 to 255; None until it has ended."""
        shown = self.record()
        if shown is None or not state_of(shown).is_terminal:
            return None
        return exit_code_of(shown)

    @property
    def reason(self) -> str:
        """Why it waits or how it ended, in Slurm's words."""
        shown = self.record()
        return f"{shown.state} ({shown.reason})" if shown is not None else "Slurm does not know the job any more"

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; see `Job.wait`."""
        deadline = time.monotonic() + timeout if timeout is not None else None
        while (code := self.exit_code) is None:
            if self._last is None:
                raise SlurmError(
                    "Slurm does not know this job",
                    got=self.job_id,
                    rule="a job that it has, or had until some minutes ago",
                    remedy="see the log: " + str(self.log_folder / f"slurm-{self.job_id}.log"),
                )
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"Slurm's job {self.job_id} has not ended: {self.reason}")
            time.sleep(POLL_SECONDS)
        return code

    def cancel(self, *, now: bool = False) -> bool:
        """Ask the ranks to save and leave; `now`: end them at once. See `Job.cancel`."""
        shown = self.record()
        if shown is None or state_of(shown).is_terminal:
            return False
        cancel_mark(self.log_folder, self.job_id).touch()  # before the signal: a saved run would be queued again
        if state_of(shown) is JobState.PENDING:
            run_slurm(["scancel", self.job_id])
        elif now:
            # Not by scancel, which asks the ranks to leave, as a preemption does, so that they would save.
            write_request(self.log_folder / "request", now=True)
        else:
            run_slurm(["scancel", "--batch", "--signal=USR1", self.job_id])
        return True

    def logs(self) -> list[Path]:
        """Log files of the newest attempt, in order of rank."""
        return newest_logs(self.log_folder)


def newest_logs(log_folder: Path) -> list[Path]:
    """Log files of the ranks of the newest attempt in a folder, in order of rank."""
    attempts = [
        (int(found[1]), path)
        for path in log_folder.glob("attempt-*")
        if (found := re.fullmatch(r"attempt-(\d+)", path.name))
    ]
    if not attempts:
        return []
    ranks = [
        (int(found[1]), path)
        for path in max(attempts)[1].iterdir()
        if (found := re.fullmatch(r"rank-(\d+)\.log", path.name))
    ]
    return [path for _, path in sorted(ranks)]


def state_of(shown: JobRecord) -> JobState:
    """Our word for a state of Slurm's."""
    state = _STATES.get(shown.state, JobState.FAILED)
    if shown.state == "FAILED" and shown.exit_code == ExitCode.AGAIN:
        return JobState.SAVED
    if shown.state == "FAILED" and shown.exit_code == ExitCode.INTERRUPTED:
        return JobState.CANCELLED
    return state


def exit_code_of(shown: JobRecord) -> int:
    """What a job that has ended left with."""
    if shown.state == "CANCELLED":
        return ExitCode.INTERRUPTED
    if shown.exit_code == 0 and shown.state != "COMPLETED":
        return 1  # Slurm ended it (TIMEOUT, NODE_FAIL), whatever its script said
    return shown.exit_code
