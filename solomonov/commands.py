"""The bodies of the commands that read or write files here and now; training is started by cli.py."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solomonov import exits
from solomonov.errors import ConfigurationError

if TYPE_CHECKING:
    from solomonov.certificate import Start
    from solomonov.config import Config


def prepare(options: argparse.Namespace, config: Config, ray_address: str | None) -> int:
    """`solomonov prepare CONFIG [key=value ...]`, on the Ray at that address where the configuration wants one."""
    from data_pipeline.build import prepare as build_dataset

    report = build_dataset(
        config.data, config.tokenizer, base_folder=Path.cwd(), show_progress=not options.json, cluster=ray_address
    )
    answer(options, dict(report.summary()))
    return exits.DONE


def plan(options: argparse.Namespace, config: Config, nodes: int, ranks_per_node: int) -> int:
    """`solomonov plan CONFIG [key=value ...]`, for so many ranks unless the options say otherwise."""
    from solomonov import pictures, signal_check
    from solomonov.devices import CPU, DEVICES, this_device
    from solomonov.explain import explain, facts, lines
    from solomonov.planner import Question

    if options.gpu is not None and options.gpu not in DEVICES:
        raise ConfigurationError(
            "the device is not known",
            got=f"--gpu {options.gpu}",
            rule=f"one of {', '.join(DEVICES)}",
            remedy="take the nearest of them, or leave --gpu out for the device that is here",
        )
    target = None if options.picture is None else pictures.checked_target(Path(options.picture))
    world = options.gpus or nodes * ranks_per_node
    device = DEVICES[options.gpu] if options.gpu else this_device(min(world, ranks_per_node))
    precision = config.training.precision
    if precision == "auto":
        precision = "fp32" if device.name == CPU else "bf16"
    explanation = explain(Question(config, config.tokenizer.vocab_size, world, device, precision))
    signal = None
    if options.signal or target is not None or config.model.depth > signal_check.DEEP_LAYERS:
        signal = signal_check.check_signal(config.model)
        if target is not None:
            pictures.of_signal(signal, target)
    if options.json:
        print(json.dumps(facts(explanation) | ({"signal": signal_check.facts(signal)} if signal else {})))
    else:
        print("\n".join(lines(explanation)))
        if signal is not None:
            print("\n" + "\n".join(signal_check.lines(signal, whole=options.signal)))
    return exits.DONE if explanation.taken.fits else exits.CONFIGURATION


def prove(options: argparse.Namespace, config: Config, start: Start) -> int:
    """`solomonov prove CONFIG --layouts [key=value ...]`.

    Args:
        start: starts ranks of this machine, see `certificate.Start`.
    """
    from solomonov.certificate import check_target, lines, prove_layouts, write

    targets = [Path(target) for target in options.to]
    for target in targets:
        check_target(target)
    certificate = prove_layouts(
        config,
        options.ranks,
        start,
        lambda line: print(line, file=sys.stderr, flush=True),
        every=options.all,
        keep=Path(options.keep) if options.keep is not None else None,
    )
    print(json.dumps(certificate) if options.json else "\n".join(lines(certificate)))
    for target in targets:
        write(target, certificate)
    return exits.DONE if certificate["holds"] else exits.DIFFERS


def checkpoints(options: argparse.Namespace) -> int:
    """`solomonov checkpoints list|verify|digest|diff|prune RUN`."""
    from solomonov.checkpoint.reader import diff, digest
    from solomonov.checkpoint.store import CheckpointInfo, ResumeFact, folder_name, prune, survey
    from solomonov.runfolder import find_run, run_lock

    run = find_run(options.run)
    if options.action == "prune":
        keep = options.keep_last or run.config().checkpoint.keep_last
        with run_lock(run, wait_seconds=1.0):
            report = prune(run.checkpoints, keep, facts=[ResumeFact(*fact) for fact in run.journal.resumes()])
        answer(
            options,
            {
                "kept steps": [info.step for info in report.kept],
                "deleted steps": [info.step for info in report.deleted],
                "damaged": [str(broken.folder) for broken in report.damaged],
                "bytes freed": report.bytes_freed,
            },
        )
        return exits.DONE
    present = survey(run.checkpoints)
    found = [item for item in present if options.step in (None, item.step)]
    strange = {options.step, options.other} - {None, *(item.step for item in present)}
    if strange or not found:
        steps = f", step {', '.join(map(str, sorted(strange)))}" if strange else ""
        raise ConfigurationError(
            "the run has no such checkpoint",
            got=f"{run.checkpoints}{steps}",
            rule="a step at which a checkpoint was written and kept",
            remedy=f"list them: solomonov checkpoints list {run.path}",
        )
    if options.action == "digest":
        answer(options, {"step": found[0].step, "digest": digest(found[0].folder)})
        return exits.DONE
    if options.action == "diff":
        if options.step is None or options.other is None:
            raise ConfigurationError(
                "diff compares two steps",
                got=f"--step {options.step} --other {options.other}",
                rule="both steps must be named",
                remedy="solomonov checkpoints diff RUN --step A --other B",
            )
        rows = diff(found[0].folder, run.checkpoints / folder_name(options.other))
        table(options, [dataclasses.asdict(row) for row in rows])
        return exits.DONE
    lines, damaged = [], False
    for item in found:
        line: dict[str, Any] = {"step": item.step, "folder": item.folder.name}
        if isinstance(item, CheckpointInfo):
            line |= {"attempt": item.attempt, "bytes": item.nbytes, "manifest": item.digest}
            problem = _verify(item) if options.action == "verify" else None
        else:
            problem = item.error.what
        line["state"] = "damaged: " + problem if problem else ("verified" if options.action == "verify" else "listed")
        damaged = damaged or bool(problem)
        lines.append(line)
    table(options, lines)
    return exits.DAMAGED if damaged else exits.DONE


def _verify(info: Any) -> str | None:
    """What is wrong with a checkpoint's bytes, or None."""
    from solomonov.checkpoint.store import verify_checkpoint
    from solomonov.errors import DamagedCheckpointError

    try:
        verify_checkpoint(info)
    except DamagedCheckpointError as error:
        return f"{error.what} ({error.got})"
    return None


def evaluate(options: argparse.Namespace) -> int:
    """`solomonov evaluate RUN_OR_EXPORT`."""
    from solomonov.evaluate import evaluate as run_evaluation
    from solomonov.loading import load_model

    model = load_model(options.target, step=options.step, ema=options.ema)
    if options.data is None and model.run is None:
        raise ConfigurationError(
            "an export does not say which data to evaluate it on",
            got=f"{options.target} without --data",
            rule="evaluation reads the held-out documents of a prepared data folder",
            remedy="add --data FOLDER",
        )
    data = Path(options.data) if options.data else model.run.data_folder()  # type: ignore[union-attr]
    result = run_evaluation(model, data, inference_device(), max_bytes=options.max_bytes)
    answer(
        options,
        {"source": str(model.source), "step": model.step, "ema": options.ema, **dataclasses.asdict(result)},
    )
    return exits.DONE


def generate(options: argparse.Namespace) -> int:
    """`solomonov generate RUN_OR_EXPORT --prompt TEXT`."""
    from data_pipeline.tokenizer import Tokenizer
    from solomonov.generate import generate as continue_ids
    from solomonov.loading import load_model

    model = load_model(options.target, step=options.step, ema=options.ema)
    tokenizer = Tokenizer.load(model.tokenizer_model)
    prompt = [tokenizer.bos, *tokenizer.encode(options.prompt)]
    new = continue_ids(
        model.module(inference_device()),
        prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        eos_id=tokenizer.eos,
    )
    text = tokenizer.decode([i for i in new if i != tokenizer.eos])
    if options.json:
        print(json.dumps({"prompt": options.prompt, "text": text, "tokens": len(new)}, ensure_ascii=False))
    else:
        print(options.prompt + text)
    return exits.DONE


def export(options: argparse.Namespace) -> int:
    """`solomonov export RUN`."""
    from solomonov.export import export_hf
    from solomonov.loading import load_model

    model = load_model(options.run, step=options.step, ema=options.ema)
    if model.run is None:
        raise ConfigurationError(
            "this is an export already",
            got=options.run,
            rule="export reads a run's checkpoint",
            remedy="give a run's name or folder",
        )
    name = f"step-{model.step:08d}{'-ema' if options.ema else ''}"
    folder = Path(options.to) if options.to else model.run.exports / name
    report = export_hf(
        model.state,
        model.config,
        model.tokenizer_model,
        folder,
        sequence_tokens=model.sequence_tokens,
        dtype=options.dtype,
        model_type=options.model_type,
    )
    model.run.journal.try_write("exported", step=model.step, ema=options.ema, folder=str(folder))
    answer(options, {"folder": str(folder), "step": model.step, **dataclasses.asdict(report)})
    return exits.DONE


def tensorboard(options: argparse.Namespace) -> int:
    """`solomonov tensorboard RUN ...`: TensorBoard's own server on the runs' event files, until Ctrl-C."""
    from solomonov.runfolder import find_run
    from solomonov.tensorboard import serve

    runs = [find_run(name) for name in options.runs]
    if not serve({run.path.name: run.path / "tensorboard" for run in runs}, options.port):
        return exits.CONFIGURATION
    raise KeyboardInterrupt


def doctor(options: argparse.Namespace) -> int:
    """`solomonov doctor`."""
    from solomonov.doctor import examine

    findings = examine()
    if options.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            print(f"{finding.verdict:<8} {finding.name:<18} {finding.value}")
            if finding.remedy:
                print(f"{'':<27} -> {finding.remedy}")
    return exits.CONFIGURATION if any(finding.verdict == "missing" for finding in findings) else exits.DONE


def inference_device() -> Any:
    """The first CUDA device where there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def answer(options: argparse.Namespace, values: Mapping[str, Any]) -> None:
    """One answer: JSON for scripts, aligned lines for people."""
    if options.json:
        print(json.dumps(values, ensure_ascii=False))
        return
    width = max(map(len, values))
    for name, value in values.items():
        shown = f"{value:.6g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else value
        if isinstance(value, tuple):
            shown = ", ".join(map(str, value)) or "nothing"
        print(f"{name.replace('_', ' '):<{width}}  {shown}")


def table(options: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table: one JSON line a row for scripts, columns for people."""
    if options.json:
        for row in rows:
            print(json.dumps(row))
        return
    names = list(rows[0])
    cells = [
        [name.replace("_", " ") for name in names],
        *([str(row.get(name, "")) for name in names] for row in rows),
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
