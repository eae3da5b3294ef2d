"""Attention with any of its flags against float64 loops over each document alone, gradients against dense
float64 matrices; the mask against its definition; shared rows against whole ones."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from solomonov.model import attention as attention_module
from solomonov.model.attention import Attention, SequenceShare, attend, attention_context
from solomonov.model.config import ModelConfig
from solomonov.model.rope import rotate
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


@st.composite
def flag_sets(draw: st.DrawFn, local: bool, also_global: bool) -> dict[str, Any]:
    """Every legal combination of flags with layers of these kinds."""
    position = draw(st.sampled_from(["rope", "nope", "alibi", "sinusoidal", "learned"]))
    flags: dict[str, Any] = {
        "position": position,
        "rope_theta": draw(st.sampled_from([100.0, 10_000.0])),
        "qk_norm": draw(st.booleans()),
        "output_gate": draw(st.sampled_from([False, "head", True])),
        "sink": draw(st.booleans()),
        "window_tokens": draw(st.integers(1, 10)) if local else None,
        "pattern": draw(st.sampled_from(["LG", "LLG", "GL", "LGGL"])) if local and also_global else None,
    }
    if flags["qk_norm"]:
        flags["qk_norm_over"] = draw(st.sampled_from(["head", "all"]))
    if flags["pattern"] is not None and position not in ("sinusoidal", "learned"):
        flags["global_position"] = draw(st.sampled_from([None, "rope", "nope", "alibi"]))
    if flags["pattern"] is not None and (flags.get("global_position") or position) == "rope":
        flags["global_rope_theta"] = draw(st.sampled_from([None, 1000.0]))
    if also_global:
        flags["log_n_scale"] = draw(st.booleans())
    return flags


def bounds_of(row: list[int]) -> list[tuple[int, int]]:
    """Begin and end of each run of equal numbers."""
    cuts = [0, *(index for index in range(1, len(row)) if row[index] != row[index - 1]), len(row)]
    return list(pairwise(cuts))


KINDS = pytest.mark.parametrize(
    ("local", "also_global", "layer"), [(False, True, 0), (True, False, 0), (True, True, 0), (True, True, 1)]
)
"""Layers that all see everything; that all have a window; of both, a local one and a global one."""


@KINDS
@settings(deadline=None, max_examples=60)
@given(
    data=st.data(),
    runs=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    padding=st.integers(0, 3),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2), (6, 2)]),
)
def test_every_combination_of_flags_equals_the_loops_and_its_gradients_the_dense_ones(
    local: bool,
    also_global: bool,
    layer: int,
    data: st.DataObject,
    runs: list[int],
    padding: int,
    heads: tuple[int, int],
) -> None:
    """In fp32: outputs within 2e-5 + 1e-4 of the value, gradients within 1e-4 of the largest of their tensor, or of 1
    where that is less. Two rows, of which the second has its documents the other way round."""
    flags = data.draw(flag_sets(local, also_global))
    config = tiny_config(d_model=8, head_dim=4, heads=heads[0], kv_heads=heads[1], attention=flags)
    module = Attention(config, layer)
    state = _filled(module)
    rows = [
        [document for document, tokens in enumerate(lengths) for _ in range(tokens)] + [-1] * padding
        for lengths in (runs, runs[::-1])
    ]
    generator = torch.Generator().manual_seed(len(rows[0]))
    x = torch.randn(2, len(rows[0]), 8, generator=generator, requires_grad=True)
    weights = torch.randn(x.shape, generator=generator)
    answer = module(x, attention_context(torch.tensor(rows), config, layer))
    (answer * weights).sum().backward()

    exact = {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}
    wide = x.detach().double().requires_grad_()
    for number, row in enumerate(rows):
        for begin, end in bounds_of(row):
            document = list(wide[number, begin:end].detach().numpy())
            expected = np.stack(naive.attention(state, "a", config, document, layer))
            np.testing.assert_allclose(answer[number, begin:end].detach().numpy(), expected, atol=2e-5, rtol=1e-4)
            dense = naive.dense_attention(exact, config, wide[number, begin:end], layer)
            np.testing.assert_allclose(dense.detach().numpy(), expected, atol=1e-12, rtol=1e-9)
            (dense * weights[number, begin:end].double()).sum().backward()
    pairs = [(x.grad, wide.grad), *((p.grad, exact[name].grad) for name, p in module.named_parameters())]
    for found, reference in pairs:
        assert found is not None, "no gradient came"
        assert reference is not None, "no gradient came"
        bound = 1e-4 * max(1.0, float(reference.abs().max()))
        assert float((found.double() - reference).abs().max()) <= bound


def test_flags_that_are_off_leave_the_plain_product() -> None:
    """To the bit, and nothing else of the context is there."""
    config = tiny_config()
    module = Attention(config)
    _filled(module)
    documents = torch.tensor([[0, 0, 0, 1, 1, -1]])
    context = attention_context(documents, config)
    assert (context.mask, context.flex, context.log_keys) == (None, None, None)
    x = torch.randn(1, 6, config.d_model, generator=torch.Generator().manual_seed(1))
    query, key, value = (
        layer(x).view(1, 6, heads, 4) for layer, heads in ((module.q, 4), (module.k, 2), (module.v, 2))
    )
    assert module.q_norm is not None
    assert module.k_norm is not None
    assert context.cosine is not None
    assert context.sine is not None
    query = rotate(module.q_norm(query).transpose(1, 2), context.cosine, context.sine)
    key = rotate(module.k_norm(key).transpose(1, 2), context.cosine, context.sine)
    key, value = key.repeat_interleave(2, dim=1), value.transpose(1, 2).repeat_interleave(2, dim=1)
    of_documents = zip(*(x.split([3, 2, 1], dim=2) for x in (query, key, value)), strict=True)
    mixed = torch.cat(
        [functional.scaled_dot_product_attention(*parts, is_causal=True) for parts in of_documents], dim=2
    )
    assert torch.equal(module(x, context), module.out(mixed.transpose(1, 2).reshape(1, 6, 16)))


def _shared(module: Attention, config: ModelConfig, x: Tensor, documents: Tensor, layer: int, ranks: int) -> Tensor:
    """What `ranks` ranks that share rows make of them, one after the other: first all compute what they exchange, then
    each attends for its heads, and goes on with its tokens."""
    sent: list[tuple[Tensor, Tensor, Tensor]] = []
    options: list[dict[str, Any]] = []

    def run(rank: int, attend_together: Any) -> Tensor:
        share = SequenceShare(rank, ranks, attend_together)
        mine = x[:, share.tokens(x.shape[1])]
        answer: Tensor = module(mine, attention_context(documents, config, layer, share=share))
        return answer

    def note(query: Tensor, key: Tensor, value: Tensor, _: int, **others: Any) -> Tensor:
        sent.append((query, key, value))
        options.append(others)
        return torch.zeros_like(query)

    for rank in range(ranks):
        run(rank, note)
    whole = [torch.cat(parts, dim=1) for parts in zip(*sent, strict=True)]
    mixed = []
    for rank, of_attend in enumerate(options):
        of_rank = (each.chunk(ranks, dim=2)[rank] for each in whole)
        mixed.append(attend(*of_rank, **of_attend))
    answers = torch.cat(mixed, dim=2).chunk(ranks, dim=1)
    return torch.cat([run(rank, lambda *_, rank=rank, **__: answers[rank]) for rank in range(ranks)], dim=1)


@KINDS
@settings(deadline=None, max_examples=25)
@given(data=st.data(), ranks=st.sampled_from([2, 4]), first=st.integers(1, 12))
def test_rows_that_ranks_share_give_what_whole_rows_give(
    local: bool, also_global: bool, layer: int, data: st.DataObject, ranks: int, first: int
) -> None:
    """Outputs and gradients, which are summed over the ranks, in fp32 within 1e-5."""
    flags = data.draw(flag_sets(local, also_global))
    config = tiny_config(d_model=8, head_dim=4, heads=4, kv_heads=2, attention=flags)
    module = Attention(config, layer)
    _filled(module)
    documents = torch.tensor([[0] * first + [1] * (12 - first), [0] * 12])
    x = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = []
    whole = module(x, attention_context(documents, config, layer))
    for answer in (whole, _shared(module, config, x, documents, layer, ranks)):
        loss = (answer * torch.arange(12)[:, None].cos()).sum()
        found.append([answer, *torch.autograd.grad(loss, [x, *module.parameters()])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("new", [None, 2])
@pytest.mark.parametrize(
    "keys", [{"preset": "rope"}, {"preset": "rope", "window_tokens": 4}, {"preset": "alibi"}], ids=str
)
def test_a_number_that_comes_again_is_another_document(
    monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], new: int | None
) -> None:
    """As it is for positions: nothing of the later run is seen, and nothing of the earlier one. On CUDA as well."""
    config = tiny_config(attention=keys)
    again, apart = torch.tensor([[7] * 3 + [1] * 2 + [7] * 5]), torch.tensor([[0] * 3 + [1] * 2 + [2] * 5])
    if new is None:
        module = Attention(config)
        _filled(module)
        x = torch.randn(1, 10, config.d_model, generator=torch.Generator().manual_seed(0))
        found = [module(x, attention_context(documents, config)) for documents in (again, apart)]
        assert torch.equal(*found)
        monkeypatch.setattr(attention_module, "flex_suits", lambda *_: True)
        plans = [attention_context(documents, config).flex for documents in (again, apart)]
        index = torch.arange(10)
        masks = [plan.blocks.mask_mod(torch.tensor(0), 0, index[:, None], index) for plan in plans if plan is not None]
        assert len(masks) == 2
        assert torch.equal(*masks)
    else:
        masks = [attention_context(documents, config, new_tokens=new).mask for documents in (again, apart)]
        assert masks[0] is not None
        assert masks[1] is not None
        assert torch.equal(*masks)


def test_only_the_new_tokens_ask() -> None:
    documents = torch.tensor([[0, 0, 1, 1, 1]])
    whole, last = (
        attention_context(documents, tiny_config()),
        attention_context(documents, tiny_config(), new_tokens=2),
    )
    for name in ("cosine", "sine"):
        assert torch.equal(getattr(last, name), getattr(whole, name)[:, :, 3:])
    assert last.mask is not None
    assert last.mask[0, 0].int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]


@pytest.mark.parametrize(
    "keys", [{}, {"window_tokens": 2}, {"position": "alibi", "window_tokens": 4}, {"sink": True}], ids=str
)
def test_a_row_of_nothing_but_padding_is_finite_in_both_directions(keys: dict[str, Any]) -> None:
    config = tiny_config(attention=keys)
    module = Attention(config)
    _filled(module)
    x = torch.randn(1, 6, config.d_model, generator=torch.Generator().manual_seed(0), requires_grad=True)
    answer = module(x, attention_context(torch.full((1, 6), -1), config))
    answer.sum().backward()
    assert bool(torch.isfinite(answer).all())
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())
