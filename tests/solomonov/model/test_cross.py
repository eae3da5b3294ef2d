"""Cross-attention against float64 loops over each pair of documents; what has no source; the cache of the source."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from solomonov.model.cache import LayerCache
from solomonov.model.cross import CrossAttention, memory_of
from tests.solomonov.model.common import two_stacks
from tests.support import naive

TARGET = [[2, 2, 2, 0, 0, 1, 1, -1], [0] * 8]
SOURCE = [[0, 0, 0, 0, 2, 5, -1], [0] * 7]
"""Of the first row, document 1 has no source, and document 5 of the source no target."""


def _filled(module: CrossAttention) -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return {f"cross_attention.{name}": value.detach().double().numpy() for name, value in module.named_parameters()}


def _streams(width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 8, width, generator=generator), torch.randn(2, 7, width, generator=generator)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("gate", [False, "head", True])
@pytest.mark.parametrize("norm", [None, "head", "all"])
def test_each_document_sees_all_of_its_source(kv_heads: int, gate: bool | str, norm: str | None) -> None:
    normed = {"qk_norm": False} if norm is None else {"qk_norm_over": norm}
    flags = {"output_gate": gate, **normed, "sink": True, "window_tokens": 2}
    config = two_stacks(kv_heads=kv_heads, head_dim=6, attention=flags)
    module = CrossAttention(config)
    state = _filled(module)
    x, source = _streams(config.d_model)
    found = module(x, memory_of(source, torch.tensor(SOURCE), torch.tensor(TARGET))).detach().numpy()
    for row, documents in enumerate(TARGET):
        for place, document in enumerate(documents):
            seen = [source[row, key].double().numpy() for key, other in enumerate(SOURCE[row]) if other == document]
            asking = [x[row, place].double().numpy()]
            (expected,) = naive.attention_to_all(state, "cross_attention", config, asking, seen)
            np.testing.assert_allclose(found[row, place], expected, atol=2e-5, rtol=1e-4)


def test_a_document_without_source_finds_nothing_and_no_gradient() -> None:
    config = two_stacks()
    module = CrossAttention(config)
    _filled(module)
    x, source = (stream.requires_grad_() for stream in _streams(config.d_model))
    found = module(x, memory_of(source, torch.tensor(SOURCE), torch.tensor(TARGET)))
    assert torch.equal(found[0, 5:7], torch.zeros(2, config.d_model))
    found[0, 5:7].square().sum().backward()
    for tensor in (x, source, *module.parameters()):
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, torch.zeros_like(tensor)), "finite, and nothing"


def test_the_source_has_no_order() -> None:
    config = two_stacks(attention={"preset": "rope"})
    module = CrossAttention(config)
    _filled(module)
    x, source = _streams(config.d_model)
    documents = torch.zeros(2, 8), torch.zeros(2, 7)
    one, two = (module(x, memory_of(stream, documents[1], documents[0])) for stream in (source, source.flip(1)))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_keys_and_values_of_the_source_are_computed_once() -> None:
    config = two_stacks()
    module = CrossAttention(config)
    _filled(module)
    x, source = _streams(config.d_model)
    calls = []
    for projection in (module.k, module.v):
        projection.register_forward_hook(lambda *_: calls.append(1))
    target = torch.tensor(TARGET)
    whole = module(x, memory_of(source, torch.tensor(SOURCE), target))
    past, found = LayerCache(torch.empty(2, 2, 0, 4), torch.empty(2, 2, 0, 4)), []
    for begin, end in ((0, 3), (3, 4), (4, 8)):
        memory = memory_of(None if begin else source, torch.tensor(SOURCE), target[:, begin:end])
        found.append(module(x[:, begin:end], memory, past))
    assert len(calls) == 2 * 2, "once with the cache, and once without"
    torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=1e-5, atol=1e-5)
