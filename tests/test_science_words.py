"""The experiment on depth that is needed: a small run, read back, and its figures by hand-made records."""

from __future__ import annotations

import json
from collections import Counter
from functools import reduce
from itertools import permutations, product
from pathlib import Path

import pytest
import torch

from benchmarks.science import words
from benchmarks.science.tasks import Words
from benchmarks.science.words import Run, bound, model_of, summary, train


def test_a_model_learns_to_multiply_two_permutations_and_is_told_so() -> None:
    """Two elements of the group of 2 behind the beginning: what is learned in seconds."""
    found = train(Run("scaled", 2, 0, 0, items=2, letters="all", tokens=3, steps=150, lr=3e-3))
    assert found["finite"]
    assert found["all"] == found["last"] == 1.0
    none = train(Run("scaled", 2, 0, 0, items=4, letters="all", tokens=8, steps=5, lr=1e-5))
    assert none["last"] == pytest.approx(1 / 24, abs=0.05), "chance"


def test_shares_are_those_of_the_right_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that says what stands at its own place is right where what came before is together nothing."""
    monkeypatch.setattr(words, "fit", lambda *_, **__: [0.0])

    class Own(torch.nn.Module):
        def forward(self, ids: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(ids.long(), 7).float()

    monkeypatch.setattr(words, "Transformer", lambda *_, **__: Own())
    found = train(Run("scaled", 1, 2, 0, items=3, letters="all", tokens=8, steps=1, lr=1.0))
    ids, _, labels = Words(3, "all").batch(words.HELD_OUT_ROWS, 8, -1, 0)
    assert found["all"] == pytest.approx(float((ids == labels).float().mean()))
    assert found["last"] == pytest.approx(float((ids == labels)[:, 6:].float().mean()))
    assert found["places"] == pytest.approx((ids == labels).float().mean(dim=0).tolist(), abs=1e-4)
    assert found["all"] > found["last"], "right at the first element, of which there is none in the last quarter"


def test_two_letters_make_the_whole_group_and_what_is_guessed_is_what_is_counted() -> None:
    """Words of up to seven letters, all of them multiplied by hand: the share of the likeliest product."""
    task = Words(5)
    elements = list(permutations(range(5)))
    letters = [elements[at] for at in task.alphabet.tolist()]
    assert letters == [(1, 0, 2, 3, 4), (1, 2, 3, 4, 0)]
    for count in range(8):
        ends = Counter(
            reduce(lambda so_far, then: tuple(then[at] for at in so_far), word, elements[0])
            for word in product(letters, repeat=count)
        )
        assert task.guess(count) == pytest.approx(max(ends.values()) / 2**count)
    found, new = {0}, {0}
    while new:
        new = {int(task.products[state, letter]) for state in new for letter in task.alphabet} - found
        found |= new
    assert len(found) == 120
    ids = task.batch(64, 12, 0, 0)[0]
    assert set(ids[:, 1:].flatten().tolist()) == set(task.alphabet.tolist())
    four = Run("auto", 4, 2, 0, items=5, letters="two", tokens=13, steps=1, lr=1.0)
    assert bound(four) == pytest.approx((6 + sum(map(task.guess, range(1, 8)))) / 13)


def test_the_depth_and_the_form_are_those_asked_for() -> None:
    config = model_of(Run("deepnorm", 7, 3, 0, items=3, letters="all", tokens=8, steps=1, lr=1e-3))
    assert (config.layers, config.residual, config.attention.window_tokens) == (7, "deepnorm", 3)


def test_what_cannot_be_known_is_bounded_by_what_a_gradient_says_is_seen() -> None:
    """Which permutations the answer at the last place depends on, of a model that is not trained."""
    for layers, window in ((1, 2), (3, 2), (2, 3), (4, 0)):
        run = Run("prenorm", layers, window, 0, items=3, letters="all", tokens=9, steps=1, lr=1.0)
        model = words.Transformer(model_of(run), Words(3, "all").vocabulary, seed=0)
        ids, documents, _ = Words(3, "all").batch(1, 9, 0, 0)
        swapped = ids.repeat(9, 1)
        for place in range(9):
            swapped[place, place] = (ids[0, place] + 1) % 6
        with torch.no_grad():
            changed = (model(swapped, documents.repeat(9, 1)) - model(ids, documents))[:, -1].abs().amax(dim=1)
        known = min(9, int((changed > 0).sum()) + 1)
        assert bound(run) == pytest.approx((known + (9 - known) / 6) / 9)


@pytest.mark.spare
def test_medians_and_ranges_over_the_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {"mode": "scaled", "layers": 4, "window": 2, "bound": 0.5}
    records = [{**shape, "all": value, "last": 1 - value} for value in (0.1, 0.2, 0.6)]
    [row] = summary(records)
    assert row["all"] == {"median": 0.2, "min": 0.1, "max": 0.6}
    assert row["last"]["median"] == pytest.approx(0.8)
    out, picture = tmp_path / "words.json", tmp_path / "words.png"
    asked = ["--layers", "2", "1", "--modes", "scaled", "--windows", "2", "0", "--seeds", "1", "--items", "2"]
    asked += ["--letters", "all", "--tokens", "4", "--steps", "5", "--picture", str(picture)]
    assert words.main([*asked, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [(run["window"], run["layers"]) for run in result["runs"]] == [(2, 2), (2, 1), (0, 2), (0, 1)]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert result["chance"] == 0.5
    assert "chance 0.500" in capsys.readouterr().out
