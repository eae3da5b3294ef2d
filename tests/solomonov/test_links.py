"""Which machines are measured together, and the measurement itself on real gloo ranks."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from solomonov import links
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


def measured(pair: tuple[int, int]) -> tuple[float | None, float]:
    device = torch.device("cpu")
    all_ranks = measure_all(device)
    others = set(pair) - {dist.get_rank()}
    return (measure_pair(others.pop(), device) if len(others) == 1 else None), all_ranks


@pytest.mark.dist(world=3)
@pytest.mark.spare
def test_a_pair_and_all_ranks() -> None:
    """The third rank takes no part: it does not even know of the pair."""
    answers = run_ranks(measured, 3, (2, 0))
    assert [mine is not None for mine, _ in answers] == [True, False, True]
    assert all(mine is None or mine > 0.0 for mine, _ in answers)
    assert all(rate > 0.0 for _, rate in answers)


def pair_that_is_lied_to() -> str:
    """Rank 1 sends other numbers than its own."""
    rank = dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(torch, "full", lambda size, value, **how: torch.ones(size, **how) * 7.0)
        try:
            measure_pair(1 - rank, torch.device("cpu"))
        except RuntimeError as error:
            return str(error)
    return ""


@pytest.mark.dist(world=2)
def test_what_came_is_looked_at() -> None:
    assert run_ranks(pair_that_is_lied_to, 2) == ["rank 1 sent 1, and 7 to 7 came", ""]


def test_a_rate_is_of_the_median_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of ours: the first time, which opens connections, is not counted."""
    seconds = [100.0, 2.0, 1.0, 4.0]
    now = itertools.accumulate(second for each in seconds for second in (0.0, each))
    calls: list[None] = []
    monkeypatch.setattr(links, "time", SimpleNamespace(monotonic=lambda: next(now)))
    assert links._median_seconds(lambda: calls.append(None), torch.device("cpu")) == 2.0
    assert len(calls) == len(seconds)


def test_the_bus_carries_more_than_the_bytes_of_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 (n - 1) / n times as many, the bus bandwidth of the NCCL tests."""
    for world, bandwidth in ((2, 1.0), (4, 1.5)):
        monkeypatch.setattr(links, "_median_seconds", lambda work, device: work() or 2.0)
        monkeypatch.setattr(dist, "all_reduce", lambda data, world=world: data.mul_(world))
        monkeypatch.setattr(dist, "get_world_size", lambda world=world: world)
        assert measure_all(torch.device("cpu")) == bandwidth * links.CPU_BYTES / 2.0


def test_a_sum_that_is_wrong_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", lambda data: data[1:].mul_(2.0))
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="over 2 ranks gave 1 to 2"):
        measure_all(torch.device("cpu"))
