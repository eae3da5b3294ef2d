"""Pieces on real DeepSpeed engines: they tile each parameter exactly once at every stage, they are the memory that
the optimizer updates, and after a refresh the forward uses what was written into them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from solomonov.model.transformer import Transformer
from solomonov.partition import base_optimizer, create_state, local_pieces, parameter_shape, refresh_parameters
from tests.support import tiny
from tests.support.ranks import run_ranks
from tests.support.tiny import Layout

pytestmark = pytest.mark.dist(world=2)
WORLD = 2
CASES = [
    *[Layout(zero_stage=stage) for stage in (0, 1, 2, 3)],
    Layout(zero_stage=1, precision="bf16"),
    Layout(zero_stage=3, precision="bf16", tied=True),
    Layout(zero_stage=2, offload="optimizer"),
    Layout(zero_stage=3, precision="bf16", offload="parameters"),
]


def plain_model(layout: Layout) -> Transformer:
    return Transformer(tiny.tiny_model(layout.tied), tiny.VOCAB, seed=tiny.SEED)


def other_model(layout: Layout) -> Transformer:
    """Weights four times larger than at the start: another loss by far."""
    model = Transformer(tiny.tiny_model(layout.tied), tiny.VOCAB, seed=99)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model


def described(layout: Layout) -> tuple[list[dict[str, Any]], dict[str, tuple[int, ...]]]:
    """This rank's pieces with their freshly made AdamW state, and the shapes of the whole parameters."""
    engine = tiny.make_engine(layout)
    create_state(engine._optimizer, 17)
    assert engine.updates_applied() == 17
    state = base_optimizer(engine._optimizer).state
    found = []
    for piece in local_pieces(engine._optimizer, engine.names):
        entry = state[piece.flat]
        moments = [piece.view(entry[kind]) for kind in ("exp_avg", "exp_avg_sq")]
        found.append(
            {
                "range": (piece.name, piece.shape, piece.start, piece.end),
                "step": float(entry["step"]),
                "on_cpu": entry["step"].device.type == "cpu",
                "zero": all(moment.numel() == piece.numel and not moment.any() for moment in moments),
                "shares": piece.view(piece.flat).data_ptr() - piece.flat.data_ptr() == 4 * piece.offset,
            }
        )
    return found, {name: parameter_shape(p) for p, name in engine.names.items()}


@pytest.mark.parametrize("layout", CASES, ids=str)
@pytest.mark.spare
def test_pieces_tile_each_parameter_exactly_once(layout: Layout) -> None:
    answers = run_ranks(described, WORLD, layout)
    shapes = {name: tuple(p.shape) for name, p in plain_model(layout).named_parameters()}
    assert [told for _, told in answers] == [shapes, shapes], "whole shapes, also where ZeRO 3 has taken the data away"
    by_rank = [[piece["range"] for piece in pieces] for pieces, _ in answers]
    # At stage 0 every rank holds everything; at the others the ranks together hold everything once.
    for ranges in by_rank if layout.zero_stage == 0 else [[*by_rank[0], *by_rank[1]]]:
        covered = {name: torch.zeros(torch.Size(shape).numel(), dtype=torch.int64) for name, shape in shapes.items()}
        for name, shape, start, end in ranges:
            assert shape == shapes[name]
            assert 0 <= start < end <= covered[name].numel()
            covered[name][start:end] += 1
        assert all(bool((count == 1).all()) for count in covered.values()), "an element is held never or twice"
    if layout.zero_stage:
        sizes = [sum(end - start for _, _, start, end in ranges) for ranges in by_rank]
        assert max(sizes) <= 1.1 * min(sizes), f"the ranks share unevenly: {sizes}"
    fresh = [
        {key: value for key, value in piece.items() if key != "range"} for pieces, _ in answers for piece in pieces
    ]
    assert all(piece == {"step": 17.0, "on_cpu": True, "zero": True, "shares": True} for piece in fresh)


def overwrite(layout: Layout) -> tuple[float, float, bool, list[float]]:
    """Write another model's weights into the masters and refresh: losses on all rows before and after."""
    engine = tiny.make_engine(layout)
    tiny.train(engine, 0, 1)  # DeepSpeed has all its state only after a first update
    rows = tiny.batch(9, list(range(tiny.ROWS)))
    before = engine.evaluate(rows)
    other = dict(other_model(layout).named_parameters())
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
@pytest.mark.spare
def test_after_a_refresh_the_forward_uses_what_was_written(layout: Layout) -> None:
    other = other_model(layout)
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
