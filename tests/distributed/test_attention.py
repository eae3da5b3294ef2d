"""Attention of other kinds than rope in layouts that cut layers, rows, heads or parameters, against one rank that has
all of them: the bounds are those of `test_engine`."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from tests.distributed.test_engine import assert_equal_within
from tests.support import tiny
from tests.support.ranks import run_ranks
from tests.support.tiny import Layout, Outcome

STEPS = 4
pytestmark = [pytest.mark.dist, pytest.mark.spare]

LAYOUTS = [
    (1, Layout(zero_stage=3, accumulation=2)),
    (2, Layout(zero_stage=1, sequence=2)),
    (2, Layout(zero_stage=3, sequence=2, recompute="selective")),
    (2, Layout(zero_stage=1, accumulation=2, pipeline=2)),
    (2, Layout(zero_stage=1, accumulation=2, pipeline=2, tied=True, recompute="selective")),
    (4, Layout(zero_stage=1, sequence=4)),
]


@cache
def alone(attention: str, tied: bool) -> Outcome:
    """One rank that keeps everything."""
    [outcome] = run_ranks(tiny.run, 1, Layout(zero_stage=0, attention=attention, tied=tied), STEPS)
    return outcome


@pytest.mark.sampled(6)
@pytest.mark.parametrize("attention", ["vanilla", "hybrid", "alibi", "learned"])
@pytest.mark.parametrize(("world", "layout"), LAYOUTS, ids=[f"ranks{world}-{layout}" for world, layout in LAYOUTS])
def test_every_kind_of_attention_is_the_same_in_every_layout(world: int, layout: Layout, attention: str) -> None:
    expected = alone(attention, layout.tied)
    for outcome in run_ranks(tiny.run, world, replace(layout, attention=attention), STEPS):
        assert (outcome.layout["pipeline"], outcome.layout["zero_stage"]) == (layout.pipeline, layout.zero_stage)
        assert_equal_within(outcome, expected, 1e-5)
