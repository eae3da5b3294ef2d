"""`solomonov quickstart`: prepare, train, evaluate, export, generate, on text that every Python carries."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import sys
import sysconfig
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.table import Table

from solomonov import exits
from solomonov.config import load_config
from solomonov.display import last_line
from solomonov.host import usable_cores, visible_gpus
from solomonov.layouts import one_copy
from solomonov.proof import prove_record
from solomonov.runfolder import RunFolder, unwritable, write_atomically

PROMPT = "def read_lines(path):\n"
EVALUATION_BYTES = 200_000


class PeakMemory:
    """Largest memory of this process and all its descendants together, sampled once a second.

    Memory that several processes share (libraries) is counted once: the sum of proportional set sizes.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        import psutil

        root = psutil.Process()
        while not self._over.wait(1.0):
            total = 0
            for process in [root, *root.children(recursive=True)]:
                try:
                    total += proportional_bytes(process)
                except (psutil.Error, OSError):
                    continue  # it ended between listing and reading
            self.bytes = max(self.bytes, total)


def proportional_bytes(process: Any) -> int:
    """Proportional set size of a process where the system tells it (Linux), else its resident set."""
    rollup = Path(f"/proc/{process.pid}/smaps_rollup")
    if rollup.exists():
        for line in rollup.read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return int(process.memory_info().rss)


class Ray(Protocol):
    """A Ray cluster that may be joined."""

    @property
    def address(self) -> str:
        """host:port of its head."""

    @property
    def dashboard_url(self) -> str | None:
        """Where its dashboard is, if it has one."""


class Train(Protocol):
    """Starts training of a configuration file and returns its exit code."""

    def __call__(self, config_path: Path, /, *, ray: Any = None) -> int:
        """Train, with data workers on that Ray."""


def quickstart(
    folder: Path, *, train: Train, start_ray: Callable[[int], AbstractContextManager[Ray]], kill: bool
) -> int:
    """Run the whole life once; run again, it goes on where it stopped, or shows the summary of what is done.

    Args:
        folder: where everything is made.
        train: starts training.
        start_ray: starts a private Ray with so many CPUs.
        kill: half-way, kill a rank with SIGKILL and let the run recover.
    """
    console = Console(highlight=False)
    config_path = folder / "config.yaml"
    summary_path = folder / "summary.json"
    problem = ray_problem()
    text = configuration(folder, ray=problem is None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(config_path, text)
    except OSError as error:
        raise unwritable(folder, error) from error
    config = load_config(config_path).config
    run = RunFolder(Path(config.run.folder) / config.run.name)
    if summary_path.exists():
        console.print(f"{folder}: all of it is done; remove the folder to begin anew\n")
        summary = json.loads(summary_path.read_text())
        show(console, summary, folder, run)
        return exits.DONE if summary["proof"]["holds"] else exits.DAMAGED
    console.print(f"[bold]solomonov quickstart[/]: {usable_cores()} cores, {visible_gpus() or 'no'} GPU, in {folder}/")
    seconds: dict[str, float] = {}
    with PeakMemory() as peak, ExitStack() as stack:
        ray = None
        if problem is not None:
            text = f"\nwithout Ray ({problem}): prepared by a pool of processes, rows built inline"
            console.print(text, markup=False, soft_wrap=True)
        else:
            with _stage(console, "ray", seconds, "a private one: own folder, ports and token; no telemetry"):
                ray = stack.enter_context(start_ray(config.data.workers.count))
                console.print(f"ray     {ray.address}" + (f", {ray.dashboard_url}" if ray.dashboard_url else ""))
        with _stage(console, "prepare", seconds, f"solomonov prepare {config_path}"):
            prepared = _prepare(config_path, ray.address if ray else None)
        with _stage(console, "train", seconds, f"solomonov train {config_path}"):
            steps = one_copy(config).total_steps
            middle = steps // 2 + config.checkpoint.every_steps // 4
            with HalfwayKill(run, middle, console) if kill else nullcontext():
                code = train(config_path, ray=ray)
        if code != exits.DONE:
            return code
        with _stage(console, "prove", seconds, "every row of the record against the order function"):
            proof = prove_record(run)
        results = _use(console, run, seconds)
    summary = {
        "prepared": prepared,
        **results,
        "seconds": seconds,
        "peak_memory_bytes": peak.bytes,
        "training": _training_facts(run),
        "proof": {**dataclasses.asdict(proof), "holds": proof.holds},
    }
    write_atomically(summary_path, json.dumps(summary, indent=1) + "\n")
    show(console, summary, folder, run)
    return exits.DONE if proof.holds else exits.DAMAGED


def ray_problem() -> str | None:
    """Why this machine runs without Ray; None where it has one."""
    if importlib.util.find_spec("ray") is None:
        return "not installed; pip install 'solomonov[ray]'"
    if sys.platform != "linux":
        return "a private one needs Linux"
    return None


class HalfwayKill:
    """Kills the last rank with SIGKILL when a step is done, once in the life of a run; a context manager.

    Args:
        run: the run.
        step: the step after which it happens.
        console: where it is said.
    """

    def __init__(self, run: RunFolder, step: int, console: Console) -> None:
        self._run, self._step, self._console = run, step, console
        self._first_attempt = run.journal.next_attempt()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="kill", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            last, resumed = last_line(self._run), self._run.journal.last("resumed")
            # Only ranks of ours that train: the numbers of earlier ones may be those of strangers now.
            ours = resumed is not None and resumed["attempt"] >= self._first_attempt
            if ours and last is not None and last["step"] >= self._step:
                if self._run.journal.last("kill_injected") is None:
                    self._strike(last["step"])
                return

    def _strike(self, step: int) -> None:
        started = self._run.journal.last("attempt_started")
        assert started is not None, "a step is done, so ranks were started"
        rank, pid = len(started["pids"]) - 1, started["pids"][-1]
        # The journal first: a quickstart that is interrupted right here must not kill a second time.
        self._run.journal.write("kill_injected", rank=rank, victim=pid, step=step)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return  # it has just ended by itself
        # Over the progress bar, which comes again below.
        self._console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))
        self._console.print(f"kill    SIGKILL to rank {rank} (process {pid}) at step {step}, on purpose", markup=False)


def command_name() -> str:
    """How this user types the command: `solomonov` where it is on the PATH, else its path."""
    if shutil.which("solomonov"):
        return "solomonov"
    beside = Path(sys.executable).with_name("solomonov")
    return os.path.relpath(beside) if beside.exists() else f"{sys.executable} -m solomonov.cli"


def configuration(folder: Path, *, ray: bool) -> str:
    """The quickstart's YAML for this machine: two ranks on the CPU, one a GPU (at most one) otherwise."""
    text = files("solomonov").joinpath("quickstart.yaml").read_text(encoding="utf-8")
    places = {
        "FOLDER": str(folder),
        "STDLIB": sysconfig.get_path("stdlib"),
        "RANKS": "1" if visible_gpus() else "2",
        "PREPARE": "ray" if ray else "local",
        "WORKERS": "ray" if ray else "inline",
    }
    for name, value in places.items():
        text = text.replace(name, value)
    return text


def _prepare(config_path: Path, ray_address: str | None) -> dict[str, int]:
    from data_pipeline.build import prepare

    config = load_config(config_path).config
    report = prepare(config.data, config.tokenizer, base_folder=Path.cwd(), show_progress=True, cluster=ray_address)
    splits = [split for source in report.manifest.sources for _, split in source.splits()]
    return {
        "documents": sum(split.documents for split in splits),
        "text_bytes": sum(split.text_bytes for split in splits),
        "tokens": sum(split.tokens for split in splits),
        "pieces": report.manifest.vocab_size,
        "shards": sum(len(split.shards) for split in splits),
    }


def _use(console: Console, run: RunFolder, seconds: dict[str, float]) -> dict[str, Any]:
    """Evaluate, export and generate from the newest checkpoint."""
    from data_pipeline.tokenizer import Tokenizer
    from solomonov.commands import export, inference_device
    from solomonov.evaluate import evaluate
    from solomonov.generate import generate
    from solomonov.loading import load_model

    target = str(run.path)
    with _stage(console, "evaluate", seconds, f"solomonov evaluate {target}"):
        model = load_model(target)
        device = inference_device()
        evaluation = evaluate(model, run.data_folder(), device, max_bytes=EVALUATION_BYTES)
    folder = run.exports / f"step-{model.step:08d}"
    with _stage(console, "export", seconds, f"solomonov export {target}"):
        asked = {"step": model.step, "ema": False, "to": str(folder), "dtype": "float32", "model_type": None}
        export(Namespace(run=target, json=False, **asked))
    with _stage(console, "generate", seconds, f"solomonov generate {target} --prompt ..."):
        tokenizer = Tokenizer.load(model.tokenizer_model)
        prompt = [tokenizer.bos, *tokenizer.encode(PROMPT)]
        new = generate(
            model.module(device), prompt, max_new_tokens=64, temperature=0.7, top_k=0, top_p=0.9, seed=1,
            eos_id=tokenizer.eos,
        )  # fmt: skip
        sample = tokenizer.decode([i for i in new if i != tokenizer.eos])
    return {"evaluation": dataclasses.asdict(evaluation), "export": str(folder), "sample": PROMPT + sample}


@contextmanager
def _stage(console: Console, name: str, seconds: dict[str, float], command: str) -> Iterator[None]:
    console.print(f"\n[bold]{name}[/]  $ {command}")
    started = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - started, 1)


def _training_facts(run: RunFolder) -> dict[str, Any]:
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    derived = run.resolved()["derived"]
    return {
        "steps": lines[-1]["step"],
        "first_loss": lines[0]["loss"],
        "last_loss": lines[-1]["loss"],
        "tokens": sum(line["tokens"] for line in lines),
        "ranks": derived["ranks"],
        "parameters": derived["parameters"],
    }


def proof_lines(proof: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, sentence) on what the record of the training proves."""
    rows = f"{proof['rows']:,} trained, {proof['lost']:,} lost, {proof['repeated']:,} repeated"
    digests = f"{proof['digests_equal']} of {proof['steps']} data digests equal those of the order function"
    lines = [("rows", f"{rows}; {digests}")]
    for fault in proof["kills"]:
        lines.append(
            (
                "kill -9",
                f"rank {fault['rank']} at step {fault['step']}; went on from the verified checkpoint of step"
                f" {fault['resumed']}, {fault['seconds']:.0f} s later",
            )
        )
    if proof["replayed"]:
        steps = f"steps {proof['replayed'][0]}-{proof['replayed'][-1]} were trained twice"
        verdict = "same rows, and same losses to the bit" if proof["exact"] else "same rows, losses within the bound"
        different = f"{len(proof['differences'])} differences: {proof['differences'][:3]}"
        lines.append(("replay", f"{steps}: {different if proof['differences'] else verdict}"))
    return lines


def show_replay(console: Console, proof: dict[str, Any]) -> None:
    """The columns of the last steps that were trained twice."""
    if not proof["columns"]:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("step", "data_digest", "order function", "loss, before the kill", "loss, after it"):
        table.add_column(name, justify="right" if name == "step" else "left")
    for line in proof["columns"]:
        table.add_row(str(line["step"]), line["data_digest"], line["order"], repr(line["before"]), repr(line["after"]))
    console.print()
    console.print(table)


def show(console: Console, summary: dict[str, Any], folder: Path, run: RunFolder) -> None:
    """The summary, on one screen."""
    training, evaluation, prepared = summary["training"], summary["evaluation"], summary["prepared"]
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row(
        "data",
        f"{prepared['documents']:,} documents, {prepared['text_bytes']:,} bytes of Python source ->"
        f" {prepared['tokens']:,} tokens of {prepared['pieces']:,} pieces, in {prepared['shards']} WebDataset shards",
    )
    table.add_row(
        "model",
        f"{training['parameters']:,} parameters, {training['steps']} updates, {training['tokens']:,} predicted tokens"
        f" on {training['ranks']} DeepSpeed rank(s)",
    )
    table.add_row("training loss", f"{training['first_loss']:.3f} -> {training['last_loss']:.3f} nats a token")
    for name, text in proof_lines(summary["proof"]):
        table.add_row(name, text)
    table.add_row(
        "held-out text",
        f"{evaluation['bits_per_byte']:.3f} bits a byte; gzip -9 {evaluation['gzip_bits_per_byte']:.3f},"
        f" xz -9 {evaluation['xz_bits_per_byte']:.3f} on the same {evaluation['text_bytes']:,} bytes",
    )
    times = ", ".join(f"{name} {value:.0f} s" for name, value in summary["seconds"].items())
    total = sum(summary["seconds"].values())
    table.add_row("cost", f"{total:.0f} s ({times})")
    table.add_row("peak memory", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB, all processes together")
    table.add_row("run", f"{run.path}: checkpoints, journal.jsonl, metrics.jsonl, tensorboard, logs")
    table.add_row("export", f"{summary['export']}: loads with transformers, logits compared")
    console.print()
    console.print(table)
    show_replay(console, summary["proof"])
    console.print("\n[bold]it writes[/]")
    console.print(summary["sample"].rstrip()[:400], markup=False)
    console.print("\n[bold]next[/]")
    program = command_name()
    for command in (
        f"{program} tensorboard {run.path}",
        f"{program} generate {summary['export']} --prompt 'import os'",
        f"{program} train {folder / 'config.yaml'} run.name=longer training.total_steps=2000",
    ):
        console.print(f"  {command}", markup=False, soft_wrap=True)
