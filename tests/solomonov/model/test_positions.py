"""Slopes, sinusoids and log counts against the papers' formulas in Python numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from solomonov.model.positions import alibi_slopes, grid_sinusoids, log_scale_start, log_visible, sinusoids
from tests.support import naive


def test_slopes_of_eight_heads_are_those_of_the_paper() -> None:
    assert alibi_slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 6, 7, 12, 16, 25])
def test_slopes_of_any_number_of_heads(heads: int) -> None:
    found = alibi_slopes(heads)
    assert found == pytest.approx([naive.alibi_slope(head, heads) for head in range(heads)])
    assert len(set(found)) == heads


@pytest.mark.parametrize("width", [2, 7, 16])
def test_sinusoids(width: int) -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 1777]])
    found = sinusoids(positions, width)
    assert found.dtype == torch.float32
    for row in range(2):
        for token in range(5):
            expected = naive.sinusoid(int(positions[row, token]), width)
            np.testing.assert_allclose(found[row, token].numpy(), expected, atol=1e-7)


@pytest.mark.parametrize("width", [4, 7, 16])
def test_on_a_grid_half_of_the_channels_tell_the_row_and_half_the_column(width: int) -> None:
    found = grid_sinusoids(torch.arange(12)[None], 5, width)[0]
    for token in range(12):
        row, column = divmod(token, 5)
        halves = naive.sinusoid(row, width // 2), naive.sinusoid(column, width - width // 2)
        np.testing.assert_allclose(found[token].numpy(), np.concatenate(halves), atol=1e-5)


def test_a_query_sees_itself_and_those_before_it() -> None:
    found = log_visible(torch.tensor([[0, 1, 2, 0]]))
    assert found.shape == (1, 1, 4, 1)
    assert found.flatten().tolist() == pytest.approx([0.0, math.log(2), math.log(3), 0.0])


def test_at_the_length_of_training_logits_start_as_they_are() -> None:
    for tokens in (2, 256, 8192):
        assert log_scale_start(tokens) * math.log(tokens) == pytest.approx(1.0)
