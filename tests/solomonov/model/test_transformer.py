"""The whole model against float64 loops, packed rows against single documents, its switches against none."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from solomonov.model.attention import layer_contexts
from solomonov.model.cache import KeyValueCache
from solomonov.model.config import Recompute
from solomonov.model.layers import Block
from solomonov.model.loss import pipeline_loss
from solomonov.model.pipeline import pipeline_layers
from solomonov.model.residual import MODES
from solomonov.model.transformer import Transformer, compile_blocks
from tests.solomonov.model.common import ATTENTION, VOCAB, float64_state, random_ids, spread_model, tiny_config
from tests.support import naive


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"attention": {"qk_norm": False}, "kv_heads": 4},
        {"layers": 5, "base_layers": 2},
        {"residual": "scaled", "base_layers": 1, "norm_eps": 0.1},
        *({"attention": flags} for flags in ATTENTION.values()),
        {"attention": ATTENTION["vanilla"], "tie_embeddings": True},
        {"attention": ATTENTION["hybrid"], "layers": 5},
        *({"residual": mode, "layers": 3} for mode in MODES),
        *({"residual": mode, "layers": 3, "norm": "layernorm", "feed_forward": "gelu"} for mode in MODES),
        {"residual": "keel", "layers": 1},
        {"residual": "layerscale", "layers": 20},
        {"feed_forward": "relu2", "norm": "layernorm"},
        {"feed_forward": "geglu"},
    ],
    ids=str,
)
def test_logits_equal_float64_loops(changes: dict[str, object]) -> None:
    config = tiny_config(**changes)
    model = spread_model(config)
    ids = random_ids(2, 7)
    logits = model(ids, torch.zeros_like(ids)).detach().numpy()
    for row in range(2):
        expected = naive.logits(float64_state(model), config, ids[row].tolist())
        np.testing.assert_allclose(logits[row], expected, atol=1e-4, rtol=1e-4)


@settings(deadline=None, max_examples=35)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    padding=st.integers(0, 5),
    flags=st.sampled_from(sorted(ATTENTION)),
)
def test_packed_logits_equal_those_of_single_documents(lengths: list[int], padding: int, flags: str) -> None:
    model = spread_model(tiny_config(attention=ATTENTION[flags]))
    ids = random_ids(1, sum(lengths) + padding)
    documents = torch.tensor([[d for d, tokens in enumerate(lengths) for _ in range(tokens)] + [-1] * padding])
    packed = model(ids, documents)
    assert bool(torch.isfinite(packed).all())
    begin = 0
    for tokens in lengths:
        alone = model(ids[:, begin : begin + tokens], torch.zeros(1, tokens, dtype=torch.int32))
        torch.testing.assert_close(packed[:, begin : begin + tokens], alone, rtol=1e-5, atol=1e-5)
        begin += tokens


def test_loss_is_the_sum_over_labels_that_count() -> None:
    model = spread_model(tiny_config())
    ids, labels = random_ids(3, 10), random_ids(3, 10, seed=1)
    labels[:, ::3] = -100
    documents = torch.zeros_like(ids)
    loss = model(ids, documents, labels)
    expected = functional.cross_entropy(
        model(ids, documents).double().flatten(0, 1),
        labels.flatten().long(),
        reduction="sum",
        ignore_index=-100,
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_tied_head_is_the_same_parameter() -> None:
    model = Transformer(tiny_config(tie_embeddings=True), VOCAB, seed=0)
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters())


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_recomputed_activations_change_no_bit() -> None:
    config = tiny_config()
    ids, labels = random_ids(2, 8), random_ids(2, 8, seed=1)
    documents = torch.zeros_like(ids)
    kept, recomputed = (spread_model(config, recompute=Recompute(mode)) for mode in ("none", "full"))
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    for block in recomputed.layers:
        block.register_forward_pre_hook(count)
    one, two = kept(ids, documents, labels), recomputed(ids, documents, labels)
    assert torch.equal(one, two)
    expected, found = _gradients(kept, one), _gradients(recomputed, two)
    assert calls > config.layers, "no block was computed again"
    assert expected.keys() == found.keys() == dict(kept.named_parameters()).keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("flags", ATTENTION)
@pytest.mark.parametrize("tied", [False, True])
def test_pipeline_layers_give_the_same_loss_and_gradients(tied: bool, flags: str) -> None:
    config = tiny_config(layers=3, tie_embeddings=tied, attention=ATTENTION[flags])
    plain = Transformer(config, VOCAB, seed=9)
    ids, labels = random_ids(2, 8), random_ids(2, 8, seed=1)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, -1, -1], [0] * 8])
    modules = nn.ModuleDict()
    carry: tuple[Tensor, Tensor] = (ids, documents)
    for number, layer in enumerate(pipeline_layers(config, VOCAB, seed=9)):
        key = layer.tied_key or str(number)
        if key not in modules:
            modules[key] = layer.build()
        carry = layer.forward(modules[key], carry) if layer.forward else modules[key](carry)
        assert isinstance(carry, tuple)
    loss, expected = pipeline_loss(carry, labels), plain(ids, documents, labels)
    assert torch.equal(loss, expected)
    found, reference = list(_gradients(modules, loss).values()), list(_gradients(plain, expected).values())
    assert len(found) == len(reference)
    assert all(torch.equal(a, b) for a, b in zip(found, reference, strict=True))


@pytest.mark.parametrize("flags", ATTENTION)
@settings(deadline=None, max_examples=15)
@given(cuts=st.lists(st.integers(1, 11), max_size=11, unique=True))
def test_cached_logits_equal_those_of_the_whole_row(flags: str, cuts: list[int]) -> None:
    """A prompt and new tokens, one or several at a time, within 1e-5 of the largest logit; windows of 3 to 5."""
    config = tiny_config(layers=3, attention=ATTENTION[flags])
    model = spread_model(config).eval()
    ids = random_ids(2, 12)
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 12], dtype=torch.int32)
    cache = KeyValueCache(config, batch_rows=2, capacity_tokens=12)
    bounds = [0, *sorted(cuts), 12]
    with torch.no_grad():
        whole = model(ids, documents)
        pieces = [model(ids[:, begin:end], documents[:, begin:end], cache=cache) for begin, end in pairwise(bounds)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0.0, atol=1e-5 * float(whole.abs().max()))
        with pytest.raises(ValueError, match="do not fit"):
            model(ids[:, :1], documents[:, -1:], cache=cache)


def test_bf16_stays_near_fp32() -> None:
    config = tiny_config(layers=4, d_model=64)
    model = Transformer(config, VOCAB, seed=1)
    ids, labels = random_ids(2, 16), random_ids(2, 16, seed=1)
    documents = torch.zeros_like(ids)
    wide = model(ids, documents, labels)
    narrow = model.bfloat16()(ids, documents, labels)
    assert narrow.dtype == torch.float32
    assert narrow.item() == pytest.approx(wide.item(), rel=5e-3)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("flags", ["hybrid", "much at once"])
def test_compiled_blocks_of_every_kind_give_the_same(flags: str) -> None:
    """A local block in blocks of a window and a global one each, loss and gradients in fp32 within 1e-5. Half a minute
    a kind on a CPU."""
    found = []
    for compiled in (False, True):
        model = spread_model(tiny_config(attention=ATTENTION[flags]))
        if compiled:
            compile_blocks(model)
        ids, labels = random_ids(2, 12), random_ids(2, 12, seed=1)
        loss = model(ids, torch.tensor([[0] * 5 + [1] * 7, [0] * 12]), labels)
        found.append((loss.detach(), _gradients(model, loss)))
    (expected_loss, expected), (loss, gradients) = found
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        distance = torch.linalg.vector_norm(gradient - expected[name])
        assert distance <= 1e-5 * torch.linalg.vector_norm(expected[name]), name


def test_layers_of_a_kind_share_their_masks_and_tables() -> None:
    config = tiny_config(layers=5, attention=ATTENTION["hybrid"])
    contexts = layer_contexts(torch.zeros(1, 12, dtype=torch.int32), config)
    assert [context is contexts[0] for context in contexts] == [True, False, True, False, True]
    assert contexts[1] is contexts[3]
    assert len({id(context) for context in layer_contexts(torch.zeros(1, 3, dtype=torch.int32), tiny_config())}) == 1


def test_blocks_are_compiled_in_place_under_the_same_names() -> None:
    model = spread_model(tiny_config())
    names = [name for name, _ in model.named_parameters()]
    assert compile_blocks(model) == 2
    assert [name for name, _ in model.named_parameters()] == names
    assert all(block._compiled_call_impl is not None for block in model.layers if isinstance(block, Block))
