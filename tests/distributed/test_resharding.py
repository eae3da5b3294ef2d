"""A checkpoint of one layout loads in any other: the state's digest stays, and the next losses are the same.

At the same layout everything is equal to the bit; DeepSpeed's own restore of its own files is the second witness.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support import tiny
from tests.support.ranks import run_ranks
from tests.support.tiny import Layout

pytestmark = pytest.mark.dist

ZERO1 = Layout(zero_stage=1)
OFFLOADED = [
    *[Layout(zero_stage=stage, offload="optimizer") for stage in (1, 2, 3)],
    Layout(zero_stage=3, offload="parameters"),
]
TARGETS = [
    (1, Layout(zero_stage=0)),
    (1, Layout(zero_stage=3)),
    (2, Layout(zero_stage=0)),
    (2, Layout(zero_stage=2)),
    (2, Layout(zero_stage=3, accumulation=2)),
    (2, Layout(zero_stage=1, accumulation=2, pipeline=2)),
    (2, Layout(zero_stage=0, accumulation=2, pipeline=2)),
    (1, Layout(zero_stage=3, offload="parameters")),
    *[(2, layout) for layout in OFFLOADED],
]
SOURCES = [
    (1, Layout(zero_stage=0)),
    (2, Layout(zero_stage=0)),
    (2, Layout(zero_stage=3)),
    (2, Layout(zero_stage=1, accumulation=2, pipeline=2)),
    (2, Layout(zero_stage=0, accumulation=2, pipeline=2)),
    (1, Layout(zero_stage=1, offload="optimizer")),
    *[(2, layout) for layout in OFFLOADED],
]


def assert_same_rest(left: tiny.Outcome, right: tiny.Outcome, *, exact: bool) -> None:
    bound = 0.0 if exact else 1e-5
    torch.testing.assert_close(torch.tensor(left.losses), torch.tensor(right.losses), rtol=bound, atol=0)
    torch.testing.assert_close(torch.tensor(left.norms), torch.tensor(right.norms), rtol=bound, atol=0)
    for key, tensor in left.state.items():
        if exact:
            assert torch.equal(tensor, right.state[key]), f"{key} is not equal to the bit"
        else:
            distance = torch.linalg.vector_norm(tensor - right.state[key])
            assert distance <= bound * torch.linalg.vector_norm(right.state[key]), key


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("world", "target"), TARGETS, ids=[f"to-ranks{w}-{t}" for w, t in TARGETS])
def test_zero1_on_two_ranks_loads_anywhere(world: int, target: Layout, tmp_path: Path) -> None:
    saved, rest = run_ranks(tiny.run_and_save, 2, ZERO1, 3, tmp_path / "a")[0]
    restored, goes_on = run_ranks(tiny.restore_and_run, world, target, tmp_path / "a", tmp_path / "b")[0]
    assert goes_on.layout["offload"] == target.offload
    assert restored == saved
    assert_same_rest(goes_on, rest, exact=False)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("world", "source"), SOURCES, ids=[f"from-ranks{w}-{s}" for w, s in SOURCES])
def test_any_layout_loads_in_zero1_on_two_ranks(world: int, source: Layout, tmp_path: Path) -> None:
    saved, rest = run_ranks(tiny.run_and_save, world, source, 3, tmp_path / "a")[0]
    assert rest.layout["offload"] == source.offload
    restored, goes_on = run_ranks(tiny.restore_and_run, 2, ZERO1, tmp_path / "a", tmp_path / "b")[0]
    assert restored == saved
    assert_same_rest(goes_on, rest, exact=False)


SAME = [
    (1, Layout(zero_stage=0)),
    *[(2, Layout(zero_stage=stage, accumulation=2)) for stage in (0, 1, 2, 3)],
    (2, Layout(zero_stage=3, tied=True)),
    (1, Layout(zero_stage=1, precision="bf16")),
    (2, Layout(zero_stage=3, precision="bf16")),
    (2, Layout(zero_stage=1, accumulation=2, pipeline=2, tied=True)),
    (2, Layout(zero_stage=0, accumulation=2, pipeline=2, tied=True)),
    (4, Layout(zero_stage=0, accumulation=2, pipeline=2)),
    *[(2, replace(layout, accumulation=2)) for layout in OFFLOADED],
    (2, Layout(zero_stage=1, precision="bf16", offload="optimizer")),
    (2, Layout(zero_stage=3, precision="bf16", offload="parameters")),
    (2, Layout(zero_stage=1, accumulation=2, pipeline=2, tied=True, offload="optimizer")),
]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("world", "layout"), SAME, ids=[f"ranks{w}-{s}" for w, s in SAME])
def test_same_layout_goes_on_to_the_bit(world: int, layout: Layout, tmp_path: Path) -> None:
    results = run_ranks(tiny.run_and_save, world, layout, 3, tmp_path / "a")
    again = run_ranks(tiny.restore_and_run, world, layout, tmp_path / "a", tmp_path / "b")
    for (saved, rest), (restored, goes_on) in zip(results, again, strict=True):
        assert restored == saved
        assert_same_rest(goes_on, rest, exact=True)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("layout", [*[Layout(zero_stage=stage) for stage in (0, 1, 2, 3)], *OFFLOADED], ids=str)
def test_equals_deepspeeds_own_restore(layout: Layout, tmp_path: Path) -> None:
    """Restored by us and restored by DeepSpeed from its own files: the same state and the same next losses."""
    for ours, theirs in run_ranks(both_restores, 2, layout, tmp_path):
        assert ours.layout["offload"] == theirs.layout["offload"] == layout.offload
        assert_same_rest(ours, theirs, exact=True)


def both_restores(layout: Layout, folder: Path) -> tuple[tiny.Outcome, tiny.Outcome]:
    """Train, save both ways, restore both ways into new engines, train on."""
    engine = tiny.make_engine(layout)
    tiny.train(engine, 0, 3)
    tiny.save(engine, folder / "ours", 3)
    engine._ds.save_checkpoint(str(folder / "theirs"), tag="step3")
    _, ours = tiny.restore_and_run(layout, folder / "ours", folder / "again")
    other = tiny.make_engine(layout)
    other._ds.load_checkpoint(str(folder / "theirs"), tag="step3")
    losses, norms = tiny.train(other, 3, 5)
    return ours, tiny.Outcome(losses, norms, other.layout, tiny.whole_state(other))


def test_another_model_is_refused(tmp_path: Path) -> None:
    """A tied model's checkpoint does not fit an untied one; nothing of the engine is touched before."""
    run_ranks(tiny.run_and_save, 1, Layout(zero_stage=1, tied=True), 1, tmp_path)
    message = run_ranks(refused, 1, tmp_path)[0]
    assert "written by another model" in message
    assert "head.weight" in message


def refused(folder: Path) -> str:
    """The message of the refusal."""
    from solomonov.errors import ConfigurationError

    engine = tiny.make_engine(Layout(zero_stage=1))
    reader = tiny.checkpointer(folder).find()
    assert reader is not None, "no checkpoint was found"
    try:
        engine.restore(reader, 1)
    except ConfigurationError as error:
        return str(error)
    return ""
