"""The coordinate check as an experiment: what is moved, by hand and by small models, and its rows by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.science import coordinates
from benchmarks.science.coordinates import Run, computed, model_of, report, summary, train
from solomonov.model.transformer import Transformer


def test_what_is_looked_at_is_the_stream_behind_the_last_block_and_the_logits() -> None:
    """Head and final norm, applied to the one by hand, give the other."""
    model = Transformer(model_of(Run("sp", "width", 32, 3, 0)), coordinates.TASK.symbols, seed=0)
    ids, documents, _ = coordinates.TASK.batch(2, 0, 0)
    found = computed(model, ids, documents)
    stream = found["stream"]
    assert stream.shape == (2, 16, 32)
    normed = stream / (stream.square().mean(-1, keepdim=True) + model.config.norm_eps).sqrt()
    torch.testing.assert_close(normed @ model.head.weight.T, found["logits"], rtol=1e-4, atol=1e-5)
    assert not model.layers[-1]._forward_hooks, "and nobody looks any more"


def test_width_and_depth_are_flat_where_they_are_said_to_be() -> None:
    """The experiment's claim, in small: 8 times as wide, 8 times as deep."""

    def grows(kind: str, width: int, depth: int, name: str) -> float:
        small, large = (train(Run(kind, "width", *size, 0)) for size in ((32, 4), (width, depth)))
        return float(large[name] / small[name])

    assert grows("sp", 256, 4, "stream") > 2.0
    assert 0.7 < grows("mup", 256, 4, "stream") < 1.4
    assert 0.7 < grows("completep", 256, 4, "stream") < 1.4
    assert grows("mup", 32, 32, "logits") > 1.8
    assert 0.7 < grows("completep", 32, 32, "logits") < 1.4


def test_nothing_moves_without_updates() -> None:
    found = train(Run("completep", "depth", 32, 2, 0, updates=0))
    assert found["stream"] == found["logits"] == 0.0


def test_rows_are_medians_by_size() -> None:
    def record(kind: str, grows: str, size: int, seed: int, moved: float) -> dict[str, object]:
        sizes = {"width": 32, "depth": 4, grows: size}
        return {"kind": kind, "grows": grows, **sizes, "seed": seed, "updates": 4, "lr": 1e-3} | {
            "stream": moved,
            "logits": 2 * moved,
        }

    records = [record("mup", "width", size, seed, 0.1 * size + seed) for size in (64, 8) for seed in (0, 1, 5)]
    records.insert(0, record("sp", "depth", 4, 0, 7.0))
    records.insert(0, record("sp", "width", 8, 0, 3.0))
    rows = summary(records)
    assert [(row["kind"], row["grows"], row["seeds"]) for row in rows] == [
        ("sp", "width", 1),
        ("mup", "width", 3),
        ("sp", "depth", 1),
    ]
    assert rows[1]["stream"]["medians"] == [[8, pytest.approx(1.8)], [64, pytest.approx(7.4)]]
    assert rows[1]["logits"]["medians"][1] == [64, pytest.approx(14.8)]
    assert rows[1]["stream"]["grows"] == pytest.approx(7.4 / 1.8)
    assert "by width" in report(rows)
    assert "7.4" in report(rows)


@pytest.mark.spare
def test_it_is_kept_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "found.json", tmp_path / "found.png"
    words = ["--widths", "32", "64", "--depths", "4", "8", "--seeds", "1"]
    assert coordinates.main([*words, "--out", str(out), "--picture", str(picture)]) == 0
    result = json.loads(out.read_text())
    assert len(result["runs"]) == 12
    assert [(row["kind"], row["grows"]) for row in result["summary"]] == [
        (kind, grows) for grows in ("width", "depth") for kind in ("sp", "mup", "completep")
    ]
    assert "moved by 4 updates, by depth" in capsys.readouterr().out
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
