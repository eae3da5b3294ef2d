"""The certificate that all layouts of a configuration are equal: made on this machine, as a table and as a file."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

import xxhash

from solomonov.config import Config, flatten
from solomonov.equivalence import (
    MOST_RANKS,
    REFERENCE,
    STEPS,
    Case,
    Outcome,
    Trial,
    Verdict,
    all_cases,
    compare,
    draw_cases,
    scale_down,
)
from solomonov.equivalence_rank import TRIAL, load_outcome
from solomonov.errors import ConfigurationError, SolomonovError
from solomonov.host import cpu_model, git_facts, versions
from solomonov.metrics import LOSS_BOUND
from solomonov.snapshot import code_digest

SCHEMA_VERSION = 1
CLAIM = "proof.json"
"""What a kept folder is the proof of."""
RANK_MODULE = "solomonov.equivalence_rank"
MEASURES = ("loss", "grad_norm", "master", "first_moment")
"""Fields of a verdict that are differences."""

VERDICTS = ("equal", "within bound", "differs", "did not run")

Start = Callable[[Sequence[str], int, Path], str]
"""Starts a Python module, given as its name and arguments, as so many ranks of this machine on the CPU, with logs in a
folder, and waits for their end: an empty text, or how the first that failed ended."""
Say = Callable[[str], None]
"""Takes a line on how far it is."""


def prove_layouts(
    config: Config, ranks: int, start: Start, say: Say, *, every: bool = False, keep: Path | None = None
) -> dict[str, Any]:
    """Train a configuration, scaled down, in many layouts on up to so many ranks, and compare.

    Args:
        every: in all that are legal, not in some that show each pair of values.
        keep: what the layouts gave stays in this folder, and what is there already is not run again; None: nothing
            stays.

    Returns:
        the certificate: plain JSON.

    Raises:
        ConfigurationError: more ranks than one machine should start, or the folder holds something else.
        SolomonovError: the reference, one rank with ZeRO 0, did not run.
    """
    if ranks > MOST_RANKS:
        raise ConfigurationError(
            "there are too many ranks for one machine",
            got=f"--ranks {ranks}",
            rule=f"at most {MOST_RANKS}: each is a process of its own, with about 0.5 GiB",
            remedy=f"give --ranks {MOST_RANKS} or fewer; 4 show every kind of layout",
        )
    trial = scale_down(config, ranks)
    cases = [REFERENCE, *(all_cases if every else draw_cases)(trial, ranks, config.training.precision)]
    with ExitStack() as stack:
        if keep is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="solomonov-prove-")))
        else:
            folder = keep
            _claim(folder, trial, cases)
        (folder / TRIAL).write_text(trial.model_dump_json(), encoding="utf-8")
        failures = run_cases(folder, cases, start, say)
        reference = load_outcome(folder, 0)
        if reference is None:
            raise SolomonovError(
                "the reference did not run",
                got=failures[0],
                rule=f"{REFERENCE} trains {trial.steps} updates of the scaled-down configuration",
                remedy="mend what it says; `solomonov doctor` shows what this machine lacks",
            )
        verdicts = [
            _verdict(case, trial, load_outcome(folder, number), reference, failures.get(number))
            for number, case in enumerate(cases)
            if number
        ]
    found = _certificate(config, trial, ranks, reference, verdicts)
    return found | {"layouts": "all that are legal" if every else "each two values of two axes"}


def _claim(folder: Path, trial: Trial, cases: Sequence[Case]) -> None:
    """Make the folder of a proof, or see that what it holds was run for the same one, by the same code."""
    mine = {
        "trial": trial.model_dump(mode="json"),
        "cases": [case.model_dump(mode="json") for case in cases],
        "code": code_digest(Path(__file__).resolve().parent.parent),
        "versions": versions(),
        "processor": cpu_model(),
    }
    path = folder / CLAIM
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(mine), encoding="utf-8")
        aside.rename(path)
    theirs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if other := [name for name, value in mine.items() if theirs.get(name) != value]:
        raise ConfigurationError(
            "this folder holds something else than the beginning of this proof",
            got=f"--keep {folder}, " + (f"of another {' and '.join(other)}" if theirs else "without a proof"),
            rule="it is new or empty, or has what the same code gave for the same configuration on such a machine",
            remedy="name another folder, or delete this one",
        )


def run_cases(folder: Path, cases: Sequence[Case], start: Start, say: Say) -> dict[int, str]:
    """Run the cases that have no outcome yet, those of one number of ranks in the same processes; after a failure the
    rest in new ones.

    Returns:
        number of a case that did not run -> how it ended.
    """
    failures: dict[int, str] = {}
    for ranks, group in groupby(enumerate(cases), key=lambda item: item[1].ranks):
        waiting = _without_outcome(folder, group)
        while waiting:
            say(f"{ranks} rank{'s' * (ranks > 1)}: {len(waiting)} layout{'s' * (len(waiting) > 1)}")
            first = waiting[0][0]
            name = f"list-{first:03d}.json"
            listed = [[number, case.model_dump(mode="json")] for number, case in waiting]
            (folder / name).write_text(json.dumps(listed), encoding="utf-8")
            ended = start((RANK_MODULE, str(folder), name), ranks, folder / f"logs-{first:03d}")
            waiting = _without_outcome(folder, waiting)
            if waiting:
                failures[waiting[0][0]] = ended or "the ranks ended without an outcome"
                del waiting[0]
    return failures


def _without_outcome(folder: Path, cases: Iterable[tuple[int, Case]]) -> list[tuple[int, Case]]:
    return [(number, case) for number, case in cases if not (folder / f"case-{number:03d}.json").exists()]


def _verdict(case: Case, trial: Trial, found: Outcome | None, reference: Outcome, failure: str | None) -> Verdict:
    if found is None:
        return Verdict(case, "did not run", problem=failure)
    return compare(case, trial, found, reference)


def _certificate(
    config: Config, trial: Trial, ranks: int, reference: Outcome, verdicts: Sequence[Verdict]
) -> dict[str, Any]:
    values = flatten(config)
    counts = {name: sum(verdict.verdict == name for verdict in verdicts) for name in VERDICTS}
    fp32 = [verdict for verdict in verdicts if verdict.case.precision == "fp32"]
    worst = {}
    for measure in MEASURES:
        found = [value for verdict in fp32 if (value := getattr(verdict, measure)) is not None]
        worst[measure] = max(found, default=None)
    return {
        "schema_version": SCHEMA_VERSION,
        "claim": "all layouts train the same numbers",
        "holds": all(verdict.holds for verdict in verdicts),
        "config": {"name": config.run.name, "xxh3_128": config_digest(values)},
        "scaled": {key: {"from": before, "to": now} for key, (before, now) in trial.changed.items()},
        "rows": "drawn at random from run.seed, two documents each"
        + (f"; sources of {trial.source_tokens} tokens" if trial.source_tokens is not None else ""),
        "rate": f"optimizer.lr ({config.optimizer.lr:g}) from the first update on",
        "ranks": ranks,
        "reference": {"case": REFERENCE.model_dump(mode="json"), "losses": reference.losses, "norms": reference.norms},
        "bounds": {
            "fp32": f"loss, gradient norm, and of each tensor ||a - b|| / ||b||: {LOSS_BOUND['fp32']:g}",
            "bf16": f"loss: {LOSS_BOUND['bf16']:g}",
        },
        "machine": {"device": "cpu", "processor": cpu_model(), "threads": 1},
        "versions": versions(),
        "source": git_facts(),
        "command": shlex.join(["solomonov", *sys.argv[1:]]),
        "counts": counts,
        "worst_fp32": worst,
        "cases": [{**dataclasses.asdict(each), "case": each.case.model_dump(mode="json")} for each in verdicts],
    }


def config_digest(values: Mapping[str, Any]) -> str:
    """xxh3-128 of all resolved values of a configuration, by dotted key."""
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())


def lines(certificate: Mapping[str, Any]) -> Iterator[str]:
    """The certificate for people."""
    config, found = certificate["config"], certificate["versions"]
    yield f"config      {config['name']}, xxh3-128 {config['xxh3_128']}"
    scaled = (f"{key} {change['from']} -> {change['to']}" for key, change in certificate["scaled"].items())
    yield f"scaled      {', '.join(scaled) or 'nothing'}"
    yield f"rows        {certificate['rows']}; rate: {certificate['rate']}"
    machine = certificate["machine"]
    yield f"machine     {machine['processor']}, 1 thread a rank; torch {found['torch']}, deepspeed {found['deepspeed']}"
    yield f"source      {_source(certificate['source'])}"
    yield f"reference   {REFERENCE}: loss {' '.join(f'{loss:.6f}' for loss in certificate['reference']['losses'])}"
    for precision, bound in certificate["bounds"].items():
        yield f"bound {precision:<5} {bound}"
    yield ""
    yield from _table([_row(case) for case in certificate["cases"]])
    yield ""
    yield from _failures(certificate)
    worst = ", ".join(f"{name.replace('_', ' ')} {_number(value)}" for name, value in certificate["worst_fp32"].items())
    yield f"worst fp32  {worst}"
    yield f"verdict     {_outcome(certificate)}"


def page(certificate: Mapping[str, Any]) -> Iterator[str]:
    """The certificate as a page of Markdown: a row for the layouts that differ in accumulation and recomputation alone,
    with the largest difference among them."""
    config, machine, found = certificate["config"], certificate["machine"], certificate["versions"]
    yield f"# Layouts of `{config['name']}`: {_outcome(certificate)}"
    yield ""
    yield f"```console\n$ {certificate['command']}\n```"
    yield ""
    yield f"Each layout trains {STEPS} updates of the configuration, scaled down, and is compared with one rank that"
    yield "shares and accumulates nothing."
    yield ""
    yield f"- Source: {_source(certificate['source'])}."
    yield f"- Layouts: {certificate['layouts']}, on up to {certificate['ranks']} ranks."
    yield f"- Machine: {machine['processor']}, 1 thread a rank; torch {found['torch']}, deepspeed {found['deepspeed']}."
    yield f"- Rows: {certificate['rows']}; rate: {certificate['rate']}."
    for precision, bound in certificate["bounds"].items():
        yield f"- Bound in {precision}: {bound}."
    for key, change in certificate["scaled"].items():
        yield f"- `{key}`: {change['from']} scaled to {change['to']}."
    yield ""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for item in certificate["cases"]:
        groups.setdefault(tuple(item["case"][axis] for axis in AXES), []).append(item)
    rows = [_summary(axes, items) for axes, items in groups.items()]
    yield f"| {' | '.join(rows[0])} |"
    yield f"|{'---|' * len(rows[0])}"
    for row in sorted(rows, key=lambda row: row["precision"] != "fp32"):
        yield f"| {' | '.join(row.values())} |"
    failures = list(_failures(certificate))
    if failures:
        yield "\n".join(["", "```text", *failures, "```"])


AXES = ("ranks", "zero_stage", "pipeline", "sequence", "offload", "precision")
"""Of a case, those by which a page has its rows."""


def _summary(axes: Sequence[Any], items: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    ranks, zero_stage, stages, sequence, offload, precision = map(str, axes)
    row = {"ranks": ranks, "ZeRO": zero_stage, "stages": stages, "sequence": sequence, "offload": offload}
    row |= {"precision": precision, "layouts": str(len(items))}
    for name in MEASURES:
        differences = [item[name] for item in items if item[name] is not None]
        row[name.replace("_", " ")] = _number(max(differences, default=None))
    return row | {"verdict": max((item["verdict"] for item in items), key=VERDICTS.index)}


def _source(facts: Mapping[str, Any]) -> str:
    if not facts:
        return "no checkout"
    return f"commit {facts['commit']}" + (", changed since" if facts["changed"] else "")


def _outcome(certificate: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{count} {name}" for name, count in certificate["counts"].items() if count)
    return f"{'holds' if certificate['holds'] else 'does not hold'}: {counts}"


def _failures(certificate: Mapping[str, Any]) -> Iterator[str]:
    for item in certificate["cases"]:
        if item["verdict"] == "differs":
            yield f"differs     {Case.model_validate(item['case'])}: parts first in {item['parts']}"
        if item["verdict"] == "did not run":
            yield f"not run     {Case.model_validate(item['case'])}: {item['problem']}"


def _row(item: Mapping[str, Any]) -> dict[str, str]:
    case = Case.model_validate(item["case"])
    again = f"{case.recompute}/{case.every}" if case.every > 1 else case.recompute
    return {
        "ranks": str(case.ranks),
        "ZeRO": str(case.zero_stage),
        "stages": str(case.pipeline),
        "sequence": str(case.sequence),
        "offload": case.offload,
        "accum.": str(case.accumulation),
        "recompute": again,
        "precision": case.precision,
        **{name.replace("_", " "): _number(item[name]) for name in MEASURES},
        "verdict": item["verdict"],
    }


def _number(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"


def _table(rows: Sequence[Mapping[str, str]]) -> Iterator[str]:
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    for line in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def check_target(path: Path) -> None:
    """Refuse a file that could not be written, before anything is run.

    Raises:
        ConfigurationError: its folder is not there or cannot be written, or it is a folder itself.
    """
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise ConfigurationError(
            "the certificate cannot be written there",
            got=f"--to {path}",
            rule="a file in a folder that is there and can be written",
            remedy="make the folder, or name another file",
        )


def write(path: Path, certificate: Mapping[str, Any]) -> None:
    """Write the certificate: as a page where the name ends in .md, else as JSON, with a line a case."""
    if path.suffix == ".md":
        text = "\n".join(page(certificate)) + "\n"
    else:
        rest = json.dumps({key: value for key, value in certificate.items() if key != "cases"}, indent=1)
        cases = ",\n".join(f"  {json.dumps(item)}" for item in certificate["cases"])
        text = rest.removesuffix("\n}") + f',\n "cases": [\n{cases}\n ]\n}}\n'
    path.write_text(text, encoding="utf-8")
