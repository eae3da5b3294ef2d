"""The experiments of benchmarks/science: tasks with the floor they claim, small runs that show what large ones do."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest
import torch

from benchmarks.harness import BenchmarkError
from benchmarks.science import depth, depth_picture, reach
from benchmarks.science.depth import (
    WIDE,
    Run,
    first_share,
    idle,
    model_of,
    runs_of,
    setting_of,
    summary,
    train,
    unigram_nats,
)
from benchmarks.science.runs import schedule
from benchmarks.science.tasks import IGNORED, Copy, NoisyPermutation, Passkey, Recall, Text, Words, library_bytes
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
    assert [schedule(step, 2.0, 100, 10) for step in (0, 9, 50, 80, 90, 99)] == pytest.approx(
        [0.2, 2.0, 2.0, 2.0, 1.0, 0.1]
    )


@pytest.mark.spare
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


@pytest.mark.spare
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


@pytest.mark.spare
def test_an_experiment_goes_on_where_it_was_interrupted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "depth.json"
    words = ["--layers", "2", "--modes", "scaled", "--steps", "5", "--out", str(out)]
    assert depth.main([*words, "--seeds", "2"]) == 0
    first = json.loads(out.read_text())
    # What was trained is taken over as it stands, and known by all its fields.
    first["runs"][0] |= {"loss": 1.25, "commit": "before"}
    del first["runs"][1]
    out.write_text(json.dumps(first))
    with pytest.raises(BenchmarkError, match="--more"):
        depth.main([*words, "--seeds", "3"])
    assert depth.main([*words, "--seeds", "3", "--more"]) == 0
    then = json.loads(out.read_text())
    assert [(run["mode"], run["seed"]) for run in then["runs"]] == [
        (mode, seed) for mode in ("scaled", WIDE) for seed in range(3)
    ]
    assert then["runs"][0] == first["runs"][0]
    assert then["commits"] == sorted({"before", then["git_commit"]})
    assert {run["commit"] for run in then["runs"][1:]} == {then["git_commit"]}
    assert "0/3" not in capsys.readouterr().out


def test_a_run_that_is_not_finite_is_told_and_not_averaged() -> None:
    lost = train(Run("prenorm", 4, 1e30, 0, 5, 1))
    assert not lost["finite"]
    whole = train(Run("prenorm", 4, 1e-3, 1, 5, 1)) | {"lr": 1e30}
    [row] = summary([lost, whole | {"warmup": 1}])
    assert (row["seeds"], row["finite"], row["loss"]) == (2, 1, whole["loss"])
    assert "1/2" in depth.report([row], {})


def test_depth_is_asked_of_text_as_well() -> None:
    run = Run("scaled", 4, 1e-3, 0, 30, 5, task="text")
    assert model_of(run).d_model == 64
    assert 2.5 < train(run)["loss"] < setting_of("text").limits["uniform"], "of 256 bytes a hundred are used at all"
    text = library_bytes()[:1000]
    counts = Counter(text.tolist())
    assert unigram_nats(text) == pytest.approx(-sum(n / 1000 * math.log(n / 1000) for n in counts.values()))


def test_the_control_gets_the_arms_that_are_fair_to_it() -> None:
    asked = type(
        "Options",
        (),
        {"layers": [100], "modes": ["postnorm"], "lrs": [1e-3], "seeds": 1, "steps": 150, "task": "permutation"},
    )
    runs = runs_of(asked)  # type: ignore[arg-type]
    assert {(run.mode, run.lr, run.warmup, run.steps) for run in runs} == {
        ("postnorm", 1e-3, 20, 150),
        ("postnorm", 1e-4, 150, 1500),
        (WIDE, 1e-3, 20, 150),
    }


@pytest.mark.parametrize("tokens", [64, 65, 256])
def test_what_is_asked_can_be_found_in_the_row(tokens: int) -> None:
    for task in (Copy(), Recall(), Passkey()):
        ids, documents, labels = task.batch(8, tokens, 2, seed=1)
        assert ids.shape == documents.shape == labels.shape == (8, tokens)
        assert int(ids.max()) < task.vocabulary
        for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
            asked = [at for at in range(tokens) if wanted[at] != IGNORED]
            assert asked
            for at in asked:
                if isinstance(task, Recall):
                    pair = row.index(row[at])
                    assert pair < at
                    assert row[pair + 1] == wanted[at]
                elif isinstance(task, Passkey):
                    opened = row.index(256)
                    assert row[opened + 1 + at - asked[0]] == wanted[at]
                else:
                    assert wanted[at] == row[at + 1 - (tokens + 1) // 2]
        other = task.batch(8, tokens, 3, seed=1)[0]
        assert not torch.equal(ids, other)
        assert torch.equal(ids, task.batch(8, tokens, 2, seed=1)[0])


@pytest.mark.parametrize(("items", "letters"), [(2, "all"), (3, "all"), (5, "two"), (5, "all")])
def test_words_are_multiplied_as_permutations_are(items: int, letters: str) -> None:
    """Things are moved by hand, one permutation after the other."""
    task = Words(items, letters)
    elements = list(permutations(range(items)))
    assert task.vocabulary == 1 + task.elements == 1 + len(elements)
    ids, _, labels = task.batch(5, 12, 4, seed=0)
    for row, wanted in zip(ids.tolist(), labels.tolist(), strict=True):
        things = list(range(items))
        assert (row[0], tuple(things)) == (task.elements, elements[wanted[0]])
        for element, product in zip(row[1:], wanted[1:], strict=True):
            things = [elements[element][thing] for thing in things]
            assert tuple(things) == elements[product]
    assert not torch.equal(ids, task.batch(5, 12, 5, seed=0)[0])


def test_recall_has_as_many_pairs_at_any_length_and_no_key_twice() -> None:
    task = Recall()
    for tokens in (64, 100, 1000):
        ids, _, labels = task.batch(4, tokens, 0, seed=2)
        assert ((labels != IGNORED).sum(1) == task.asked).all()
        for row in ids.tolist():
            keys = [token for token in row if task.noise <= token < task.noise + task.keys]
            told, asked = keys[: task.pairs], keys[task.pairs :]
            assert len(set(told)) == len(told)
            assert set(asked) <= set(told)
            assert len(asked) == task.asked


def test_text_is_python_s_own_without_digits_and_what_is_held_out_is_not_trained_on() -> None:
    text = library_bytes()
    assert not ((text >= ord("0")) & (text <= ord("9"))).any()
    cut = len(text) * 9 // 10
    whole = bytes(text.tolist())
    for number, place in ((5, whole[:cut]), (-1, whole[cut:])):
        ids, _, labels = Text().batch(6, 200, number, seed=3)
        assert torch.equal(ids[:, 1:].long(), labels[:, :-1])
        assert all(bytes(row) in place for row in ids.tolist())


@pytest.mark.spare
@pytest.mark.parametrize("task", reach.TASKS)
def test_no_kind_of_attention_has_more_parameters_than_another(task: str) -> None:
    counts = [
        parameter_count(reach.model_of(reach.Run(task, kind, 0, 1)), reach.TASKS[task].vocabulary)
        for kind in reach.KINDS
    ]
    assert max(counts) - min(counts) < 0.005 * max(counts)


def test_the_same_bytes_of_text_are_asked_about_at_every_length() -> None:
    rows = [reach.rows_of(reach.Text(), times, 3) for times in reach.TIMES]
    for times, (ids, documents, labels) in zip(reach.TIMES, rows, strict=True):
        assert ids.shape == documents.shape == labels.shape == (16, times * reach.TOKENS)
        assert torch.equal(ids[:, -reach.TOKENS :], rows[0][0])
        assert torch.equal(labels[labels != IGNORED].view(16, -1), rows[0][2])
        assert torch.equal(labels[:, -reach.TOKENS : -1], ids[:, -reach.TOKENS + 1 :].long())


def test_reach_is_asked_at_every_length_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "reach.json"
    words = ["--tasks", "copy", "text", "--kinds", "rope", "windows only", "--seeds", "1", "--steps", "5"]
    words += ["--asked-rows", "16", "--picture", str(tmp_path / "reach.png")]
    assert reach.main([*words, "--out", str(out)]) == 0
    assert (tmp_path / "reach.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    assert [(run["task"], run["kind"]) for run in result["runs"]] == [
        (task, kind) for task in ("copy", "text") for kind in ("rope", "windows only")
    ]
    assert len({run["parameters"] for run in result["runs"] if run["task"] == "copy"}) == 1, "equal parameters"
    for row in result["summary"]:
        for times in ("1", "2", "4", "8"):
            assert row[times]["median"] == row[times]["min"] == row[times]["max"]
        assert row["kind"] in printed
    assert all(4.0 < run["found"]["1"] < 6.0 for run in result["runs"] if run["task"] == "text"), "ln 256 = 5.5"
