"""The `solomonov` command: the one place that knows training, data and launcher together.

Heavy modules are imported inside the commands that need them, so that `solomonov --help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from solomonov import exits

JOB_VERBS = ("submit", "status", "runs", "logs", "cancel", "resume", "wait")
GRACE_SECONDS = 5.0
"""What ranks that have nothing to save get between being asked to leave and being killed."""
INTERNAL_VERBS = ("supervise", "requeue")
"""What submitted runs are started with; not for typing."""
ANSWERING = (
    *("plan", "prove", "prepare", "checkpoints", "evaluate", "generate", "export", "doctor"),
    *("submit", "resume", "status", "runs"),
)
"""Verbs whose answer a script may want to read."""
OVERRIDABLE = ("plan", "prove", "prepare", "train", "submit", "resume")
"""Verbs that take key=value words."""
READER_GONE = 141
"""Exit code where nobody reads what the command prints any more, as after `| head`; SIGPIPE ends others so."""

EXIT_CODES = """\
exit codes:
  0 done   1 a proof does not hold   2 usage   70 numerical failure   74 data or checkpoints damaged beyond repair
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
        ("plan", "every number that follows from a configuration, on any devices; nothing is allocated"),
        ("prove", "train a configuration, scaled down, in every kind of layout, and compare the numbers"),
        ("prepare", "raw data -> tokenizer -> shards + manifest"),
        ("train", "train here and now on all local ranks; goes on by itself where it stopped"),
    ):
        verb = verbs.add_parser(name, help=text)
        verb.add_argument("config", metavar="CONFIG", help="YAML file")
        verb.add_argument("overrides", metavar="key=value", nargs="*", help="dotted keys, YAML values")

    _add_what_is_asked_beforehand(verbs)

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
    for verb in (evaluate, generate, export):
        verb.add_argument("--ema", action="store_true", help="the moving average of the weights in their place")
    export.add_argument("--to", help="folder to write (default: exports/step-N, or step-N-ema, in the run)")
    export.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    export.add_argument(
        "--as", dest="model_type", metavar="CLASS", help="llama, qwen3, granite, ... (default: the first that holds it)"
    )

    _add_job_verbs(verbs)
    tensorboard = verbs.add_parser("tensorboard", help="start TensorBoard on runs")
    tensorboard.add_argument("runs", metavar="RUN", nargs="+")
    tensorboard.add_argument("--port", type=int, default=6006, help="0: any free port")

    verbs.add_parser("doctor", help="what this machine has, and what is missing")
    fresh = "begin anew at step 0: checkpoints of the run are set aside, not deleted"
    verbs.choices["train"].add_argument("--fresh", action="store_true", help=fresh)
    _add_internal_verbs(verbs)
    for verb in verbs.choices.values():
        verb.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    for name in ANSWERING:
        verbs.choices[name].add_argument("--json", action="store_true", help="print the answer as JSON")
    return parser


def _add_what_is_asked_beforehand(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plan = verbs.choices["plan"]
    plan.add_argument("--gpus", type=_at_least_one, metavar="N", help="ranks (default: launch.nodes x ranks_per_node)")
    plan.add_argument("--gpu", metavar="NAME", help="a100, h100, h200, b200 or l40s (default: what is here)")
    plan.add_argument(
        "--signal", action="store_true", help="whether a signal comes through all layers, eighth by eighth"
    )
    plan.add_argument("--picture", metavar="FILE", help="draw that signal layer by layer: .png, .pdf or .svg")

    prove = verbs.choices["prove"]
    prove.add_argument("--layouts", action="store_true", required=True, help="that all layouts train the same numbers")
    prove.add_argument("--ranks", type=_at_least_one, default=4, metavar="N", help="most ranks (default: 4)")
    prove.add_argument("--all", action="store_true", help="every legal layout, some 1,000; half an hour and more")
    prove.add_argument("--keep", metavar="FOLDER", help="what layouts gave stays there; what is there is not run again")
    prove.add_argument(
        "--to", metavar="FILE", action="append", default=[], help="write the certificate there, as JSON or a page (.md)"
    )


def _add_job_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    submit = verbs.add_parser("submit", help="start a training elsewhere, or here in the background")
    submit.add_argument("config", metavar="CONFIG", help="YAML file")
    submit.add_argument("overrides", metavar="key=value", nargs="*", help="dotted keys, YAML values")
    submit.add_argument("--on", choices=("local", "slurm", "ray"), required=True, help="where its ranks run")
    submit.add_argument("--nodes", type=_at_least_one, help="machines (launch.nodes)")
    submit.add_argument(
        "--sweep", action="append", default=[], metavar="KEY=V,V", help="a run for each value; again for combinations"
    )
    resume = verbs.add_parser("resume", help="submit a run again, as it was submitted")
    resume.add_argument("run", metavar="RUN")
    resume.add_argument("overrides", metavar="key=value", nargs="*", help="dotted keys, YAML values")
    resume.add_argument("--on", choices=("local", "slurm", "ray"), help="where its ranks run (default: as before)")
    for verb in (submit, resume):
        verb.add_argument("--dry-run", action="store_true", help="only show what would be done")

    status = verbs.add_parser("status", help="where a run stands")
    runs = verbs.add_parser("runs", help="all runs of a folder")
    runs.add_argument("--folder", default="runs", help="folder of the runs (default: runs)")
    logs = verbs.add_parser("logs", help="the logs of a run's ranks")
    cancel = verbs.add_parser("cancel", help="have a run save and leave")
    cancel.add_argument("--now", action="store_true", help="do not save")
    wait = verbs.add_parser("wait", help="wait for the end of a run; leaves with its exit code")
    wait.add_argument("--timeout", type=float, metavar="SECONDS", help="leave with 75 if it has not ended by then")
    for verb in (status, logs, cancel, wait):
        verb.add_argument("run", metavar="RUN")
    logs.add_argument("-f", "--follow", action="store_true", help="go on with what is written, until the run has ended")
    logs.add_argument("--lines", type=_at_least_one, default=20, help="of each rank (default: 20)")


def _add_internal_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    for name in INTERNAL_VERBS:
        verb = verbs.add_parser(name)
        verb.add_argument("folder", metavar="FOLDER", type=Path, help="of a run, or a configuration file")
    verbs.choices["requeue"].add_argument("code", metavar="CODE", type=int)


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
    if rest and (options.verb not in OVERRIDABLE or not all("=" in word for word in rest)):
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
        code = _dispatch(options)
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            _reader_is_gone()  # all is done nevertheless
        return code
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return READER_GONE
    except (SolomonovError, DataError, LauncherError) as error:
        if options.debug:
            raise
        _complain(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        _complain("interrupted")
        return exits.INTERRUPTED


def _complain(text: str) -> None:
    """On standard error, if anybody reads it: the exit code says the same."""
    with contextlib.suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)


def _reader_is_gone() -> bool:
    """Whether nobody reads what we print any more, as after `| head`; what is left to print goes nowhere then."""
    looked = select.poll()
    looked.register(sys.stdout.fileno(), select.POLLOUT)
    gone = any(state & (select.POLLERR | select.POLLHUP) for _, state in looked.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _dispatch(options: argparse.Namespace) -> int:
    if options.verb == "train":
        from solomonov.supervise import train

        return train(Path(options.config), options.overrides, fresh=options.fresh)
    if options.verb in INTERNAL_VERBS:
        from solomonov import supervise

        return (
            supervise.supervise(options.folder)
            if options.verb == "supervise"
            else supervise.requeue(options.folder, options.code)
        )
    if options.verb == "quickstart":
        return quickstart(options)
    if options.verb == "prepare":
        return prepare(options)
    if options.verb == "plan":
        return plan(options)
    if options.verb == "prove":
        return prove(options)
    from solomonov import commands, jobs

    body = getattr(jobs if options.verb in JOB_VERBS else commands, options.verb)
    code: int = body(options)
    return code


def prepare(options: argparse.Namespace) -> int:
    """`solomonov prepare CONFIG [key=value ...]`, on Ray where the configuration says so."""
    from launcher.ray_access import ray_access
    from solomonov import commands
    from solomonov.config import load_config
    from solomonov.supervise import launch_section

    loaded = load_config(Path(options.config), options.overrides)
    with ExitStack() as stack:
        ray = None
        if loaded.config.data.prepare.backend == "ray":
            ray = stack.enter_context(ray_access(launch_section(loaded), cpus=loaded.config.data.prepare.workers))
            os.environ.update(ray.environment)
        return commands.prepare(options, loaded.config, ray.address if ray is not None else None)


def plan(options: argparse.Namespace) -> int:
    """`solomonov plan CONFIG [--gpus N] [--gpu NAME]`."""
    from solomonov import commands
    from solomonov.config import load_config
    from solomonov.supervise import launch_section, ranks_per_node

    loaded = load_config(Path(options.config), options.overrides)
    launch = launch_section(loaded)
    return commands.plan(options, loaded.config, launch.nodes, ranks_per_node(launch))


def prove(options: argparse.Namespace) -> int:
    """`solomonov prove CONFIG --layouts [--ranks N] [--all] [--keep FOLDER] [--to FILE ...]`."""
    from solomonov import commands
    from solomonov.config import load_config

    return commands.prove(options, load_config(Path(options.config), options.overrides).config, run_module)


def run_module(module: Sequence[str], ranks: int, logs: Path) -> str:
    """Run a Python module as so many ranks of this machine, on the CPU; see `certificate.Start`.

    Raises:
        KeyboardInterrupt: it was asked to stop meanwhile, by whatever signal.
    """
    from launcher.config import LaunchConfig
    from launcher.job import JobSpec
    from launcher.local import LocalLauncher

    stopped: list[str] = []

    def note(kind: str, /, **fields: object) -> None:
        if kind == "stopping":
            stopped.append(kind)

    environment = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    spec = JobSpec([sys.executable, "-m", *module], log_folder=logs, ranks=ranks, environment=environment)
    launcher = LocalLauncher(LaunchConfig(max_restarts=0, grace_seconds=GRACE_SECONDS), on_event=note)
    job = launcher.run(spec)
    if stopped:
        raise KeyboardInterrupt
    return "" if job.wait() == exits.DONE else f"{job.attempts[-1].describe()}: {' | '.join(job.tail[-3:])}"


def quickstart(options: argparse.Namespace) -> int:
    """`solomonov quickstart`: on a private Ray where Ray is installed."""
    from launcher.ray import PrivateRay
    from launcher.ray_access import RayAccess
    from solomonov.quickstart import quickstart as run_quickstart
    from solomonov.supervise import train

    @contextmanager
    def private_ray(cpus: int) -> Iterator[RayAccess]:
        with PrivateRay(cpus, dashboard=options.dashboard) as ray:
            os.environ.update(ray.environment)  # `prepare` joins from this process
            yield RayAccess(ray.address, ray.environment, ray.dashboard_url)

    return run_quickstart(Path(options.folder), train=train, start_ray=private_ray, kill=not options.no_kill)


if __name__ == "__main__":
    sys.exit(main())
