"""The average of plain tensors against its definition in exact fractions; that weights at rest stay what they are; and
the exchange of weights and average. In all layouts: tests/distributed/test_ema.py."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from solomonov import ema as module
from solomonov.ema import WeightAverage


def optimizer_of(*parameters: torch.nn.Parameter) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": list(parameters), "muon": False}])


def parameter(*shape: int, seed: int = 0) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("decay", [0.25, 0.5, 0.9, 0.9999])
def test_it_is_the_definition_in_exact_fractions(decay: float) -> None:
    """0.75, 0.5 and 0.1 as the weight of the newest: torch's lerp has two forms, which meet at a half."""
    weights = parameter(3, 5)
    average = WeightAverage(decay, optimizer_of(weights))
    d, expected = Fraction(decay), [Fraction(value) for value in weights.detach().reshape(-1).tolist()]
    for step in range(6):
        with torch.no_grad():
            weights.copy_(parameter(3, 5, seed=step + 1))
        average.update()
        pairs = zip(expected, weights.detach().reshape(-1).tolist(), strict=True)
        expected = [d * a + (1 - d) * Fraction(w) for a, w in pairs]
    found = average.of(weights)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.reshape(-1), torch.tensor([float(value) for value in expected]), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("decay", [0.1, 0.9, 0.9999, 0.999999])
def test_weights_at_rest_are_their_own_average_to_the_bit(decay: float) -> None:
    weights = parameter(1000)
    average = WeightAverage(decay, optimizer_of(weights))
    for _ in range(2000):
        average.update()
    assert torch.equal(average.of(weights), weights.detach())


def test_it_does_not_share_memory_with_the_weights_and_begins_anew_where_told() -> None:
    weights = parameter(4)
    first = weights.detach().clone()
    average = WeightAverage(0.5, optimizer_of(weights))
    with torch.no_grad():
        weights.add_(2.0)
    assert torch.equal(average.of(weights), first)
    average.begin()
    assert torch.equal(average.of(weights), weights.detach())
    assert not average.of(weights).requires_grad


def test_a_tensor_that_is_none_of_the_masters_has_no_average() -> None:
    with pytest.raises(KeyError):
        WeightAverage(0.5, optimizer_of(parameter(4))).of(parameter(4))


@pytest.mark.parametrize("elements", [1, 3, 1 << 24])
def test_in_use_it_is_the_weights_and_both_are_back_afterwards(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SWAPPED_ELEMENTS", elements)
    weights, other = parameter(3, 5), parameter(7, seed=1)
    average = WeightAverage(0.5, optimizer_of(weights, other))
    with torch.no_grad():
        for each in (weights, other):
            each.mul_(3.0)
    masters = [each.detach().clone() for each in (weights, other)]
    averages = [average.of(each).clone() for each in (weights, other)]
    with average.in_use():
        assert all(torch.equal(each.detach(), kept) for each, kept in zip((weights, other), averages, strict=True))
    assert all(torch.equal(each.detach(), kept) for each, kept in zip((weights, other), masters, strict=True))
    assert all(torch.equal(average.of(each), kept) for each, kept in zip((weights, other), averages, strict=True))
