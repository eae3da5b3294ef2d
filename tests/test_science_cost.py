"""The experiments on cost and on the transfer of learning rates: small runs, read back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.science import cost, transfer
from benchmarks.science.cost import QUICK, Choice, Rows, Trained, config_of, depths, measure, peak_bytes, report
from benchmarks.science.transfer import summary
from solomonov.model.config import Recompute
from solomonov.model.counts import parameter_count
from solomonov.model.residual import MODES


@pytest.mark.spare
def test_every_residual_form_and_preset_has_its_cost_beside_the_plain_one() -> None:
    result = measure(QUICK, "command")
    forms = [cost.PLAIN.title, *(mode for mode in MODES if mode != "prenorm")]
    forms += ["value residual", "stochastic depth, half the updates of the last block"]
    assert [row["title"] for row in result["residual"]] == [row["title"] for row in result["depth"]] == forms
    titles = [row["title"] for row in result["attention"]]
    assert {"vanilla", "alibi", "local", "hybrid", "sink"} < set(titles)
    for name in ("residual", "attention", "long rows", "depth"):
        plain = result[name][0]
        for row in result[name]:
            assert row["ratio_to_plain"]["median"] == pytest.approx(
                row["seconds"]["median"] / plain["seconds"]["median"], rel=1e-3
            ), "one round: the ratio of the medians"
            assert row["memory_mib"] > 0
    printed = report(result)
    assert all(title in printed for title in titles)


def test_memory_counts_what_is_kept_and_neither_parameters_nor_gradients() -> None:
    """A wide head of one layer: its parameters are a hundred times what a row of 4 tokens keeps."""
    narrow = Rows(layers=1, d_model=256, rows=1, tokens=4)
    config = config_of(Choice(""), narrow)
    largest = 4 * max(cost.VOCABULARY * 256, 256 * 512)  # the gradient of one matrix is on its way to where it is kept
    assert 0 < peak_bytes(config, narrow) < 2 * largest < 4 * parameter_count(config, cost.VOCABULARY)
    once, twice = (peak_bytes(config_of(Choice(""), rows), rows) for rows in (Rows(8, 32, 4, 64), Rows(8, 32, 8, 64)))
    assert 1.8 < twice / once < 2.05


@pytest.mark.spare
def test_recomputed_in_groups_memory_grows_as_the_root_of_depth() -> None:
    """32 blocks in groups of 4: 8 inputs and what 4 blocks keep, against what 32 keep."""
    size = Rows(layers=32, d_model=32, rows=4, tokens=64)
    kept = peak_bytes(config_of(cost.PLAIN, size), size)
    every = {each: peak_bytes(config_of(cost.PLAIN, size), size, Recompute("full", each)) for each in (1, 4, 16)}
    assert every[4] < every[16] < kept
    assert every[4] < 0.35 * kept
    found = cost.measure_recompute(QUICK.recompute)
    assert found["exponent"]["kept"] > 0.9
    assert found["exponent"]["recomputed"] < 0.65
    assert [row["layers"] for row in found["rows"]] == list(depths(64)) == [16, 64]


def test_a_step_trains() -> None:
    size = Rows(layers=1, d_model=32, rows=2, tokens=16)
    trained = Trained(config_of(cost.PLAIN, size), size)
    before = torch.cat([parameter.detach().flatten().clone() for parameter in trained.model.parameters()])
    assert trained.step() > 0
    after = torch.cat([parameter.detach().flatten() for parameter in trained.model.parameters()])
    assert not torch.equal(before, after)


def test_the_best_rate_of_each_depth_and_the_price_of_the_shallow_one() -> None:
    """By hand: two seeds, one of them not finite at the largest rate."""

    def record(layers: int, lr: float, seed: int, loss: float | None) -> dict[str, object]:
        fields = {"kind": "sp", "layers": layers, "lr": lr, "seed": seed, "steps": 9}
        return {**fields, "loss": loss, "finite": loss is not None}

    records = [record(6, 1.0, 0, 3.0), record(6, 1.0, 1, 4.0), record(6, 2.0, 0, 2.0), record(6, 2.0, 1, 3.0)]
    records += [record(24, 1.0, 0, 1.0), record(24, 1.0, 1, 1.5), record(24, 2.0, 0, 2.0), record(24, 2.0, 1, None)]
    shallow, deep = summary(records)
    assert (shallow["best"], shallow["off_by"], shallow["price"]) == (2.0, 1.0, 0.0)
    assert shallow["losses"] == [[1.0, 3.5], [2.0, 2.5]]
    assert (deep["best"], deep["off_by"], deep["price"]) == (1.0, 0.5, None)
    assert deep["losses"] == [[1.0, 1.25], [2.0, None]]
    assert "nan" in transfer.report([shallow, deep], {})


@pytest.mark.parametrize(("task", "symbols"), [("permutation", 64), ("text", 256)])
@pytest.mark.spare
def test_the_sweep_is_kept_and_drawn(
    task: str, symbols: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "transfer.json", tmp_path / "transfer.png"
    words = ["--layers", "2", "4", "--rates", "0.001", "0.01", "--seeds", "1", "--steps", "10", "--task", task]
    assert transfer.main([*words, "--out", str(out), "--picture", str(picture)]) == 0
    result = json.loads(out.read_text())
    assert len(result["runs"]) == 8
    assert [(row["kind"], row["layers"]) for row in result["summary"]] == [
        ("sp", 2), ("sp", 4), ("completep", 2), ("completep", 4),
    ]  # fmt: skip
    printed = capsys.readouterr().out
    for row in result["summary"]:
        assert all(0.7 < loss < 6.0 for _, loss in row["losses"])
        assert f"{row['kind']:10s}" in printed
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert {run["task"] for run in result["runs"]} == {task}
    assert math.isclose(result["limits"]["uniform"], math.log(symbols))
