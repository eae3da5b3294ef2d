"""The experiments of benchmarks/science: tasks with the floor they claim, small runs that show what large ones do."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.science import depth, depth_picture
from benchmarks.science.depth import WIDE, Run, first_share, idle, model_of, runs_of, schedule, summary, train
from benchmarks.science.tasks import NoisyPermutation
from solomonov.model.counts import parameter_count


def test_the_permutation_has_the_floor_it_claims() -> None:
    """Of all pairs of neighbours, in 200,000 tokens: entropy of the next symbol given this one, counted."""
    task = NoisyPermutation(symbols=8, keep=0.7, tokens=200)
    ids, documents, labels = task.batch(1000, 3, seed=5)
    assert torch.equal(ids[:, 1:].long(), labels[:, :-1].long())
    assert not documents.any()
    pairs = torch.zeros(8, 8, dtype=torch.float64)
    pairs.index_put_((ids.flatten().long(), labels.flatten().long()), torch.tensor(1.0).double(), accumulate=True)
    rows = pairs / pairs.sum(1, keepdim=True)
    entropy = float(-(rows * rows.log()).sum(1) @ (pairs.sum(1) / pairs.sum()))
    assert entropy == pytest.approx(task.floor, abs=0.005)
    assert task.uniform == pytest.approx(math.log(8))
    assert not torch.equal(task.batch(4, 0, 1)[0], task.batch(4, 1, 1)[0])
    assert torch.equal(task.batch(4, 0, 1)[0], task.batch(4, 0, 1)[0])


def test_the_wide_model_has_the_parameters_of_the_deep_one() -> None:
    for layers in (24, 100):
        deep = parameter_count(model_of(Run("scaled", layers, 1e-3, 0, 1, 1)), 64)
        wide = model_of(Run(WIDE, layers, 1e-3, 0, 1, 1))
        assert wide.layers == 2
        assert 1.0 <= parameter_count(wide, 64) / deep < 1.35


def test_the_rate_rises_stays_and_falls() -> None:
    run = Run("scaled", 24, 2.0, 0, 100, 10)
    assert [schedule(step, run) for step in (0, 9, 50, 80, 90, 99)] == pytest.approx([0.2, 2.0, 2.0, 2.0, 1.0, 0.1])


def test_a_hundred_layers_train_with_every_eighth_alive_and_post_norm_does_not() -> None:
    """40 updates of the large experiment: its numbers in the same order, and the dead path of the control."""
    scaled, control = (train(Run(mode, 100, 1e-3, 0, 40, 20)) for mode in ("scaled", "postnorm"))
    assert scaled["finite"]
    assert scaled["loss"] < 3.0
    assert control.get("loss", 99.0) > 4.0
    assert 0.5 < scaled["gradient_ratio"] < 2.0
    assert control["gradient_ratio"] > 1000.0
    assert idle(scaled) == 0
    assert first_share(scaled) < 0.3


def test_an_experiment_is_reported_kept_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "depth.json"
    words = ["--layers", "2", "--modes", "scaled", "rezero", "--seeds", "2", "--steps", "5", "--out", str(out)]
    assert depth.main(words) == 0
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert len(result["runs"]) == 6
    assert {row["mode"] for row in result["summary"]} == {"scaled", "rezero", WIDE}
    for row in result["summary"]:
        runs = [run for run in result["runs"] if run["mode"] == row["mode"]]
        assert [run["seed"] for run in runs] == [0, 1]
        assert row["loss"] == pytest.approx(sum(run["loss"] for run in runs) / 2)
        assert row["loss_range"] == [min(run["loss"] for run in runs), max(run["loss"] for run in runs)]
        assert f"{row['loss']:.2f}" in printed
    picture = tmp_path / "depth.png"
    assert depth_picture.main([str(out), str(picture)]) == 0
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_run_that_is_not_finite_is_told_and_not_averaged() -> None:
    lost = train(Run("prenorm", 4, 1e30, 0, 5, 1))
    assert not lost["finite"]
    whole = train(Run("prenorm", 4, 1e-3, 1, 5, 1)) | {"lr": 1e30}
    [row] = summary([lost, whole | {"warmup": 1}])
    assert (row["seeds"], row["finite"], row["loss"]) == (2, 1, whole["loss"])
    assert "1/2" in depth.report([row])


def test_the_control_gets_the_arms_that_are_fair_to_it() -> None:
    asked = type("Options", (), {"layers": [100], "modes": ["postnorm"], "lrs": [1e-3], "seeds": 1, "steps": 150})
    runs = runs_of(asked)  # type: ignore[arg-type]
    assert {(run.mode, run.lr, run.warmup, run.steps) for run in runs} == {
        ("postnorm", 1e-3, 20, 150),
        ("postnorm", 1e-4, 150, 1500),
        (WIDE, 1e-3, 20, 150),
    }
