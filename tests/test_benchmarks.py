"""The benchmarks run as commands: what they deliver is right and what they write is whole; no figure is judged."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.layouts_rank import Row
from benchmarks.stream import QUICK
from benchmarks.stream_rank import BATCH_ROWS
from tests.support.processes import ROOT, assert_no_process, program_environment, run_program

COMMITTED = ROOT / "benchmarks/results/stream-cpu.json"
COMMITTED_LAYOUTS = ROOT / "benchmarks/results/layouts-cpu.json"
OFFLOADED = ((1, "optimizer"), (3, "parameters"))
OPTIMIZERS = ("AdamW", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3")
"""By ZeRO stage."""


@pytest.fixture(scope="module")
def short_folder() -> Iterator[Path]:
    """A folder for temporary ones: Ray's sockets beneath want a short path, and its name tells our processes."""
    folder = Path(tempfile.mkdtemp(prefix="b-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def stream_run(short_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Result and output of a small run."""
    folder = tmp_path_factory.mktemp("benchmark")
    code, output = run_program(
        [sys.executable, "-m", "benchmarks.stream", "--quick", "--out", folder / "result.json"],
        log=folder / "log",
        deadline=240,
        cwd=ROOT,
        env=program_environment(TMPDIR=str(short_folder)),
    )
    assert code == 0, output
    return json.loads((folder / "result.json").read_bytes()), output


def keys(value: Any, where: str = "") -> set[str]:
    """The paths of all values; of a list, those of its first entry."""
    if isinstance(value, dict):
        return {path for key, each in value.items() for path in keys(each, f"{where}/{key}")}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return keys(value[0], f"{where}/0")
    return {where}


def found(value: Any, key: str) -> Iterator[Any]:
    """All values under a key, at any depth."""
    if isinstance(value, dict):
        for name, each in value.items():
            if name == key:
                yield each
            yield from found(each, key)
    elif isinstance(value, list):
        for each in value:
            yield from found(each, key)


def committed_like(result: dict[str, Any], path: Path) -> dict[str, Any]:
    """The committed result of a benchmark, which has all that this one of now has, and is of the whole benchmark."""
    committed: dict[str, Any] = json.loads(path.read_bytes())
    assert keys(committed) == keys(result), "run the benchmark again, as its `command` says, and commit its result"
    assert "--quick" not in committed["command"]
    return committed


@pytest.mark.ray
@pytest.mark.e2e
@pytest.mark.spare
def test_stream_delivers_the_same_rows_inline_and_from_workers(stream_run: tuple[dict[str, Any], str]) -> None:
    result, _ = stream_run
    for part in ("throughput", "first_row", "rank"):
        digests = {digest for each in result[part].values() for digest in each["digests"]}
        assert len(digests) == 1, f"{part}: {digests}"
        assert all(int(digest, 16) for digest in digests), f"{part}: {digests} is the digest of nothing"
    for name, each in result["throughput"].items():
        assert each["rows"] == [QUICK.steps * BATCH_ROWS] * QUICK.rounds, name
        assert not each["rows_inline"], f"{name}: rows were built by the rank itself"


@pytest.mark.ray
@pytest.mark.e2e
@pytest.mark.spare
def test_stream_replies_are_large_and_bounded(stream_run: tuple[dict[str, Any], str]) -> None:
    result, _ = stream_run
    assert result["throughput"]["inline"]["reply_mib"] is None
    for name in ("ray-1", "ray-2"):
        replies = result["throughput"][name]["reply_mib"]
        assert replies["count"] > 0, name
        assert 0 < replies["min"] <= replies["median"] <= replies["max"] <= 4, f"{name}: {replies}"


@pytest.mark.ray
@pytest.mark.e2e
@pytest.mark.spare
def test_stream_meets_the_faults_that_it_makes_and_no_others(stream_run: tuple[dict[str, Any], str]) -> None:
    result, _ = stream_run
    unexpected = list(found(result, "unexpected"))
    assert len(unexpected) == 3 + 3 + 2 + 2 + 1, "every part says what befell it"
    assert not any(unexpected), unexpected
    (suffered,) = result["faults"]
    assert suffered["rows_inline"] == 0
    assert "died" in suffered["faults"]["SIGKILL"]["causes"]
    assert "frozen" in suffered["faults"]["SIGSTOP"]["causes"]


@pytest.mark.ray
@pytest.mark.e2e
@pytest.mark.spare
def test_stream_shows_what_it_wrote_and_leaves_nothing(
    stream_run: tuple[dict[str, Any], str], short_folder: Path
) -> None:
    result, output = stream_run
    assert result["command"].startswith("python -m benchmarks.stream --quick")
    assert {"cpu", "cores", "python", "ray", "torch", "numpy"} <= result["machine"].keys()
    for title in ("throughput", "hiding", "first row", "rank", "faults"):
        assert f"\n{title}" in output, f"no table of {title}"
    assert_no_process(str(short_folder))
    assert not list(short_folder.glob("sol-*")), "temporary folders are left"


@pytest.mark.ray
@pytest.mark.e2e
@pytest.mark.spare
def test_committed_stream_result_is_of_this_benchmark(stream_run: tuple[dict[str, Any], str]) -> None:
    result, _ = stream_run
    committed = committed_like(result, COMMITTED)
    assert not any(found(committed, "unexpected"))


@pytest.fixture(scope="module")
def layouts_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Result and output of a small run; that there is one shows that every layout ran and trained the same losses."""
    folder = tmp_path_factory.mktemp("layouts")
    code, output = run_program(
        [sys.executable, "-m", "benchmarks.layouts", "--quick", "--out", folder / "result.json"],
        log=folder / "log",
        deadline=270,
        cwd=ROOT,
        env=program_environment(TMPDIR=str(folder)),
    )
    assert code == 0, output
    assert not list(folder.glob("sol-*")), "temporary folders are left"
    assert_no_process(str(folder))
    return json.loads((folder / "result.json").read_bytes()), output


@pytest.mark.dist
@pytest.mark.e2e
@pytest.mark.spare
def test_layouts_ran_as_they_are_called(layouts_run: tuple[dict[str, Any], str]) -> None:
    result, output = layouts_run
    rows = {(row["ranks"], row["title"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]), "no row is there twice"
    for ranks, title in (
        *((ranks, f"ZeRO {stage}") for ranks in (1, 2) for stage in (0, 1, 2, 3)),
        *((ranks, f"ZeRO {number}, offload {what}") for ranks in (1, 2) for number, what in OFFLOADED),
        (2, "pipeline 2, ZeRO 1"),
        (4, "pipeline 2 x data 2, ZeRO 1"),
        *((1, f"ZeRO 0, recompute {mode}") for mode in ("selective", "full")),
        *((1, f"plain loop, recompute {mode}") for mode in ("selective", "full")),
        *((ranks, "plain loop" if ranks == 1 else "plain loop, DDP") for ranks in (1, 2, 4)),
    ):
        row = rows[ranks, title]
        assert row["ran"]["pipeline"] == (2 if "pipeline" in title else 1)
        stage = None if "plain" in title else int(title.partition("ZeRO ")[2][0])
        assert row["ran"]["zero_stage"] == stage
        assert row["ran"]["optimizer"] == OPTIMIZERS[stage or 0]
        assert row["loss_difference"] <= 1e-5
        assert title in output, f"{title} is not shown"
    assert result["deepspeed_overhead"].keys() == {"1", "2", "4"}


@pytest.mark.dist
@pytest.mark.e2e
@pytest.mark.spare
def test_layouts_measure_memory_beside_what_is_foreseen(layouts_run: tuple[dict[str, Any], str]) -> None:
    """The bounds of `test_footprint`, doubled: the model here is so small that batches and masks count."""
    for row in layouts_run[0]["rows"]:
        assert row["measured_mib"] > 0
        if row["foreseen_mib"] is not None:
            assert 0.5 <= row["foreseen_mib"] / row["measured_mib"] <= 1.5, row["title"]


def test_a_row_is_named_by_what_differs() -> None:
    assert Row(plain=True).title == "plain loop"
    assert Row(ranks=4, zero_stage=1, pipeline=2).title == "pipeline 2 x data 2, ZeRO 1"
    assert Row(zero_stage=3, offload="parameters", recompute="full").title == (
        "ZeRO 3, offload parameters, recompute full"
    )


@pytest.mark.dist
@pytest.mark.e2e
@pytest.mark.spare
def test_committed_layouts_result_is_of_this_benchmark(layouts_run: tuple[dict[str, Any], str]) -> None:
    result, _ = layouts_run
    committed = committed_like(result, COMMITTED_LAYOUTS)
    assert [(row["ranks"], row["title"]) for row in committed["rows"]] == [
        (row["ranks"], row["title"]) for row in result["rows"]
    ]
