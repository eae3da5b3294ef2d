"""Rotary positions against complex arithmetic in float64, and positions against a loop over documents."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from solomonov.model.rope import document_numbers, document_positions, grid_rope_tables, rope_tables, rotate
from tests.support import naive


@given(runs=st.lists(st.tuples(st.integers(-1, 3), st.integers(1, 5)), min_size=1, max_size=8))
def test_positions_restart_at_every_document(runs: list[tuple[int, int]]) -> None:
    row = [document for document, tokens in runs for _ in range(tokens)]
    expected: list[int] = []
    for index, document in enumerate(row):
        continues = index > 0 and row[index - 1] == document
        expected.append(expected[-1] + 1 if continues else 0)
    assert document_positions(torch.tensor([row, row[::-1]]))[0].tolist() == expected


def test_runs_are_numbered_in_their_order_whatever_their_numbers_are() -> None:
    rows = torch.tensor([[5, 5, -1, 5, 2, 2], [0, 0, 0, 0, 0, 0]])
    assert document_numbers(rows).tolist() == [[0, 0, 1, 2, 3, 3], [0] * 6]


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


@given(columns=st.integers(1, 9), theta=st.sampled_from([100.0, 10_000.0]))
def test_on_a_grid_half_of_a_head_is_turned_by_row_and_half_by_column(columns: int, theta: float) -> None:
    x = torch.randn(1, 1, 20, 12, generator=torch.Generator().manual_seed(3))
    turned = rotate(x, *grid_rope_tables(torch.arange(20)[None], columns, 12, theta))
    for token in range(20):
        row, column = divmod(token, columns)
        expected = naive.grid_rope(x[0, 0, token].double().numpy(), row, column, theta)
        np.testing.assert_allclose(turned[0, 0, token].numpy(), expected, atol=5e-5)


def test_of_a_grid_products_depend_on_differences_of_row_and_column_alone() -> None:
    """One query and one key at all pairs of 36 places on 6 columns: a product for each (row, column) difference.
    Differences of the place alone, as (0, 5) and (1, -1) have it, do not give the same."""
    generator = torch.Generator().manual_seed(1)
    query, key = (each.expand(1, 1, 36, 16) for each in torch.randn(2, 1, 1, 1, 16, generator=generator).double())
    cosine, sine = grid_rope_tables(torch.arange(36)[None], 6, 16, 100.0)
    turned = [rotate(each, cosine, sine).double() for each in (query, key)]
    products = (turned[0] @ turned[1].transpose(2, 3))[0, 0]
    found: dict[tuple[int, int], list[float]] = {}
    for a in range(36):
        for b in range(36):
            found.setdefault((a // 6 - b // 6, a % 6 - b % 6), []).append(float(products[a, b]))
    assert len(found) == 11 * 11
    assert all(max(values) - min(values) < 1e-4 for values in found.values())
    assert abs(found[0, 5][0] - found[1, -1][0]) > 0.1
    assert abs(found[2, 1][0] - found[1, 2][0]) > 0.1


def test_bf16_is_turned_in_fp32() -> None:
    x = torch.randn(1, 1, 300, 8, generator=torch.Generator().manual_seed(2)).bfloat16()
    tables = rope_tables(torch.arange(300)[None], 8, 10_000.0)
    assert tables[0].dtype == torch.float32
    assert torch.equal(rotate(x, *tables), rotate(x.float(), *tables).bfloat16())
