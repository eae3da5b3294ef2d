"""The `solomonov` command: the one place that knows training, data and launcher together.

Heavy modules are imported inside the commands that need them, so that `solomonov --help` answers at once.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solomonov import exits

if TYPE_CHECKING:
    from launcher.config import LaunchConfig
    from launcher.job import JobSpec
    from solomonov.config import Loaded
    from solomonov.runfolder import RunFolder
    from solomonov.start import PreparedRun

EXIT_CODES = """\
exit codes:
  0 done   2 usage   70 numerical failure   74 data or checkpoints damaged beyond repair
  75 saved, run me again   78 the configuration is wrong   130 interrupted at once   else: a crash
"""


def build_parser() -> argparse.ArgumentParser:
    """All verbs with their arguments."""
    parser = argparse.ArgumentParser(
        prog="solomonov",
        description="Pretrain very deep Transformers: from raw text to an exported model, exact and resumable.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")

    quickstart = verbs.add_parser("quickstart", help="a whole life on this machine, on text that it already has")
    quickstart.add_argument("--folder", default="quickstart", help="where everything is made (default: quickstart)")
    quickstart.add_argument("--no-kill", action="store_true", help="do not kill a rank half-way")
    quickstart.add_argument("--dashboard", action="store_true", help="serve Ray's dashboard meanwhile")

    for name, text in (
        ("prepare", "raw data -> tokenizer -> shards + manifest"),
        ("train", "train here and now on all local ranks; goes on by itself where it stopped"),
    ):
        verb = verbs.add_parser(name, help=text)
        verb.add_argument("config", metavar="CONFIG", help="YAML file")
        verb.add_argument("overrides", metavar="key=value", nargs="*", help="dotted keys, YAML values")

    checkpoints = verbs.add_parser("checkpoints", help="list, verify, digest, diff or prune a run's checkpoints")
    checkpoints.add_argument("action", choices=("list", "verify", "digest", "diff", "prune"))
    checkpoints.add_argument("run", metavar="RUN")
    checkpoints.add_argument("--step", type=int, help="one checkpoint instead of all (digest: the newest)")
    checkpoints.add_argument("--other", type=int, help="diff: the step to compare with")
    checkpoints.add_argument("--keep-last", type=_at_least_one, help="prune: how many to keep (default: the run's own)")

    evaluate = verbs.add_parser("evaluate", help="held-out loss and bits per byte, beside gzip -9 and xz -9")
    evaluate.add_argument("target", metavar="RUN_OR_EXPORT")
    evaluate.add_argument("--step", type=int, help="the checkpoint of this step (default: the newest that verifies)")
    evaluate.add_argument("--data", help="prepared data folder (default: the run's own)")
    evaluate.add_argument("--max-bytes", type=int, default=1 << 20, help="held-out text to read (default: 1 MiB)")

    generate = verbs.add_parser("generate", help="continue a text")
    generate.add_argument("target", metavar="RUN_OR_EXPORT")
    generate.add_argument("--prompt", default="", help="text to continue (default: nothing, from a document's start)")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    generate.add_argument("--top-k", type=int, default=0, help="only the k likeliest tokens (0: all)")
    generate.add_argument("--top-p", type=float, default=0.95, help="only the likeliest tokens of this total mass")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--step", type=int)

    export = verbs.add_parser("export", help="write a Hugging Face folder and check its logits")
    export.add_argument("run", metavar="RUN")
    export.add_argument("--step", type=int)
    export.add_argument("--to", help="folder to write (default: exports/step-N in the run)")
    export.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")

    tensorboard = verbs.add_parser("tensorboard", help="start TensorBoard on runs")
    tensorboard.add_argument("runs", metavar="RUN", nargs="+")
    tensorboard.add_argument("--port", type=int, default=6006, help="0: any free port")

    verbs.add_parser("doctor", help="what this machine has, and what is missing")
    fresh = "begin anew at step 0: checkpoints of the run are set aside, not deleted"
    verbs.choices["train"].add_argument("--fresh", action="store_true", help=fresh)
    for verb in verbs.choices.values():
        verb.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    for name in ("prepare", "checkpoints", "evaluate", "generate", "export", "doctor"):
        verbs.choices[name].add_argument("--json", action="store_true", help="print the answer as JSON")
    return parser


def _at_least_one(text: str) -> int:
    """A number from 1 on, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and (options.verb not in ("prepare", "train") or not all("=" in word for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides that stand behind an option
        options.overrides = [*options.overrides, *rest]
    if options.version:
        from solomonov.host import versions

        print(versions()["solomonov"])
        return exits.DONE
    if options.verb is None:
        parser.print_help()
        return exits.USAGE
    from data_pipeline.errors import DataError
    from launcher.errors import LauncherError
    from solomonov.errors import SolomonovError

    try:
        return _dispatch(options)
    except (SolomonovError, DataError, LauncherError) as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return exits.INTERRUPTED


def _dispatch(options: argparse.Namespace) -> int:
    if options.verb == "train":
        return train(Path(options.config), options.overrides, fresh=options.fresh)
    if options.verb == "quickstart":
        return quickstart(options)
    if options.verb == "prepare":
        return prepare(options)
    from solomonov import commands

    body = getattr(commands, options.verb)
    code: int = body(options)
    return code


@dataclass(frozen=True)
class RayAccess:
    """A Ray cluster that may be joined."""

    address: str
    environment: Mapping[str, str] = field(default_factory=dict)
    """What a process needs in its environment before it imports Ray."""
    dashboard_url: str | None = None


@contextmanager
def ray_access(launch: LaunchConfig, *, cpus: int) -> Iterator[RayAccess]:
    """The cluster at launch.ray_address, looked at first; without one, a private Ray on this machine.

    Raises:
        LaunchConfigurationError: it cannot be joined, or Ray is not installed or cannot be started.
    """
    from launcher.ray import PrivateRay, check_cluster, client_environment

    if launch.ray_address is not None:
        check_cluster(launch.ray_address, {})
        yield RayAccess(launch.ray_address, client_environment())
        return
    with PrivateRay(cpus) as ray:
        yield RayAccess(ray.address, ray.environment)


def prepare(options: argparse.Namespace) -> int:
    """`solomonov prepare CONFIG [key=value ...]`, on Ray where the configuration says so."""
    from solomonov import commands
    from solomonov.config import load_config

    loaded = load_config(Path(options.config), options.overrides)
    with ExitStack() as stack:
        ray = None
        if loaded.config.data.prepare.backend == "ray":
            launch, _ = _launch_section(loaded)
            ray = stack.enter_context(ray_access(launch, cpus=loaded.config.data.prepare.workers))
            os.environ.update(ray.environment)
        return commands.prepare(options, loaded.config, ray.address if ray is not None else None)


def quickstart(options: argparse.Namespace) -> int:
    """`solomonov quickstart`: on a private Ray where Ray is installed."""
    from launcher.ray import PrivateRay
    from solomonov.quickstart import quickstart as run_quickstart

    @contextmanager
    def private_ray(cpus: int) -> Iterator[RayAccess]:
        with PrivateRay(cpus, dashboard=options.dashboard) as ray:
            os.environ.update(ray.environment)  # `prepare` joins from this process
            yield RayAccess(ray.address, ray.environment, ray.dashboard_url)

    return run_quickstart(Path(options.folder), train=train, start_ray=private_ray, kill=not options.no_kill)


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
    from solomonov.config import load_config
    from solomonov.runfolder import run_lock
    from solomonov.start import finished_step, prepare_run

    loaded = load_config(config_path, overrides)
    launch, ranks = _launch_section(loaded)
    prepared = prepare_run(loaded, ranks=ranks, launch=launch.model_dump(mode="json"))
    run = prepared.run
    with run_lock(run) as lock:
        prepared.write()
        if fresh:
            _set_checkpoints_aside(run)
        done = finished_step(run, prepared.plan.total_steps)
        if done is not None:
            print(f"{run.path}: done, {done} updates; nothing is left to train")
            print(f"  raise training.total_steps under a new run.name to train longer; solomonov export {run.path}")
            return exits.DONE
        with ExitStack() as stack:
            workers = loaded.config.data.workers
            if workers.backend == "ray" and ray is None:
                ray = stack.enter_context(ray_access(launch, cpus=math.ceil(workers.count * workers.cpus)))
            return _supervise(prepared, launch, ranks, lock, ray if workers.backend == "ray" else None)


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


def _launch_section(loaded: Loaded) -> tuple[LaunchConfig, int]:
    """The validated launch section and the number of ranks on this machine."""
    from pydantic import ValidationError

    from launcher.config import LaunchConfig
    from solomonov.config import configuration_mistakes
    from solomonov.host import visible_gpus

    try:
        launch = LaunchConfig.model_validate(dict(loaded.launch))
    except ValidationError as error:
        raise configuration_mistakes(error, LaunchConfig, where="the launch section", prefix="launch.") from error
    return launch, launch.ranks_per_node or max(1, visible_gpus())


def _supervise(prepared: PreparedRun, launch: LaunchConfig, ranks: int, lock: int, ray: RayAccess | None) -> int:
    """Start the ranks, and the data service where there is a Ray; watch them, show their progress, say how it ended."""
    from launcher.job import JobSpec
    from launcher.local import LocalLauncher
    from solomonov.display import TrainingDisplay

    run, journal = prepared.run, prepared.run.journal
    attempt = journal.next_attempt()

    def on_event(kind: str, /, **fields: Any) -> None:
        if kind == "attempt_started":
            journal.write(kind, **fields)  # the number fences off earlier attempts: it must stand before training
        else:
            journal.try_write(kind, **fields)
        display.event(kind, fields)

    spec = JobSpec(
        command=[sys.executable, "-m", "solomonov.rank", str(run.path)],
        log_folder=run.logs,
        ranks=ranks,
        environment=_rank_environment(),
        pass_fds=(lock,),
        first_attempt=attempt,
    )
    if ray is not None:
        spec = _with_data_service(spec, prepared, ray)
    with TrainingDisplay(run, prepared.plan.total_steps, prepared.plan.describe()) as display:
        job = LocalLauncher(launch, on_event=on_event, durable_step=lambda: _durable_step(run)).run(spec)
    code = job.wait()
    display.verdict(code, job.tail)
    return code


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


def _durable_step(run: RunFolder) -> int | None:
    event = run.journal.last("checkpoint_durable")
    return int(event["step"]) if event else None


if __name__ == "__main__":
    sys.exit(main())
