"""Runs a training under a supervisor: here and now, or on the nodes of the allocation that this process is in.

Beside `cli` and `jobs` the one module that knows training and launcher together.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solomonov import exits
from solomonov.config import Config, Loaded, configuration_mistakes, load_config, parse_config
from solomonov.errors import ConfigurationError, SolomonovError
from solomonov.heartbeat import EVERY_STEP
from solomonov.host import visible_gpus
from solomonov.layouts import legal_batch
from solomonov.runfolder import LockOwner, RunFolder, is_locked, run_folder, run_lock

if TYPE_CHECKING:
    from launcher.config import LaunchConfig
    from launcher.gang import StartGang
    from launcher.hang import HangLimits
    from launcher.job import JobSpec
    from launcher.ray_access import RayAccess
    from launcher.slurm_cycle import Cycle
    from launcher.slurm_step import Allocation
    from solomonov.start import PreparedRun

SLOW_SAVE_SECONDS = 60.0
"""A save may take so much longer than its like before it counts as a hang: storage has its bad minutes."""
END_MARGIN_SECONDS = 10.0
"""Between the end of ranks that do not get done with saving and the end of the job."""
DATA_MARGIN_SECONDS = 10.0
"""What a rank needs beyond its patience to build the rows by itself."""


def train(
    config_path: Path, overrides: Sequence[str] = (), *, fresh: bool = False, ray: RayAccess | None = None
) -> int:
    """Train on all local ranks, under a supervisor that starts them again after a death.

    Args:
        fresh: set the run's checkpoints aside and begin at step 0.
        ray: the cluster for the data workers; None: as the configuration says, where it wants data workers.

    Raises:
        ConfigurationError, LaunchConfigurationError, DataError: before any rank is started.
    """
    loaded = load_config(config_path, overrides)
    launch = launch_section(loaded)
    if launch.nodes > 1:
        raise one_machine(launch.nodes)
    run = run_folder(loaded.config)
    if not is_locked(run):
        request_file(run).unlink(missing_ok=True)  # meant for an earlier command
    return _train(loaded, launch, Place(), fresh=fresh, ray=ray)


def supervise(folder: Path) -> int:
    """What a submitted run is started with: `solomonov supervise FOLDER`, on this machine or in a Slurm allocation.

    Args:
        folder: of the run; or a configuration file, which then makes the run's folder.
    """
    from launcher.ray_jobs import ADDRESS
    from launcher.slurm_step import Allocation

    allocation = Allocation.from_environment()
    loaded = submitted(folder, allocation.as_overrides if allocation is not None else ())
    return _train(loaded, launch_section(loaded), Place(allocation, os.environ.get(ADDRESS)))


def requeue(folder: Path, code: int) -> int:
    """What follows the end of `supervise` in a Slurm job: leave, or be queued again.

    Args:
        code: what `supervise` left with, as a shell tells it.

    Returns:
        What the batch script leaves with.
    """
    from launcher.slurm_cycle import CycleDecision
    from launcher.slurm_cycle import requeue as decide_and_requeue
    from launcher.slurm_step import Allocation

    allocation = Allocation.require()
    loaded = submitted(folder, allocation.as_overrides)
    run = run_folder(loaded.config)

    def note(decision: CycleDecision) -> None:
        kind = "requeued" if decision.requeue else "left"
        fields = {"job": allocation.name, "exit_code": decision.exit_code, "reason": decision.reason}
        run.journal.try_write(kind, **fields, exclude=decision.exclude, step=durable_step(run))
        print(f"{'queued again' if decision.requeue else 'not queued again'}: {decision.reason}", flush=True)

    limit = launch_section(loaded).max_no_progress
    return decide_and_requeue(run.logs, code, allocation, limit, note)


def submitted(folder: Path, given: Sequence[str]) -> Loaded:
    """The configuration of a submitted run, as it was submitted; in the working folder from which it was.

    Args:
        folder: of the run, or a configuration file.
        given: overrides for a configuration file: what the allocation is. A run's folder knows what it asked for.
    """
    if folder.is_file():
        return load_config(folder, given)
    run = RunFolder(folder)
    record = run.resolved()
    loaded = parse_config(
        (run.path / "config.yaml").read_text(encoding="utf-8"), record["overrides"], where=str(folder)
    )
    os.chdir(record["working_folder"])
    return loaded


@dataclass(frozen=True)
class Place:
    """Where a run's ranks are started from."""

    allocation: Allocation | None = None
    """A Slurm job's."""
    ray_address: str | None = None
    """A Ray cluster's, on which the ranks run; without one and without an allocation they run on this machine."""

    @property
    def is_here(self) -> bool:
        """The ranks are children of this process."""
        return self.allocation is None and self.ray_address is None

    @property
    def owner(self) -> LockOwner | None:
        """For the run's lock."""
        if self.allocation is None:
            return None
        return LockOwner(f"slurm {self.allocation.name}", self.allocation.restart)

    def start_gang(self, launch: LaunchConfig, worlds: Sequence[int]) -> StartGang:
        """What starts the ranks of an attempt.

        Args:
            worlds: numbers of ranks with which the run may go on.
        """
        from launcher.gang import LocalGang
        from launcher.ray import client_environment
        from launcher.ray_gang import RayGang, RayRoom
        from launcher.slurm_step import SlurmGang

        if self.ray_address is not None:
            gpus = launch.ray.gpus_per_rank
            room = RayRoom(
                self.ray_address,
                worlds,
                cpus=launch.ray.cpus_per_rank,
                gpus=gpus if gpus is not None else float(visible_gpus() > 0),
                environment=client_environment(),
                start_seconds=launch.ray.start_seconds,
            )
            return partial(RayGang, room=room)
        if self.allocation is None:
            return LocalGang
        return partial(
            SlurmGang,
            allocation=self.allocation,
            rank_script=slurm_scripts() / "rank.sh",
            srun_options=launch.slurm.srun_options,
        )

    def is_current(self) -> bool:
        """Slurm has not started the job anew meanwhile."""
        from launcher.errors import SlurmError
        from launcher.slurm_commands import show_job

        if self.allocation is None:
            return True
        try:
            shown = show_job(self.allocation.name)
        except SlurmError:
            return True  # nothing says otherwise; srun asks the same controller
        return shown is None or shown.restarts == self.allocation.restart


def slurm_scripts() -> Path:
    """The folder of `train.sbatch` and `rank.sh`: beside the packages, or where the installation put it."""
    beside = Path(__file__).resolve().parent.parent / "slurm"
    return beside if beside.is_dir() else Path(sys.prefix) / "share" / "solomonov" / "slurm"


def one_machine(nodes: int) -> ConfigurationError:
    """The refusal of a run that needs more machines than this one."""
    return ConfigurationError(
        "ranks on other machines cannot be started from here",
        got=f"launch.nodes = {nodes}",
        rule="on this machine alone a run has one node",
        remedy="set launch.nodes: 1, or submit the run: solomonov submit CONFIG --on slurm",
    )


def _train(
    loaded: Loaded, launch: LaunchConfig, place: Place, *, fresh: bool = False, ray: RayAccess | None = None
) -> int:
    """Train from a place; see `train`."""
    from solomonov.start import finished_step, prepare_run

    prepared = prepare_run(
        loaded, nodes=launch.nodes, ranks_per_node=ranks_per_node(launch), launch=launch.model_dump(mode="json")
    )
    run = prepared.run
    prepared.make_folder()
    with run_lock(run, owner=place.owner) as lock, ExitStack() as stack:
        prepared.write()
        cycle = None
        if place.allocation is not None:
            cycle = _begin_cycle(run, place.allocation, launch.max_no_progress)
            stack.callback(lambda: cycle.end(durable_step(run) or 0))
        if fresh:
            _set_checkpoints_aside(run)
        done = finished_step(run, prepared.plan.total_steps)
        if done is not None:
            print(f"{run.path}: done, {done} updates; nothing is left to train")
            print(f"  raise training.total_steps under a new run.name to train longer; solomonov export {run.path}")
            return exits.DONE
        workers = loaded.config.data.workers
        if workers.backend == "ray" and ray is None:
            from launcher.ray_access import ray_access

            cpus = math.ceil(math.ceil(workers.count / launch.nodes) * workers.cpus)
            log = run.logs / "ray-nodes.log"
            ray = stack.enter_context(ray_access(launch, cpus=cpus, allocation=place.allocation, log=log))
        session = Session(prepared, launch, place, lock, ray if workers.backend == "ray" else None, cycle)
        return session.run()


def _begin_cycle(run: RunFolder, allocation: Allocation, max_no_progress: int) -> Cycle:
    """Note the start of a Slurm job; refuse one that Slurm starts again and again to no avail."""
    from launcher.slurm_cycle import Cycle

    cycle = Cycle(run.logs, allocation)
    problem = cycle.begin(durable_step(run) or 0, max_no_progress)
    fields = {"job": allocation.name, "restart": allocation.restart, "nodes": allocation.node_list}
    run.journal.try_write("job_started", backend="slurm", **fields, refused=problem)
    if problem is not None:
        raise SolomonovError(
            "the job gets nowhere",
            got=problem,
            rule=f"{max_no_progress} starts in a row without a newer checkpoint are the limit (launch.max_no_progress)",
            remedy=f"see {run.journal.path} and {run.logs}; then submit it again: solomonov resume {run.path}",
        )
    return cycle


def _set_checkpoints_aside(run: RunFolder) -> None:
    from solomonov.checkpoint.agreement import SingleProcess
    from solomonov.checkpoint.checkpointer import Checkpointer

    journal = run.journal
    checkpointer = Checkpointer(
        run.checkpoints,
        SingleProcess(),
        run_id=run.run_id(),
        attempt=journal.next_attempt(),
        keep_last=1,
        on_event=lambda kind, fields: journal.write(kind, **fields),
    )
    checkpointer.find(fresh=True)
    journal.write("fresh_start_requested")


def launch_section(loaded: Loaded) -> LaunchConfig:
    """The validated launch section.

    Raises:
        ConfigurationError: it has mistakes, all named at once.
    """
    from pydantic import ValidationError

    from launcher.config import LaunchConfig

    try:
        return LaunchConfig.model_validate_json(json.dumps(loaded.launch))
    except ValidationError as error:
        raise configuration_mistakes(error, LaunchConfig, where="the launch section", prefix="launch.") from error


def ranks_per_node(launch: LaunchConfig) -> int:
    """Processes on each machine; where it is left open, one for each GPU of this one."""
    return launch.ranks_per_node or max(1, visible_gpus())


class Session:
    """One command's work on a run: from taking it up to leaving it."""

    def __init__(
        self,
        prepared: PreparedRun,
        launch: LaunchConfig,
        place: Place,
        lock: int,
        ray: RayAccess | None,
        cycle: Cycle | None,
    ) -> None:
        self._prepared, self._launch, self._place = prepared, launch, place
        self._lock, self._ray, self._cycle = lock, ray, cycle
        self._run = prepared.run
        self._attempt = self._run.journal.next_attempt() - 1
        """The newest one of ours; before the first, the newest of an earlier command."""
        self._ends: dict[int, dict[str, Any]] = {}
        """By rank: its end in the newest attempt, unless it was asked for."""
        self._hang: dict[str, Any] = {}
        self._asked = False
        """The ranks of the newest attempt were asked to leave."""

    def run(self) -> int:
        """Start the ranks, and the data service where there is a Ray; watch them, show their progress, say how it
        ended; returns the exit code."""
        from launcher.local import LocalLauncher
        from solomonov.display import TrainingDisplay

        plan = self._prepared.plan
        grace = self._launch.grace_seconds
        if self._place.allocation is not None:
            # Later, Slurm ends the job for its time, and does not queue it again.
            grace = min(grace, max(1.0, self._launch.slurm.save_seconds - END_MARGIN_SECONDS))
        launcher = LocalLauncher(
            self._launch.model_copy(update={"grace_seconds": grace}),
            on_event=self._on_event,
            durable_step=lambda: durable_step(self._run),
            start_gang=self._place.start_gang(self._launch, legal_worlds(self._prepared.loaded.config, self._launch)),
            still_ours=self._still_ours,
        )
        with TrainingDisplay(self._run, plan.total_steps, self._prepared.derived["batch"]) as self._display:
            job = launcher.run(self._spec())
        code = job.wait()
        self._display.verdict(code, job.tail)
        return code

    def _spec(self) -> JobSpec:
        from launcher.job import JobSpec

        spec = JobSpec(
            command=[sys.executable, "-m", "solomonov.rank", str(self._run.path)],
            log_folder=self._run.logs,
            ranks=ranks_per_node(self._launch),
            nodes=self._launch.nodes,
            environment=_rank_environment(),
            working_directory=Path.cwd(),  # the ranks of a cluster start elsewhere
            pass_fds=(self._lock,) if self._place.is_here else (),
            first_attempt=self._attempt + 1,
            request_file=request_file(self._run),
            hang=hang_limits(self._prepared.loaded.config),
        )
        return spec if self._ray is None else _with_data_service(spec, self._prepared, self._ray)

    def _still_ours(self) -> bool:
        """No other command has begun an attempt since, as one does that takes over from a lost one."""
        return self._run.journal.next_attempt() == self._attempt + 1 and self._place.is_current()

    def _on_event(self, kind: str, /, **fields: Any) -> None:
        journal = self._run.journal
        if kind == "attempt_started":
            journal.write(kind, **fields)  # the number fences off earlier attempts: it must stand before training
            self._attempt = fields["attempt"]
            self._ends, self._hang = {}, {}
        else:
            journal.try_write(kind, **fields)
        if self._cycle is not None:
            self._cycle.note(kind, fields)
        self._asked = kind in ("resize", "stopping") or (self._asked and kind != "attempt_started")
        # A rank that had no handler yet when it was asked to leave is no fault.
        obeyed = fields.get("exit_code") in (exits.DONE, exits.AGAIN) or (
            self._asked and fields.get("signal") == "SIGTERM"
        )
        if kind == "rank_exited" and not obeyed:
            self._ends[fields["rank"]] = fields
        if kind == "hang":
            self._hang = fields
        self._display.event(kind, fields)
        if kind == "restart" and fields["rank"] in self._ends:  # not where the number of ranks changes
            done = f"attempt {fields['attempt']} begins in {fields['backoff_seconds']:g} s"
            self._incident(fields["rank"], done, fields["cause"])
        elif kind == "finished" and fields["exit_code"] not in (exits.DONE, exits.AGAIN, exits.INTERRUPTED):
            self._incident(fields["rank"], "given up", fields["reason"])

    def _incident(self, rank: int | None, done: str, what: str) -> None:
        """The report of a fault: what, where, at which step, what is lost, what was done."""
        end = {} if rank is None else self._ends.get(rank, {})
        place = {**end, **self._hang}
        step, durable = place.get("step"), durable_step(self._run) or 0
        # The heartbeat names the update that was under way; those before it were done.
        lost = max(0, step - 1 - durable) if step is not None else None
        fields = {
            "what": what,
            "attempt": self._attempt,
            "rank": place.get("rank"),
            "host": place.get("host"),
            "section": place.get("section"),
            "call": self._hang.get("call"),
            "step": step,
            "durable_step": durable,
            "steps_lost": lost,
            "done": done,
            "last_lines": self._last_lines(place.get("rank")),
        }
        self._run.journal.try_write("incident", **fields)
        self._display.incident(fields)

    def _last_lines(self, rank: int | None) -> list[str]:
        """What a rank of this attempt said last: the next attempt's log is another one."""
        from launcher.job import log_path, tail

        return [] if rank is None else tail(log_path(self._run.logs / f"attempt-{self._attempt}", rank), lines=12)


def legal_worlds(config: Config, launch: LaunchConfig) -> list[int]:
    """Numbers of ranks with which a run may go on, ascending: all that it wants, and down to `launch.ray.min_ranks`
    those that the layout and the batch divide over."""
    most = launch.nodes * ranks_per_node(launch)
    found = []
    for ranks in range(launch.ray.min_ranks or most, most):
        try:
            legal_batch(config, precision=config.training.precision, world=ranks)
        except ConfigurationError:
            continue
        found.append(ranks)
    return [*found, most]


def request_file(run: RunFolder) -> Path:
    """Where the supervisor of a run looks for requests to leave."""
    return run.logs / "request"


def hang_limits(config: Config) -> HangLimits:
    """When ranks count as hanging.

    A rank may wait for its data workers as long as it is patient with them, and for a disk that is slow for once.
    """
    from launcher.hang import HangLimits

    allowances = {"save": SLOW_SAVE_SECONDS}
    if config.data.workers.backend == "ray":
        allowances["data"] = config.data.workers.patience_seconds + DATA_MARGIN_SECONDS
    limits = config.resilience
    return HangLimits(limits.hang_minimum_seconds, limits.hang_start_seconds, allowances, EVERY_STEP)


def _with_data_service(spec: JobSpec, prepared: PreparedRun, ray: RayAccess) -> JobSpec:
    """The same job with a data service beside the ranks, and ranks that know where its workers are."""
    from launcher.job import Sidecar
    from solomonov.feed import ClusterPlace, service_spec

    run, config = prepared.run, prepared.loaded.config
    # Of this command: what an earlier one may have left on the cluster has other names.
    place = ClusterPlace(ray.address, f"solomonov-{run.run_id()[:12]}-{spec.first_attempt}")
    service_spec(config, str(prepared.data["stream"]), place).write(run.path)
    service = Sidecar("data-service", [sys.executable, "-m", "data_pipeline", "serve", str(run.path)])
    return replace(
        spec, environment={**spec.environment, **ray.environment, **place.to_environment()}, sidecars=(service,)
    )


def _rank_environment() -> Mapping[str, str]:
    """Ranks start in the working directory, but not with it on their import path.

    glibc gives large blocks back to the system at each free, and the kernel clears their pages at each use; on the CPU,
    where activations and logits are such blocks, keeping them makes a step about a tenth faster.
    """
    keep = {name: str(1 << 30) for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")}
    return {"PYTHONSAFEPATH": "1", **{name: os.environ.get(name, value) for name, value in keep.items()}}


def durable_step(run: RunFolder) -> int | None:
    """The newest step whose checkpoint is safely kept; None without one."""
    event = run.journal.last("checkpoint_durable")
    return int(event["step"]) if event else None
