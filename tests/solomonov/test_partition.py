"""Pieces on real DeepSpeed engines: they tile each parameter exactly once at every stage, they are the memory that
the optimizer updates, and after a refresh the forward uses what was written into them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from solomonov.model.transformer import Transformer
from solomonov.partition import base_optimizer, create_adamw_state, local_pieces, parameter_shape, refresh_parameters
from tests.support import tiny
from tests.support.ranks import run_ranks
from tests.support.tiny import Layout

pytestmark = pytest.mark.dist(world=2)
WORLD = 2
CASES = [
    *[Layout(zero_stage=stage) for stage in (0, 1, 2, 3)],
    Layout(zero_stage=1, precision="bf16"),
    Layout(zero_stage=3, precision="bf16", tied=True),
]


def described(layout: Layout) -> list[tuple[str, tuple[int, ...], int, int]]:
    engine = tiny.make_engine(layout)
    return [
        (piece.name, piece.shape, piece.start, piece.end) for piece in local_pieces(engine._optimizer, engine.names)
    ]


@pytest.mark.parametrize("layout", CASES, ids=str)
def test_pieces_tile_each_parameter_exactly_once(layout: Layout) -> None:
    by_rank = run_ranks(described, WORLD, layout)
    shapes = {name: tuple(p.shape) for name, p in plain_model(layout).named_parameters()}
    # At stage 0 every rank holds everything; at the others the ranks together hold everything once.
    for pieces in by_rank if layout.zero_stage == 0 else [sum(by_rank, [])]:
        covered = {name: torch.zeros(torch.Size(shape).numel(), dtype=torch.int64) for name, shape in shapes.items()}
        for name, shape, start, end in pieces:
            assert shape == shapes[name]
            assert 0 <= start < end <= covered[name].numel()
            covered[name][start:end] += 1
        assert all(bool((count == 1).all()) for count in covered.values()), "an element is held never or twice"
    if layout.zero_stage:
        sizes = [sum(end - start for _, _, start, end in pieces) for pieces in by_rank]
        assert max(sizes) <= 1.1 * min(sizes), f"the ranks share unevenly: {sizes}"


def plain_model(layout: Layout) -> Transformer:
    return Transformer(tiny.tiny_model(layout.tied), tiny.VOCAB, seed=tiny.SEED)


def overwrite(layout: Layout) -> tuple[float, float, bool, list[float]]:
    """Write another model's weights into the masters and refresh: losses on all rows before and after."""
    engine = tiny.make_engine(layout)
    tiny.train(engine, 0, 1)  # DeepSpeed has all its state only after a first update
    rows = tiny.batch(9, list(range(tiny.ROWS)))
    before = engine.evaluate(rows)
    other = dict(Transformer(tiny.tiny_model(layout.tied), tiny.VOCAB, seed=99).named_parameters())
    with torch.no_grad():
        for piece in local_pieces(engine._optimizer, engine.names):
            values = other[piece.name].detach().reshape(-1)[piece.start : piece.end]
            piece.view(piece.flat).copy_(values)
        refresh_parameters(engine._optimizer)
    after = engine.evaluate(rows)
    masters = tiny.whole_state(engine)
    equal = all(torch.equal(masters[name, "master"], value.detach().reshape(-1)) for name, value in other.items())
    return before, after, equal, tiny.train(engine, 1, 2)[0]


@pytest.mark.parametrize("layout", CASES, ids=str)
def test_after_a_refresh_the_forward_uses_what_was_written(layout: Layout) -> None:
    other = Transformer(tiny.tiny_model(layout.tied), tiny.VOCAB, seed=99)
    if layout.precision == "bf16":
        other = other.bfloat16()
    rows = tiny.batch(9, list(range(tiny.ROWS)))
    with torch.no_grad():
        expected = float(other(rows.input_ids, rows.document_ids, rows.labels))
    bound = 1e-6 if layout.precision == "fp32" else 1e-3
    for before, after, equal, losses in run_ranks(overwrite, WORLD, layout):
        assert after == pytest.approx(expected, rel=bound)
        assert abs(before - expected) > 10 * bound * expected, "the two models must differ for this to say anything"
        assert equal, "the masters are not what was written"
        assert all(loss == loss for loss in losses), "the engine does not train on"


def fresh_state(layout: Layout) -> list[dict[str, Any]]:
    """AdamW's state made before any update."""
    engine = tiny.make_engine(layout)
    create_adamw_state(engine._optimizer, 17)
    state = base_optimizer(engine._optimizer).state
    found = []
    for piece in local_pieces(engine._optimizer, engine.names):
        entry = state[piece.flat]
        moments = [piece.view(entry[kind]) for kind in ("exp_avg", "exp_avg_sq")]
        found.append(
            {
                "step": float(entry["step"]),
                "on_cpu": entry["step"].device.type == "cpu",
                "zero": all(moment.numel() == piece.numel and not moment.any() for moment in moments),
                "shares": piece.view(piece.flat).data_ptr() - piece.flat.data_ptr() == 4 * piece.offset,
            }
        )
    assert engine.updates_applied() == 17
    return found


@pytest.mark.parametrize("layout", CASES, ids=str)
def test_a_fresh_state_has_zeros_and_the_given_count(layout: Layout) -> None:
    for found in run_ranks(fresh_state, WORLD, layout):
        assert found
        assert all(entry == {"step": 17.0, "on_cpu": True, "zero": True, "shares": True} for entry in found)


def shape_in_engine(stage: int) -> bool:
    """Under ZeRO 3 a parameter has no data left between uses; its whole shape is still told."""
    engine = tiny.make_engine(Layout(zero_stage=stage))
    shapes = {name: tuple(p.shape) for name, p in plain_model(Layout()).named_parameters()}
    dist.barrier()
    return {name: parameter_shape(p) for p, name in engine.names.items()} == shapes


@pytest.mark.parametrize("stage", [1, 3])
def test_whole_shapes_are_told(stage: int) -> None:
    assert run_ranks(shape_in_engine, WORLD, stage) == [True, True]
