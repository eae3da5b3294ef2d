"""Which machines are measured together, and the measurement itself on real gloo ranks."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from solomonov.links import ALL_PAIRS_NODES, measure_all, measure_pair, rounds
from tests.support.ranks import run_ranks


@given(st.integers(1, ALL_PAIRS_NODES))
def test_up_to_a_limit_each_pair_of_machines_comes_once(nodes: int) -> None:
    pairs = [pair for part in rounds(nodes) for pair in part]
    assert sorted(pairs) == list(itertools.combinations(range(nodes), 2))


@given(st.integers(1, 5000))
def test_no_machine_is_in_two_pairs_of_a_round(nodes: int) -> None:
    for part in rounds(nodes):
        busy = [node for pair in part for node in pair]
        assert len(set(busy)) == len(busy)
        assert all(0 <= first < second < nodes for first, second in part)


@given(st.integers(ALL_PAIRS_NODES + 1, 5000))
def test_beyond_it_each_machine_is_measured_in_few_rounds(nodes: int) -> None:
    parts = rounds(nodes)
    assert len(parts) == (nodes - 1).bit_length()
    assert {node for part in parts for pair in part for node in pair} == set(range(nodes))


def measured(pair: tuple[int, int], rank: int | None = None) -> tuple[float | None, float]:
    import torch.distributed as dist

    device = torch.device("cpu")
    mine = measure_pair(pair, device) if dist.get_rank() in pair else None
    return mine, measure_all(device)


@pytest.mark.dist(world=3)
def test_a_pair_and_all_ranks() -> None:
    answers = run_ranks(measured, 3, (2, 0))
    assert [mine is not None for mine, _ in answers] == [True, False, True]
    assert all(mine is None or mine > 0.0 for mine, _ in answers)
    assert all(rate > 0.0 for _, rate in answers)
