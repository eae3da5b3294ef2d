"""Submitted runs: `submit`, `status`, `runs`, `logs`, `cancel`, `resume`, `wait`.

Beside `cli` and `supervise` the one module that knows training and launcher together.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from solomonov import exits
from solomonov.commands import answer, table
from solomonov.config import Loaded, load_config, parse_config
from solomonov.errors import ConfigurationError
from solomonov.host import visible_gpus
from solomonov.logs import follow, show
from solomonov.runfolder import RunFolder, all_runs, find_run, is_locked, lock_holder, run_lock, submission_lock
from solomonov.snapshot import snapshot
from solomonov.start import PreparedRun, prepare_run
from solomonov.status import NO_END, Live, RunStatus, read_status
from solomonov.supervise import launch_section, one_machine, request_file, slurm_scripts
from solomonov.sweep import combinations

if TYPE_CHECKING:
    from launcher.config import LaunchConfig
    from launcher.ray_jobs import RayJob, RayRequest
    from launcher.slurm import SlurmJob, SlurmRequest

START_SECONDS = 60.0
"""What a supervisor gets to take its run up."""
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Submission:
    """A run that may be submitted."""

    prepared: PreparedRun
    launch: LaunchConfig
    backend: str
    ranks_per_node: int

    @property
    def run(self) -> RunFolder:
        """Its folder."""
        return self.prepared.run


def submit(options: argparse.Namespace) -> int:
    """`solomonov submit CONFIG --on local|slurm|ray`."""
    given = [f"launch.nodes={options.nodes}"] if options.nodes is not None else []
    given += options.overrides
    loaded = load_config(Path(options.config), given)
    if not options.sweep:
        return _submit([plan_submission(loaded, options.on)], options)
    if options.on == "local":
        raise ConfigurationError(
            "this machine trains one run at a time",
            got=f"--on local --sweep {' --sweep '.join(options.sweep)}",
            rule="the runs of a sweep are jobs of a cluster",
            remedy="--on slurm (one array) or --on ray; here, submit one run after the other",
        )
    name = loaded.config.run.name
    return _submit(
        [
            plan_submission(
                load_config(Path(options.config), [*given, *words, f"run.name={name}-{number}"]), options.on
            )
            for number, words in enumerate(combinations(options.sweep))
        ],
        options,
    )


def resume(options: argparse.Namespace) -> int:
    """`solomonov resume RUN`: submit it again, as it was submitted."""
    run = find_run(options.run)
    record = run.resolved()
    event = run.journal.last("submitted")
    backend = options.on or (event["backend"] if event is not None else "local")
    text = (run.path / "config.yaml").read_text(encoding="utf-8")
    os.chdir(record["working_folder"])
    loaded = parse_config(text, [*record["overrides"], *options.overrides], where=str(run.path / "config.yaml"))
    return _submit([plan_submission(loaded, backend)], options)


def plan_submission(loaded: Loaded, backend: str) -> Submission:
    """Check all that can be checked from here.

    Raises:
        ConfigurationError, LaunchConfigurationError, DataError: it cannot work.
    """
    launch = launch_section(loaded)
    if backend == "slurm":
        gpus = _slurm_gpus(launch)
        ranks = launch.ranks_per_node or gpus or 1
        slurm = launch.slurm.model_copy(update={"gpus_per_node": gpus})
        launch = launch.model_copy(update={"slurm": slurm, "ranks_per_node": ranks})
    else:
        gpus = visible_gpus()
        ranks = launch.ranks_per_node or max(1, gpus)
        if backend == "local" and launch.nodes > 1:
            raise one_machine(launch.nodes)
    # What was derived here is decided: the supervisor, on another machine, shall not derive something else.
    decided = "launch.ranks_per_node="
    given = [override for override in loaded.overrides if not override.startswith(decided)]
    loaded = parse_config(loaded.text, [*given, f"{decided}{ranks}"], where="the configuration")
    prepared = prepare_run(
        loaded,
        nodes=launch.nodes,
        ranks_per_node=ranks,
        launch=launch.model_dump(mode="json"),
        gpus_per_node=gpus,
    )
    return Submission(prepared, launch, backend, ranks)


def _slurm_gpus(launch: LaunchConfig) -> int:
    """GPUs that the run asks for on each node of its partition."""
    from launcher.slurm_commands import partitions

    if launch.slurm.gpus_per_node is not None:
        return launch.slurm.gpus_per_node
    found = [
        part for part in partitions() if part.name == launch.partition or (part.is_default and not launch.partition)
    ]
    most = max((part.gpus_per_node for part in found), default=0)
    return min(most, launch.ranks_per_node or most)


def _submit(submissions: Sequence[Submission], options: argparse.Namespace) -> int:
    """Submit one run, or the runs of a sweep."""
    for submission in submissions:
        _refuse_again(submission.run)
    _check(submissions)
    if options.dry_run:
        _show_plan(submissions)
        return exits.DONE
    with ExitStack() as stack:
        for submission in submissions:
            submission.prepared.make_folder()
            stack.enter_context(submission_lock(submission.run))
            _refuse_again(submission.run)  # another command may have submitted it since
        codes = [_write(submission) for submission in submissions]
        start = {"slurm": _submit_to_slurm, "ray": _submit_to_ray, "local": _submit_here}[submissions[0].backend]
        jobs = start(submissions, codes)
    rows = [
        {"run": str(submission.run.path), "backend": submission.backend, "job": job, "code": code.name}
        for submission, job, code in zip(submissions, jobs, codes, strict=True)
    ]
    if len(rows) > 1:
        table(options, rows)
        return exits.DONE
    run = submissions[0].run.path
    answer(options, rows[0])
    if not options.json:
        print(f"\nsolomonov status {run}    solomonov logs {run} -f    solomonov cancel {run}")
    return exits.DONE


def _write(submission: Submission) -> Path:
    """The run's record and its copy of the code."""
    run = submission.run
    with run_lock(run, wait_seconds=1.0):
        submission.prepared.write()
        request_file(run).unlink(missing_ok=True)  # meant for an earlier job
        return snapshot(Path(__file__).resolve().parent.parent, slurm_scripts(), run.path / "code")


def _refuse_again(run: RunFolder) -> None:
    """Refuse a run that is under way or done."""
    status = look(run) if run.resolved_path.exists() else None
    if status is not None and (status.is_live or status.state == "done"):
        raise ConfigurationError(
            f"the run is {status.state}",
            got=status.sentence(),
            rule="a run that runs, waits to run, or is done is not submitted again",
            remedy=f"solomonov cancel {run.path}, or choose a new run.name"
            if status.is_live
            else "raise training.total_steps under a new run.name to train longer",
        )


def _check(submissions: Sequence[Submission]) -> None:
    """Ask who would run them whether they can."""
    if submissions[0].backend == "slurm":
        from launcher.slurm import check_request
        from launcher.slurm_commands import partitions

        check_request(_slurm_request(submissions, Path("code")), partitions())
    elif submissions[0].backend == "ray":
        from launcher.ray_jobs import RayLauncher

        RayLauncher().check(_ray_request(submissions[0], Path("code")))


def _show_plan(submissions: Sequence[Submission]) -> None:
    """What would be done."""
    first = submissions[0]
    prepared, launch = first.prepared, first.launch
    for submission in submissions:
        print(f"run      {submission.run.path}")
    print(f"ranks    {launch.nodes} x {first.ranks_per_node} on {first.backend}")
    print(f"batch    {prepared.derived['batch']}")
    print(f"model    {prepared.derived['parameters']:,} parameters")
    if first.backend == "slurm":
        request = _slurm_request(submissions, Path("code"))
        print(f"command  {shlex.join(request.command)}")
        print(f"\n{request.script}:\n{request.script.read_text(encoding='utf-8')}")
    elif first.backend == "ray":
        print(f"command  {_ray_request(first, Path('code')).command}")
    else:
        print(f"command  {shlex.join(_supervisor(first.run))}")


# --- here ------------------------------------------------------------------------------------------------------------


def _supervisor(run: RunFolder) -> list[str]:
    return [sys.executable, "-m", "solomonov.cli", "supervise", str(run.path.absolute())]


def _code_environment(code: Path) -> dict[str, str]:
    """Our code comes from there, and not from where a process happens to start; the user's own places come after."""
    own = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{code}{os.pathsep}{own}" if own else str(code), "PYTHONSAFEPATH": "1"}


def _submit_here(submissions: Sequence[Submission], codes: Sequence[Path]) -> list[str]:
    """Start the supervisor as a process that outlives this one; returns its number."""
    [submission], [code] = submissions, codes
    run = submission.run
    log = run.logs / "supervisor.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            _supervisor(run),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **_code_environment(code)},
            start_new_session=True,
        )
    run.journal.write("submitted", backend="local", job=str(process.pid), code=code.name, host=socket.gethostname())
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:  # what it refuses, it refuses now
        if lock_holder(run).get("pid") == process.pid:
            break
        if process.poll() is not None:
            if process.returncode:
                sys.stderr.write(log.read_text(encoding="utf-8", errors="replace")[-4000:])
                raise SystemExit(process.returncode)
            break
        time.sleep(0.05)
    return [str(process.pid)]


# --- Slurm -----------------------------------------------------------------------------------------------------------


def _slurm_request(submissions: Sequence[Submission], code: Path) -> SlurmRequest:
    """One job, or the array of a sweep, whose runs differ in nothing that Slurm is asked for."""
    from launcher.slurm import SlurmRequest

    first = submissions[0]
    several = len(submissions) > 1
    folder = first.run.path
    if several:
        if "%a" in str(folder.absolute()):
            raise ConfigurationError(
                "the folder of a sweep cannot be told to Slurm",
                got=str(folder.absolute()),
                rule="%a in a path stands for the number of a run",
                remedy="choose another run.folder",
            )
        folder = folder.with_name(f"{folder.name.removesuffix('-0')}-%a")
    return SlurmRequest(
        name=folder.name.removesuffix("-%a") if several else folder.name,
        folder=folder,
        log_folder=RunFolder(folder).logs,
        config=first.launch,
        ranks_per_node=first.ranks_per_node,
        script=(code / "slurm" if code.is_absolute() else slurm_scripts()) / "train.sbatch",
        environment=_code_environment(folder.absolute() / "code" / code.name if several else code),
        elements=len(submissions) if several else None,
        at_once=first.launch.slurm.array_at_once if several else None,
    )


def _submit_to_slurm(submissions: Sequence[Submission], codes: Sequence[Path]) -> list[str]:
    from launcher.slurm import SlurmLauncher

    request = _slurm_request(submissions, codes[0])
    launcher = SlurmLauncher()
    jobs = [launcher.submit(request)] if request.elements is None else launcher.submit_array(request)
    for submission, job, code in zip(submissions, jobs, codes, strict=True):
        fields = {"job": job.job_id, "code": code.name, "command": request.command}
        submission.run.journal.write("submitted", backend="slurm", **fields)
    return [job.job_id for job in jobs]


def _slurm_job(run: RunFolder) -> SlurmJob | None:
    """The Slurm job of the newest submission, if that was to Slurm."""
    from launcher.slurm import SlurmJob

    event = run.journal.last("submitted")
    return SlurmJob(event["job"], run.logs) if event is not None and event["backend"] == "slurm" else None


# --- Ray -------------------------------------------------------------------------------------------------------------


def _ray_request(submission: Submission, code: Path) -> RayRequest:
    from launcher.ray_jobs import RayRequest

    run = submission.run
    number = sum(1 for _ in run.journal.events("submitted")) + 1
    identity = run.run_id()[:8] if run.resolved_path.exists() else "new"
    return RayRequest(
        name=f"{run.path.name}-{identity}-{number}",
        folder=run.path,
        log_folder=run.logs,
        config=submission.launch,
        environment={**passed_on(), **_code_environment(code)},
    )


def passed_on() -> dict[str, str]:
    """What of this command's environment a job on a cluster gets."""
    from launcher.ray import PASSED_ON

    return {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}


def _submit_to_ray(submissions: Sequence[Submission], codes: Sequence[Path]) -> list[str]:
    from launcher.errors import LauncherError
    from launcher.ray_jobs import RayLauncher

    jobs: list[str] = []
    for submission, code in zip(submissions, codes, strict=True):
        request = _ray_request(submission, code)
        try:
            job = RayLauncher().submit(request)
        except LauncherError:
            if jobs:
                names = ", ".join(str(other.run.path) for other in submissions[: len(jobs)])
                print(f"submitted before the refusal: {names}", file=sys.stderr)
            raise
        fields = {"command": request.command, "address": request.address, "dashboard": job.dashboard}
        submission.run.journal.write("submitted", backend="ray", job=job.name, code=code.name, **fields)
        jobs.append(job.name)
    return jobs


def _ray_job(run: RunFolder) -> RayJob | None:
    """The Ray job of the newest submission, if that was to Ray."""
    from launcher.ray_jobs import RayJob

    event = run.journal.last("submitted")
    if event is None or event["backend"] != "ray":
        return None
    return RayJob(event["job"], event["dashboard"], run.logs)


# --- what became of it -----------------------------------------------------------------------------------------------


def look(run: RunFolder) -> RunStatus:
    """Where a run stands now.

    Raises:
        LauncherError: its scheduler does not answer.
    """
    return read_status(run, _live(run))


def _live(run: RunFolder) -> Live:
    """What Slurm, or the lock of the run, says of it."""
    from launcher.errors import RayError
    from launcher.slurm import state_of

    ray_job = _ray_job(run)
    if ray_job is not None:
        try:
            found = ray_job.record()
        except RayError as error:  # its head is gone, and with it the run, unless it only just went
            return Live(None, f"Ray: {error.what} ({error.got})")
        if found is not None and not found[0].is_terminal:
            return Live(found[0].value, "Ray: " + (found[2] or found[0].value))
        return Live()
    job = _slurm_job(run)
    shown = job.record() if job is not None else None
    if shown is not None:
        state = state_of(shown)
        reason = f"Slurm: {shown.state}" + (f", {shown.reason}" if shown.reason not in ("None", "") else "")
        return Live(None if state.is_terminal else state.value, reason)
    if is_locked(run):
        holder = lock_holder(run)
        return Live("running", f"process {holder.get('pid')} on {holder.get('host')}")
    return Live()


def status(options: argparse.Namespace) -> int:
    """`solomonov status RUN`."""
    found = look(find_run(options.run))
    answer(options, {name: value for name, value in asdict(found).items() if value is not None})
    return exits.DONE


def runs(options: argparse.Namespace) -> int:
    """`solomonov runs`; a scheduler that does not answer hides no other run."""
    found = [_seen(run) for run in all_runs(Path(options.folder))]
    if not found and not options.json:
        print(f"no runs in {options.folder}/")
    if found:
        table(options, [each.row() for each in found])
    return exits.DONE


def _seen(run: RunFolder) -> RunStatus:
    """Where a run stands, or `unknown` where only a scheduler that does not answer could tell."""
    from launcher.errors import LauncherError

    try:
        return look(run)
    except LauncherError as error:
        found = read_status(run, Live())
        if found.state not in NO_END:
            return found
        print(f"{run.path}: {error.what} ({error.got})", file=sys.stderr)
        return replace(found, state="unknown")


def logs(options: argparse.Namespace) -> int:
    """`solomonov logs RUN [-f]`."""
    run = find_run(options.run)
    if options.follow:
        follow(run, lines=options.lines, goes_on=lambda: look(run).is_live)
    else:
        show(run, lines=options.lines)
    return exits.DONE


def cancel(options: argparse.Namespace) -> int:
    """`solomonov cancel RUN [--now]`."""
    run = find_run(options.run)
    found = look(run)
    if not found.is_live:
        print(f"{run.path} is {found.state}: there is nothing to cancel")
        return exits.DONE
    from launcher.job import write_request

    run.journal.try_write("cancel_requested", now=options.now)
    job = _slurm_job(run)
    if job is not None and job.cancel(now=options.now):
        print(f"{run.path}: asked Slurm's job {job.job_id} to {'end at once' if options.now else 'save and leave'}")
        return exits.DONE
    if options.now or _ray_job(run) is not None:
        write_request(request_file(run), now=options.now)
        print(f"{run.path}: asked its supervisor to {'end at once' if options.now else 'save and leave'}")
        return exits.DONE
    holder = lock_holder(run)
    if holder.get("host") != socket.gethostname():
        raise ConfigurationError(
            "the run is supervised on another machine",
            got=f"process {holder.get('pid')} on {holder.get('host')}",
            rule="a run that no scheduler knows is cancelled on its own machine",
            remedy=f"run this command on {holder.get('host')}",
        )
    if is_locked(run):
        os.kill(int(holder["pid"]), signal.SIGTERM)
    print(f"{run.path}: asked process {holder['pid']} to save and leave")
    return exits.DONE


def wait(options: argparse.Namespace) -> int:
    """`solomonov wait RUN`: until it has ended; leaves with the run's own exit code."""
    run = find_run(options.run)
    deadline = time.monotonic() + options.timeout if options.timeout is not None else None
    while (found := look(run)).is_live:
        if deadline is not None and time.monotonic() >= deadline:
            print(found.sentence(), file=sys.stderr)
            return exits.AGAIN
        time.sleep(POLL_SECONDS)
    print(found.sentence())
    return found.exit_code if found.exit_code is not None else 1
