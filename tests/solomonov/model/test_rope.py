"""Rotary positions against complex arithmetic in float64, and positions against a loop over documents."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from solomonov.model.rope import document_positions, rope_tables, rotate
from tests.support import naive


@given(runs=st.lists(st.tuples(st.integers(-1, 3), st.integers(1, 5)), min_size=1, max_size=8))
def test_positions_restart_at_every_document(runs: list[tuple[int, int]]) -> None:
    row = [document for document, tokens in runs for _ in range(tokens)]
    expected: list[int] = []
    for index, document in enumerate(row):
        continues = index > 0 and row[index - 1] == document
        expected.append(expected[-1] + 1 if continues else 0)
    assert document_positions(torch.tensor([row, row[::-1]]))[0].tolist() == expected


def test_rotation_is_multiplication_by_a_complex_number() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 8, generator=generator)
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 1000, 7]])
    turned = rotate(x, *rope_tables(positions, 8, 500.0))
    for row in range(2):
        for head in range(3):
            for token in range(5):
                expected = naive.rope(x[row, head, token].double().numpy(), int(positions[row, token]), 500.0)
                np.testing.assert_allclose(turned[row, head, token].numpy(), expected, atol=5e-5)


@given(first=st.integers(0, 500), second=st.integers(0, 500), shift=st.integers(0, 500))
def test_products_depend_on_distance_alone(first: int, second: int, shift: int) -> None:
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 1, 1, 1, 16, generator=generator)

    def product(a: int, b: int) -> float:
        turned = [
            rotate(x, *rope_tables(torch.tensor([[position]]), 16, 10_000.0)) for x, position in ((query, a), (key, b))
        ]
        return float((turned[0] * turned[1]).sum())

    assert abs(product(first, second) - product(first + shift, second + shift)) < 2e-3


def test_bf16_is_turned_in_fp32() -> None:
    x = torch.randn(1, 1, 300, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    tables = rope_tables(torch.arange(300)[None], 8, 10_000.0)
    assert tables[0].dtype == torch.float32
    assert torch.equal(rotate(x, *tables), rotate(x.float(), *tables).bfloat16())
