"""Residual forms, with LayerNorm and GELU, in layouts that cut layers, rows or parameters, against one rank that has
all of them: the bounds are those of `test_engine`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from solomonov.model.residual import MODES, ResidualMode
from tests.distributed.test_engine import assert_equal_within
from tests.support import tiny
from tests.support.ranks import run_ranks
from tests.support.tiny import Layout

STEPS = 4
pytestmark = pytest.mark.dist

LAYOUTS = [
    (1, Layout(zero_stage=3, accumulation=2, recompute="selective")),
    (2, Layout(zero_stage=3)),
    (2, Layout(zero_stage=1, accumulation=2, pipeline=2, tied=True)),
    (2, Layout(zero_stage=1, accumulation=2, pipeline=2, recompute="selective")),
    (2, Layout(zero_stage=1, muon=True)),
]


@pytest.mark.sampled(9)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("world", "layout"), LAYOUTS, ids=[f"ranks{world}-{layout}" for world, layout in LAYOUTS])
def test_every_form_is_the_same_in_every_layout(world: int, layout: Layout, mode: ResidualMode) -> None:
    plain = Layout(zero_stage=0, tied=layout.tied, muon=layout.muon, residual=mode)
    [expected] = run_ranks(tiny.run, 1, plain, STEPS)
    for outcome in run_ranks(tiny.run, world, replace(layout, residual=mode), STEPS):
        assert (outcome.layout["pipeline"], outcome.layout["zero_stage"]) == (layout.pipeline, layout.zero_stage)
        assert_equal_within(outcome, expected, 1e-5)
