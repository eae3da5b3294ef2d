"""The least share of lines and branches that the whole suite must run, one floor for each package."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import coverage

FLOORS = {
    "launcher": 95.0,
    "data_pipeline": 95.0,
    "solomonov": 90.0,
}  # per cent of lines and branches together


def shares(report: dict[str, dict[str, dict[str, dict[str, int]]]]) -> dict[str, float]:
    """Per cent of lines and branches that ran, by package, from coverage's JSON report; 0 without files."""
    ran, all_ = dict.fromkeys(FLOORS, 0), dict.fromkeys(FLOORS, 0)
    for name, file in report["files"].items():
        package = Path(name).parts[0]
        summary = file["summary"]
        ran[package] += summary["covered_lines"] + summary["covered_branches"]
        all_[package] += summary["num_statements"] + summary["num_branches"]
    return {package: 100.0 * ran[package] / all_[package] if all_[package] else 0.0 for package in FLOORS}


def weakest(report: dict[str, dict[str, dict[str, dict[str, int]]]], count: int) -> list[tuple[str, int, float]]:
    """The files with the most lines and branches that did not run: name, how many, per cent that ran."""
    rows = []
    for name, file in report["files"].items():
        summary = file["summary"]
        total = summary["num_statements"] + summary["num_branches"]
        ran = summary["covered_lines"] + summary["covered_branches"]
        rows.append((name, total - ran, 100.0 * ran / total if total else 100.0))
    return sorted(rows, key=lambda row: -row[1])[:count]


def measure_and_check() -> tuple[list[str], bool]:
    """Ends the running measurement and joins it with the children's: (lines to print, floors held)."""
    running = coverage.Coverage.current()
    if running is None:
        return ["--coverage-floors: start pytest with `coverage run -m pytest`"], False
    running.stop()
    running.save()
    with tempfile.TemporaryDirectory() as folder:
        joined = coverage.Coverage(data_file=str(Path(folder) / "joined"))
        joined.combine([str(path) for path in Path.cwd().glob(".coverage.*")], keep=True)
        outfile = Path(folder) / "report.json"
        joined.json_report(outfile=str(outfile))
        report = json.loads(outfile.read_text(encoding="utf-8"))
    lines, held = [], True
    for package, share in shares(report).items():
        floor = FLOORS[package]
        held = held and share >= floor
        verdict = "" if share >= floor else "   BELOW THE FLOOR"
        lines.append(f"{package:14} {share:6.2f} %   floor {floor:g} %{verdict}")
    lines.append("most lines and branches that did not run:")
    lines += [f"  {missed:5}  {share:6.2f} %  {name}" for name, missed, share in weakest(report, 10)]
    return lines, held
