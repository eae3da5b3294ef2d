"""Cuts against all possible cuts, and grids of up to 4,096 ranks against what they promise."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solomonov.model.config import ModelConfig
from solomonov.topology import Place, balanced_cut, rank_grid, stage_bounds


def dearest(costs: list[int], bounds: tuple[int, ...]) -> int:
    return max(sum(costs[a:b]) for a, b in pairwise(bounds))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.data())
def test_no_cut_is_better(costs: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    bounds = balanced_cut(costs, stages)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, len(costs), stages + 1)
    assert all(a < b for a, b in pairwise(bounds)), "no stage is empty"
    inner = combinations(range(1, len(costs)), stages - 1)
    assert dearest(costs, bounds) == min(dearest(costs, (0, *cuts, len(costs))) for cuts in inner)


def test_of_equal_cuts_the_last_stages_are_the_fullest() -> None:
    assert balanced_cut([1] * 7, 3) == (0, 1, 4, 7)


def test_a_thousand_blocks_on_four_stages() -> None:
    """An embedding without cost, blocks, a norm without cost, a head as dear as two blocks."""
    bounds = balanced_cut([0, *[10] * 1000, 0, 20], 4)
    assert [b - a for a, b in pairwise(bounds)] == [250, 251, 251, 251]


def test_a_large_vocabulary_weighs_at_the_end_and_not_at_the_start() -> None:
    """Its head costs as much as several blocks, its embedding nothing."""
    model = ModelConfig(layers=12, d_model=64, heads=4, d_ff=128)
    block = 2 * (4 * 64 * 64 + 3 * 64 * 128) + 2 * 64 * 129
    vocab_size = 4 * block // (2 * 64)
    assert stage_bounds(model, vocab_size, 128, 4) == (0, 5, 9, 13, 15), "4 + 4 + 4 blocks, then norm and head"


@pytest.mark.parametrize(("source", "cut"), [(8, 8), (128, 7), (1280, 3)])
def test_a_long_source_moves_the_cut_into_the_encoder(source: int, cut: int) -> None:
    """Costs by hand, without a head to speak of: of few tokens of a source the encoder costs next to nothing."""
    width, inner, tokens = 64, 128, 128
    model = ModelConfig(architecture="encoder_decoder", layers=4, encoder_layers=4, d_model=width, heads=4, d_ff=inner)
    share, square = source / tokens, 2 * width**2
    of_encoder = share * (4 * square + 6 * width * inner + 4 * width * source)
    seen = (tokens + 1) / 2 + source
    of_decoder = (6 + 2 * share) * square + 6 * width * inner + 4 * width * seen
    costs = [0, *[round(of_encoder)] * 4, 0, *[round(of_decoder)] * 4, 0, 4 * width]
    assert stage_bounds(model, 2, tokens, 2, source) == balanced_cut(costs, 2) == (0, cut, 12)


def places(nodes: int, devices: int) -> list[Place]:
    return [Place(node, device) for node in range(nodes) for device in range(devices)]


def nodes_of(grid_places: list[Place], ranks: list[int]) -> list[int]:
    return [grid_places[rank].node for rank in ranks]


@pytest.mark.parametrize(("pipeline", "machines"), [(1, 1), (2, 1), (8, 1), (16, 2), (64, 8), (4096, 512)])
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_replica_spans_as_few_machines_as_can_be(pipeline: int, machines: int, shuffled: bool) -> None:
    """512 machines with 8 devices each, numbered by machine or at random."""
    all_places = places(512, 8)
    if shuffled:
        random.Random(3).shuffle(all_places)
    grid = rank_grid(all_places, pipeline)
    assert sorted(rank for stage in grid.stages for rank in stage) == list(range(4096))
    assert len(grid.stages) == pipeline
    for replica in zip(*grid.stages, strict=True):
        nodes = nodes_of(all_places, list(replica))
        assert len(set(nodes)) == machines
        assert sum(a != b for a, b in pairwise(nodes)) == machines - 1, "a machine is left once"


def test_machines_of_unequal_size_keep_their_replicas_whole() -> None:
    """3 + 5 + 4 devices, pipelines of 4: one on each of the larger machines, one from what is left."""
    uneven = [Place(node, device) for node, count in ((0, 3), (1, 5), (2, 4)) for device in range(count)]
    grid = rank_grid(uneven, 4)
    spans = sorted(nodes_of(uneven, list(replica)) for replica in zip(*grid.stages, strict=True))
    assert spans == [[0, 0, 0, 1], [1] * 4, [2] * 4]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=24), st.data())
def test_every_rank_has_one_coordinate(pairs: list[tuple[str, int]], data: st.DataObject) -> None:
    divisors = [n for n in range(1, len(pairs) + 1) if len(pairs) % n == 0]
    pipeline = data.draw(st.sampled_from(divisors))
    coordinates = rank_grid([Place(*pair) for pair in pairs], pipeline).coordinates()
    assert sorted(coordinates) == list(range(len(pairs)))
    expected = {(s, r) for s in range(pipeline) for r in range(len(pairs) // pipeline)}
    assert set(coordinates.values()) == expected
