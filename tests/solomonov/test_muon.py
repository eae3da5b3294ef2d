"""Newton-Schulz against singular values in float64; who orthogonalises what; what a step does to which group."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from solomonov.config import OptimizerConfig
from solomonov.model.transformer import Transformer
from solomonov.muon import RMS, Exchange, Muon, cost, homes, newton_schulz
from solomonov.optim import make_optimizer, parameter_groups
from solomonov.partition import Piece, local_pieces
from tests.support import tiny
from tests.support.naive import naive_newton_schulz


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (5, 17), (17, 5), (64, 32)])
def test_newton_schulz_is_a_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)
    expected = naive_newton_schulz(matrix)
    torch.testing.assert_close(newton_schulz(matrix, torch.float64), expected, rtol=1e-9, atol=1e-9)
    found = newton_schulz(matrix.float(), torch.float32)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    reduced = newton_schulz(matrix.float(), torch.bfloat16)
    assert reduced.dtype == torch.bfloat16
    assert float((reduced.double() - expected).norm() / expected.norm()) < 0.1


def test_it_brings_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(
        newton_schulz(torch.randn(48, 96, generator=torch.Generator().manual_seed(0)), torch.float32)
    )
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3


def test_a_zero_matrix_stays_zero() -> None:
    assert not newton_schulz(torch.zeros(4, 6), torch.float32).any()


sides = st.integers(1, 300)


@given(st.lists(st.tuples(sides, sides), max_size=40), st.integers(1, 9))
def test_no_rank_multiplies_much_more_than_its_share(shapes: list[tuple[int, int]], ranks: int) -> None:
    found = homes(shapes, ranks)
    assert len(found) == len(shapes)
    load = [0] * ranks
    for shape, rank in zip(shapes, found, strict=True):
        load[rank] += cost(shape)
    dearest = max(map(cost, shapes), default=0)
    assert max(load) <= sum(load) / ranks + dearest, "within one matrix of even"


def test_without_a_group_all_matrices_are_at_home() -> None:
    flat = torch.arange(20.0)
    pieces = [Piece("b", (2, 3), 0, flat, 12, 6), Piece("a", (2, 5), 0, flat, 1, 10)]
    Exchange(pieces, None, tiny.CPU).apply(lambda matrix: matrix * matrix.shape[1], flat)
    expected = torch.arange(20.0)
    expected[1:11] *= 5
    expected[12:18] *= 3
    assert torch.equal(flat, expected), "what is between the pieces is left alone"


def test_a_matrix_of_which_a_part_is_nowhere_is_refused() -> None:
    flat = torch.zeros(20)
    with pytest.raises(AssertionError, match="the ranks hold 5 elements of a"):
        Exchange([Piece("a", (2, 5), 0, flat, 0, 5)], None, tiny.CPU)


def test_groups_of_a_model() -> None:
    config = OptimizerConfig(kind="muon", lr=0.02, adamw_lr=0.005, weight_decay=0.3)
    named = dict(Transformer(tiny.tiny_model(), tiny.VOCAB, seed=0).named_parameters())
    names = {parameter: name for name, parameter in named.items()}
    muon, decay, plain = parameter_groups(named.items(), config, tiny.tiny_model())
    assert (muon["muon"], decay["muon"], plain["muon"]) == (True, False, False)
    assert {names[p].split(".")[-2] for p in muon["params"]} == {"q", "k", "v", "out", "gate", "up", "down"}
    assert [names[p] for p in decay["params"]] == ["head.weight"]
    assert (muon["lr_scale"], decay["lr_scale"], plain["lr_scale"]) == (1.0, 0.25, 0.25)
    assert (muon["weight_decay"], decay["weight_decay"], plain["weight_decay"]) == (0.3, 0.3, 0.0)
    assert sum(len(group["params"]) for group in (muon, decay, plain)) == len(named)
    same = parameter_groups(named.items(), OptimizerConfig(lr=0.02, adamw_lr=0.005), tiny.tiny_model())
    assert [group["lr_scale"] for group in same] == [1.0, 1.0], "adamw has one learning rate"


def test_a_step_by_the_formula() -> None:
    """Two updates of one matrix, beside a vector that AdamW updates as it would alone."""
    generator = torch.Generator().manual_seed(3)
    matrix, vector = (torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((4, 6), (6,)))
    alone = torch.nn.Parameter(vector.detach().clone())
    names = {matrix: "layers.0.attention.q.weight", vector: "layers.0.attention_norm.weight"}
    config = OptimizerConfig(kind="muon", lr=0.02, momentum=0.9, weight_decay=0.1)
    optimizer = make_optimizer([(name, p) for p, name in names.items()], config, tiny.tiny_model(), fused=False)
    pieces = lambda: local_pieces(SimpleNamespace(param_groups=optimizer.param_groups), names)  # noqa: E731
    Muon(0.9, torch.float32, pieces=pieces, group=lambda: None, device=tiny.CPU).take_over_step(optimizer)
    adamw = torch.optim.AdamW([{"params": [alone], "weight_decay": 0.0}], lr=0.02, betas=config.betas, eps=config.eps)
    expected, momentum = matrix.detach().double(), torch.zeros(4, 6, dtype=torch.float64)
    for _ in range(2):
        gradients: list[Any] = [torch.randn(*p.shape, generator=generator) for p in (matrix, vector)]
        matrix.grad, vector.grad = (gradient.clone() for gradient in gradients)
        alone.grad = gradients[1].clone()
        optimizer.step()
        adamw.step()
        momentum = 0.9 * momentum + 0.1 * gradients[0].double()
        update = naive_newton_schulz(0.1 * gradients[0].double() + 0.9 * momentum)
        expected = (1 - 0.02 * 0.1) * expected - 0.02 * RMS * math.sqrt(6) * update
    torch.testing.assert_close(matrix.detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(vector, alone)
    assert set(optimizer.state[matrix]) == {"momentum"}
