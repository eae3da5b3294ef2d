"""Attention and RMSNorm against float64 loops over each document alone; the mask against its definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from solomonov.model.attention import Attention, RMSNorm, attention_context
from tests.solomonov.model.common import tiny_config
from tests.support import naive


def _filled(module: torch.nn.Module, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return {f"a.{name}": value.detach().double().numpy() for name, value in module.named_parameters()}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_attention_equals_loops_over_each_document(kv_heads: int, qk_norm: bool) -> None:
    config = tiny_config(kv_heads=kv_heads, head_dim=6, attention={"qk_norm": qk_norm, "rope_theta": 100.0})
    module = Attention(config)
    state = _filled(module)
    x = torch.randn(2, 9, config.d_model, generator=torch.Generator().manual_seed(1))
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 2, -1, -1], [0] * 9])
    answer = module(x, attention_context(documents, config)).detach().numpy()
    for row, bounds in enumerate([[(0, 4), (4, 6), (6, 7), (7, 9)], [(0, 9)]]):
        for begin, end in bounds:
            document = list(x[row, begin:end].double().numpy())
            expected = np.stack(naive.attention(state, "a", config, document))
            np.testing.assert_allclose(answer[row, begin:end], expected, atol=2e-5, rtol=1e-4)


@given(runs=st.lists(st.integers(1, 6), min_size=1, max_size=5), padding=st.integers(0, 4))
def test_mask_is_causal_and_within_documents(runs: list[int], padding: int) -> None:
    row = [document for document, tokens in enumerate(runs) for _ in range(tokens)] + [-1] * padding
    context = attention_context(torch.tensor([row]), tiny_config())
    assert context.mask.shape == (1, 1, len(row), len(row))
    for query in range(len(row)):
        for key in range(len(row)):
            assert bool(context.mask[0, 0, query, key]) == (key <= query and row[key] == row[query])


def test_only_the_new_tokens_ask() -> None:
    documents = torch.tensor([[0, 0, 1, 1, 1]])
    whole, last = (
        attention_context(documents, tiny_config()),
        attention_context(documents, tiny_config(), new_tokens=2),
    )
    assert torch.equal(last.mask, whole.mask[:, :, 3:])
    assert torch.equal(last.cosine, whole.cosine[:, :, 3:])
    assert torch.equal(last.sine, whole.sine[:, :, 3:])


def test_a_row_of_nothing_but_padding_is_finite_in_both_directions() -> None:
    config = tiny_config()
    module = Attention(config)
    _filled(module)
    x = torch.randn(1, 6, config.d_model, generator=torch.Generator().manual_seed(0), requires_grad=True)
    answer = module(x, attention_context(torch.full((1, 6), -1), config))
    answer.sum().backward()
    assert bool(torch.isfinite(answer).all())
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_rms_norm_equals_its_formula(size: float) -> None:
    norm = RMSNorm(12, 1e-6)
    state = _filled(norm)
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)) * size
    for row in range(5):
        expected = naive.rms_norm(x[row].double().numpy(), state["a.weight"], 1e-6)
        np.testing.assert_allclose(norm(x)[row].detach().numpy(), expected, rtol=2e-6)


def test_rms_norm_of_bf16_is_computed_in_fp32() -> None:
    norm = RMSNorm(64, 1e-6)
    _filled(norm)
    norm = norm.bfloat16()
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    wide = RMSNorm(64, 1e-6)
    wide.load_state_dict({"weight": norm.weight.float()})
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), wide(x.float()).bfloat16())
