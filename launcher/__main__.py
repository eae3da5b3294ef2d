"""`python -m launcher`: the commands that run inside of an allocation.

agent FOLDER ATTEMPT COMMAND ...   stands beside one rank (see launcher/agent.py)
supervise FOLDER                   runs the job that FOLDER/job.json describes, in the Slurm allocation around it
ray-node ADDRESS FOLDER CPUS BYTES a node of a private Ray, beside its head on another machine (see ray_door.node)
requeue FOLDER CODE                what follows the end of that: leave, or be queued again
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

from launcher.agent import main as agent
from launcher.config import LaunchConfig
from launcher.errors import LauncherError
from launcher.job import JobSpec
from launcher.local import LocalLauncher
from launcher.ray import client_environment
from launcher.ray_gang import RayGang, RayRoom
from launcher.ray_jobs import ADDRESS
from launcher.slurm_cycle import NO_PROGRESS, Cycle, CycleDecision, requeue
from launcher.slurm_step import Allocation, SlurmGang


def write_job(folder: Path, spec: JobSpec, config: LaunchConfig, rank_script: Path) -> None:
    """Write FOLDER/job.json for `supervise`."""
    record = {"spec": spec.to_json(), "config": config.model_dump(mode="json"), "rank_script": str(rank_script)}
    (folder / "job.json").write_text(json.dumps(record), encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Run one of the commands; returns its exit code."""
    try:
        return _run(arguments)
    except LauncherError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _run(arguments: list[str]) -> int:
    match arguments:
        case ["agent", *rest]:
            return agent(rest)
        case ["hold", plan]:
            from launcher.ray_door import hold

            return hold(json.loads(plan))
        case ["ray-node", address, folder, cpus, size]:
            from launcher.ray_door import node

            return node(address, Path(folder), float(cpus), int(size))
        case ["supervise", folder] if ADDRESS in os.environ:
            return _supervise_on_ray(Path(folder), os.environ[ADDRESS])
        case ["supervise", folder]:
            return _supervise_in_slurm(Path(folder), Allocation.require())
        case ["requeue", folder, code]:
            return _requeue(Path(folder), int(code), Allocation.require())
    print(__doc__, file=sys.stderr)
    return 2


def _job(folder: Path) -> tuple[JobSpec, LaunchConfig, Path]:
    record = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    config = LaunchConfig.model_validate_json(json.dumps(record["config"]))
    return JobSpec.from_json(record["spec"]), config, Path(record["rank_script"])


def _supervise_in_slurm(folder: Path, allocation: Allocation) -> int:
    spec, config, rank_script = _job(folder)
    cycle = Cycle(spec.log_folder, allocation)
    if (problem := cycle.begin(0, config.max_no_progress)) is not None:
        print(problem, file=sys.stderr)
        return NO_PROGRESS

    def on_event(kind: str, /, **fields: object) -> None:
        cycle.note(kind, fields)
        _print_event(kind, **fields)

    options = config.slurm.srun_options
    start_gang = partial(SlurmGang, allocation=allocation, rank_script=rank_script, srun_options=options)
    try:
        return LocalLauncher(config, on_event=on_event, start_gang=start_gang).run(spec).wait()
    finally:
        cycle.end(0)


def _supervise_on_ray(folder: Path, address: str) -> int:
    spec, config, _ = _job(folder)
    worlds = range(config.ray.min_ranks or spec.world_size, spec.world_size + 1)
    room = RayRoom(
        address,
        list(worlds),
        cpus=config.ray.cpus_per_rank,
        gpus=config.ray.gpus_per_rank or 0.0,
        environment=client_environment(),
        start_seconds=config.ray.start_seconds,
    )
    start_gang = partial(RayGang, room=room)
    try:
        return LocalLauncher(config, on_event=_print_event, start_gang=start_gang).run(spec).wait()
    except LauncherError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _print_event(kind: str, /, **fields: object) -> None:
    print(json.dumps({"event": kind, **fields}), flush=True)


def _requeue(folder: Path, code: int, allocation: Allocation) -> int:
    spec, config, _ = _job(folder)

    def say(decision: CycleDecision) -> None:
        print(json.dumps({"event": "requeue" if decision.requeue else "leave", "reason": decision.reason}), flush=True)

    return requeue(spec.log_folder, code, allocation, config.max_no_progress, say)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
