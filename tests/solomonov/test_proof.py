"""The proof of a run's records: true ones hold, and each kind of falsehood is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from solomonov.metrics import LOSS_BOUND
from solomonov.proof import prove_record
from solomonov.runfolder import RunFolder
from tests.support.runs import begin_run, prepared_user, write_record

Lines = list[dict[str, Any]]
LAYOUT = {"device": "cpu", "precision": "fp32", "world": 2}


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest) -> RunFolder:
    return begin_run(prepared_user(tmp_path / "work"), *getattr(request, "param", ()), ranks=2)


def write(path: Path, lines: Lines) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_true_record_holds(run: RunFolder) -> None:
    write_record(run, 12)
    proof = prove_record(run)
    assert proof.holds
    assert (proof.steps, proof.rows, proof.digests_equal) == (12, 96, 12)
    assert not proof.replayed


def test_a_line_that_is_being_written_is_not_one_yet(run: RunFolder) -> None:
    write_record(run, 12)
    with run.metrics.open("a") as file:
        file.write('{"step": 13, "lo')
    proof = prove_record(run)
    assert proof.holds
    assert proof.steps == 12


def test_the_rows_before_a_branch_are_the_other_run_s(run: RunFolder) -> None:
    lines = write_record(run, 12)
    run.journal.write("branched", step=5)
    write(run.metrics, lines[5:])
    proof = prove_record(run)
    assert proof.holds
    assert (proof.steps, proof.rows) == (7, 56)
    write(run.metrics, lines[6:])
    assert prove_record(run).lost == 8


@pytest.mark.parametrize(
    ("falsify", "what"),
    [
        (lambda lines: lines.pop(4), ("lost", 8)),
        (lambda lines: lines.pop(0), ("lost", 8)),
        (lambda lines: lines.insert(4, dict(lines[4])), ("repeated", 8)),
        (lambda lines: lines.__setitem__(4, dict(lines[5])), ("lost", 8)),
        (lambda lines: lines.__setitem__(4, dict(lines[5])), ("repeated", 8)),
        (lambda lines: lines[4].update(data_digest=lines[5]["data_digest"]), ("digests_equal", 11)),
        (lambda lines: lines[4].update(data_digest="0" * 16), ("digests_equal", 11)),
    ],
    ids=[
        "a step is missing",
        "the first step is missing",
        "a step stands twice",
        "a step stands in the place of another: lost",
        "a step stands in the place of another: repeated",
        "rows of another step",
        "rows of no step",
    ],
)
def test_a_false_record_does_not(run: RunFolder, falsify: Callable[[Lines], None], what: tuple[str, int]) -> None:
    lines = write_record(run, 12)
    falsify(lines)
    write(run.metrics, lines)
    proof = prove_record(run)
    assert not proof.holds
    assert getattr(proof, what[0]) == what[1]


def with_replay(run: RunFolder, layouts: tuple[dict[str, Any], dict[str, Any]], **before: Any) -> Lines:
    """A record whose steps 9 to 12 were trained twice; `before` is what stood in the first line of step 10."""
    lines = write_record(run, 14)
    first = [{**line, "attempt": 1} for line in lines[8:12]]
    first[1].update(before)
    write(run.metrics.with_suffix(".superseded.jsonl"), first)
    run.journal.write("resumed", attempt=1, step=0, layout=layouts[0])
    run.journal.write("kill_injected", rank=1, victim=1, step=12)
    run.journal.write("rank_exited", pid=1, signal="SIGKILL")
    run.journal.write("resumed", attempt=2, step=8, layout=layouts[1])
    return lines


def test_a_replay_at_the_same_layout_is_equal_to_the_bit(run: RunFolder) -> None:
    lines = with_replay(run, (LAYOUT, LAYOUT))
    proof = prove_record(run)
    assert proof.holds
    assert proof.exact
    assert proof.replayed == [9, 10, 11, 12]
    assert [(kill["rank"], kill["step"], kill["resumed"]) for kill in proof.kills] == [(1, 12, 8)]
    assert [column["step"] for column in proof.columns] == [9, 10, 11, 12]
    assert all(column["data_digest"] == column["order"] for column in proof.columns)
    assert all(column["before"] == column["after"] == lines[column["step"] - 1]["loss"] for column in proof.columns)


@pytest.mark.parametrize("change", [{"loss": 0.6000001}, {"data_digest": "0" * 16}, {"tokens": 1}])
def test_a_replay_that_differs_is_named(run: RunFolder, change: dict[str, Any]) -> None:
    lines = with_replay(run, (LAYOUT, LAYOUT), **change)
    proof = prove_record(run)
    assert not proof.holds
    [difference] = proof.differences
    assert difference.startswith(f"step 10: {next(iter(change))}")
    column = proof.columns[1]
    assert column["data_digest"] == column["order"] == lines[9]["data_digest"], "computed, not what stood there before"
    assert (column["before"], column["after"]) == (change.get("loss", lines[9]["loss"]), lines[9]["loss"])


def test_each_of_several_replays_is_compared(run: RunFolder) -> None:
    lines = with_replay(run, (LAYOUT, LAYOUT), loss=0.6000001)
    with run.metrics.with_suffix(".superseded.jsonl").open("a") as file:
        file.writelines(json.dumps({**line, "attempt": 2}) + "\n" for line in lines[8:12])
    proof = prove_record(run)
    assert not proof.holds, "the first of the two differs"
    assert len(proof.differences) == 1
    assert proof.replayed == [9, 10, 11, 12]
    assert [column["before"] for column in proof.columns] == [line["loss"] for line in lines[8:12]], "the last ones"


@pytest.mark.parametrize(("run", "exact"), [((), False), (("run.deterministic=true",), True)], indirect=["run"])
def test_on_a_gpu_a_replay_is_equal_to_the_bit_where_the_run_is_deterministic(run: RunFolder, exact: bool) -> None:
    layout = {**LAYOUT, "device": "cuda"}
    with_replay(run, (layout, layout), loss=0.6000001)
    proof = prove_record(run)
    assert proof.exact == exact
    assert proof.holds != exact


@pytest.mark.parametrize(("precision", "holds"), [("fp32", False), ("bf16", True)])
def test_the_bound_is_that_of_the_precision(run: RunFolder, precision: str, holds: bool) -> None:
    layout = {**LAYOUT, "precision": precision}
    with_replay(run, (layout, {**layout, "world": 1}), loss=0.6 * (1 + LOSS_BOUND["bf16"] / 2))
    assert prove_record(run).holds == holds


def test_a_kill_that_met_nobody_is_not_one(run: RunFolder) -> None:
    write_record(run, 3)
    run.journal.write("kill_injected", rank=1, victim=2, step=1)
    run.journal.write("rank_exited", pid=2, signal=None, exit_code=0)
    run.journal.write("resumed", attempt=2, step=0, layout=LAYOUT)
    assert prove_record(run).kills == []


def test_at_another_layout_the_bound_is_the_rule(run: RunFolder) -> None:
    with_replay(run, (LAYOUT, {**LAYOUT, "world": 1}), loss=0.6000001)
    proof = prove_record(run)
    assert proof.holds
    assert not proof.exact
