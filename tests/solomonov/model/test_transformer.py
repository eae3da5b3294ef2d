"""The whole model against float64 loops, packed rows against single documents, its switches against none."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from solomonov.model.attention import layer_contexts
from solomonov.model.cache import KeyValueCache
from solomonov.model.config import ModelConfig, Recompute
from solomonov.model.cross import Source
from solomonov.model.layers import Block
from solomonov.model.loss import pipeline_loss
from solomonov.model.naming import canonical, layer_names
from solomonov.model.pipeline import pipeline_layers
from solomonov.model.residual import MODES
from solomonov.model.transformer import Transformer, compile_blocks
from tests.solomonov.model.common import (
    ATTENTION,
    BIASES,
    VOCAB,
    float64_state,
    random_ids,
    random_source,
    spread_model,
    tiny_config,
    two_stacks,
)
from tests.support import naive

BIASED = [
    {**BIASES, "feed_forward": kind, "output_head": head, "tie_embeddings": head == "transform"}
    for kind, head in (("gelu", "transform"), ("relu", "bias"), ("silu", "linear"), ("relu2", "transform"))
]


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
        *({"value_residual": True, "residual": mode, "layers": 3} for mode in MODES),
        *({"value_residual": True, "attention": flags, "layers": 3} for flags in ATTENTION.values()),
        {"value_residual": True, "kv_heads": 1},
        *BIASED,
        {**BIASED[0], "value_residual": True, "layers": 3},
        {**BIASED[0], "attention": ATTENTION["much at once"], "norm": "rmsnorm", "feed_forward": "swiglu"},
        {**BIASED[0], "attention": {"qk_norm_over": "all"}, "feed_forward": "geglu"},
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


POSITIONS = [{"position": position} for position in ("rope", "nope", "sinusoidal")]


@pytest.mark.parametrize(
    "changes",
    [
        *({"attention": flags} for flags in POSITIONS),
        {"tie_embeddings": True, "attention": {"preset": "vanilla"}},
        {"attention": {"output_gate": "head", "qk_norm": False, "rope_theta": 100.0}, "kv_heads": 4},
        {"attention": {"output_gate": True}, "kv_heads": 1},
        *({"residual": mode, "layers": 3, "base_layers": 2} for mode in MODES),
        {"residual": "deepnorm", "norm": "layernorm", "feed_forward": "gelu"},
        *({"value_residual": True, "residual": mode, "layers": 3} for mode in ("prenorm", "deepnorm", "keel")),
        *BIASED,
        {**BIASED[0], "value_residual": True, "layers": 3},
    ],
    ids=str,
)
def test_logits_of_an_encoder_equal_float64_loops(changes: dict[str, object]) -> None:
    config = tiny_config(**{"architecture": "encoder", "residual": "prenorm"} | changes)
    model = spread_model(config)
    ids = random_ids(1, 7)
    found = model(ids, torch.zeros_like(ids)).detach().numpy()[0]
    expected = naive.logits(float64_state(model), config, ids[0].tolist())
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        *({"attention": flags} for flags in POSITIONS),
        {"tie_embeddings": True, "attention": {"preset": "vanilla"}},
        {"attention": {"output_gate": "head", "qk_norm": False, "rope_theta": 100.0}, "kv_heads": 4},
        {"attention": {**ATTENTION["much at once"], "output_gate": True}, "layers": 3},
        {"attention": ATTENTION["local"], "layers": 3},
        *({"residual": mode, "layers": 3, "encoder_layers": 2, "base_layers": 2} for mode in MODES),
        *({"residual": mode, "encoder_layers": None, "norm": "layernorm", "feed_forward": "gelu"} for mode in MODES),
        {"residual": "keel", "layers": 1},
        {"residual": "keel", "encoder_layers": 1},
        *({"value_residual": True, "residual": mode, "layers": 3} for mode in MODES),
        *BIASED,
        *({**changes, "value_residual": True, "layers": 3} for changes in BIASED[:2]),
    ],
    ids=str,
)
def test_logits_of_an_encoder_decoder_equal_float64_loops(changes: dict[str, object]) -> None:
    config = two_stacks(**changes)
    model = spread_model(config)
    ids, source = random_ids(2, 7), random_source(2, 5)
    found = model(ids, torch.zeros_like(ids), source=source).detach().numpy()
    for row in range(2):
        expected = naive.logits(float64_state(model), config, ids[row].tolist(), source.input_ids[row].tolist())
        np.testing.assert_allclose(found[row], expected, atol=1e-4, rtol=1e-4)


def _packed(lengths: list[int], padding: int) -> Tensor:
    return torch.tensor([[d for d, tokens in enumerate(lengths) for _ in range(tokens)] + [-1] * padding])


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    flags=st.sampled_from(["vanilla", "rope", "local", "hybrid"]),
)
def test_packed_pairs_equal_single_ones(lengths: list[tuple[int, int]], padding: tuple[int, int], flags: str) -> None:
    """Sources and targets of lengths of their own, a document of both by one id; within 2e-5 of the largest logit (in
    float64 they differ by 3e-16)."""
    model = spread_model(two_stacks(attention=ATTENTION[flags]))
    of_source, of_target = [pair[0] for pair in lengths], [pair[1] for pair in lengths]
    source_documents, documents = _packed(of_source, padding[0]), _packed(of_target, padding[1])
    source_ids, ids = random_ids(1, source_documents.shape[1], seed=2), random_ids(1, documents.shape[1])
    packed = model(ids, documents, source=Source(source_ids, source_documents))
    assert bool(torch.isfinite(packed).all())
    for document in range(len(lengths)):
        mine, theirs = documents[0] == document, source_documents[0] == document
        alone = model(
            ids[:, mine], documents[:, mine], source=Source(source_ids[:, theirs], source_documents[:, theirs])
        )
        torch.testing.assert_close(packed[:, mine], alone, rtol=0.0, atol=2e-5 * float(alone.detach().abs().max()))


@settings(deadline=None, max_examples=20)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    padding=st.integers(0, 5),
    flags=st.sampled_from(POSITIONS),
)
def test_packed_documents_of_an_encoder_equal_single_ones(
    lengths: list[int], padding: int, flags: dict[str, str]
) -> None:
    model = spread_model(tiny_config(architecture="encoder", attention=flags))
    documents = _packed(lengths, padding)
    ids = random_ids(1, documents.shape[1])
    packed = model(ids, documents)
    assert bool(torch.isfinite(packed).all())
    for document in range(len(lengths)):
        mine = documents[0] == document
        alone = model(ids[:, mine], documents[:, mine])
        torch.testing.assert_close(packed[:, mine], alone, rtol=0.0, atol=2e-5 * float(alone.detach().abs().max()))


@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
def test_a_row_longer_than_learned_positions_is_refused(architecture: str) -> None:
    model = spread_model(tiny_config(**BIASES, architecture=architecture))
    ids, documents = random_ids(1, 33), torch.tensor([[0] * 7 + [1] * 26])
    source = {"source": random_source(1, 3)} if architecture == "encoder_decoder" else {}
    with pytest.raises(ValueError, match="33 tokens, and learned positions for 32"):
        model(ids, documents, **source)
    model(ids[:, :32], documents[:, :32], **source)
    if source:
        with pytest.raises(ValueError, match="33 tokens, and learned"):
            model(ids[:, :4], documents[:, :4], source=random_source(1, 33))


@pytest.mark.parametrize(
    ("architecture", "given_source", "message"),
    [
        ("decoder", True, "reads no source"),
        ("encoder", True, "of 5 tokens"),
        ("encoder_decoder", False, "got no source"),
    ],
)
def test_a_source_that_is_missing_or_not_read_is_refused(architecture: str, given_source: bool, message: str) -> None:
    model = spread_model(tiny_config(architecture=architecture))
    ids = random_ids(2, 4)
    with pytest.raises(ValueError, match=message):
        model(ids, torch.zeros_like(ids), source=random_source(2, 5) if given_source else None)


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


def _in_a_pipeline(config: ModelConfig, carry: tuple[Tensor, ...]) -> tuple[nn.ModuleDict, tuple[Tensor, ...]]:
    """The layers of a pipeline, all on one stage, and what they make of the input."""
    modules = nn.ModuleDict()
    for number, layer in enumerate(pipeline_layers(config, VOCAB, seed=9)):
        key = layer.name if layer.tied_key else str(number)
        modules[key] = layer.build()
        if layer.tied_key and layer.name != layer.tied_key:
            assert torch.equal(modules[key].weight, modules[layer.tied_key].weight)
            modules[key].weight = modules[layer.tied_key].weight  # for the sum of both gradients
        carry = modules[key](carry)
        assert isinstance(carry, tuple)
    return modules, carry


def _assert_equal_to_the_bit(
    config: ModelConfig, modules: nn.Module, loss: Tensor, plain: nn.Module, expected: Tensor
) -> None:
    assert torch.equal(loss, expected)
    names = layer_names(config)
    found = {canonical(name, names): gradient for name, gradient in _gradients(modules, loss).items()}
    reference = _gradients(plain, expected)
    assert found.keys() == reference.keys()
    assert all(torch.equal(found[name], reference[name]) for name in reference)


@pytest.mark.parametrize(
    ("architecture", "flags"),
    [*(("decoder", flags) for flags in ATTENTION), ("encoder", "vanilla"), ("encoder", "rope")],
)
@pytest.mark.parametrize(("tied", "values"), [(False, False), (True, False), (False, True)])
def test_pipeline_layers_give_the_same_loss_and_gradients(
    tied: bool, values: bool, architecture: str, flags: str
) -> None:
    shape = {"layers": 3, "tie_embeddings": tied, "architecture": architecture, "value_residual": values}
    _assert_a_pipeline_gives_the_same(tiny_config(**shape, attention=ATTENTION[flags]))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("changes", BIASED, ids=str)
def test_pipeline_layers_with_biases_give_the_same(tied: bool, values: bool, changes: dict[str, object]) -> None:
    shape = {"tie_embeddings": tied, "architecture": "encoder", "value_residual": values}
    _assert_a_pipeline_gives_the_same(tiny_config(**changes | shape))


def _assert_a_pipeline_gives_the_same(config: ModelConfig) -> None:
    plain = Transformer(config, VOCAB, seed=9)
    ids, labels = random_ids(2, 8), random_ids(2, 8, seed=1)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, -1, -1], [0] * 8])
    modules, last = _in_a_pipeline(config, (ids, documents))
    _assert_equal_to_the_bit(config, modules, pipeline_loss(last, labels), plain, plain(ids, documents, labels))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        *({"residual": mode} for mode in MODES),
        *({"attention": ATTENTION[flags]} for flags in ("vanilla", "hybrid")),
        *({"value_residual": True, "residual": mode} for mode in ("prenorm", "keel")),
        *(changes | {"value_residual": values} for changes in BIASED[:2] for values in (False, True)),
    ],
    ids=str,
)
def test_pipeline_layers_of_two_stacks_give_the_same(tied: bool, changes: dict[str, object]) -> None:
    config = two_stacks(**changes | {"tie_embeddings": tied})
    plain = Transformer(config, VOCAB, seed=9)
    ids, labels, source_ids = random_ids(2, 8), random_ids(2, 8, seed=1), random_ids(2, 6, seed=2)
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2, -1], [0] * 8])
    source = Source(source_ids, torch.tensor([[0, 1, 1, 1, -1, -1], [0] * 6]))
    modules, last = _in_a_pipeline(config, (*source, ids, documents))
    expected = plain(ids, documents, labels, source=source)
    _assert_equal_to_the_bit(config, modules, pipeline_loss(last, labels), plain, expected)


@pytest.mark.parametrize(
    ("values", "dropped", "biased"),
    [(False, 0.0, False), (True, 0.0, False), (False, 0.9, False), (True, 0.9, False), (True, 0.9, True)],
)
@pytest.mark.parametrize("cuts", list(combinations(range(1, 9), 2)), ids=str)
def test_two_stacks_may_be_cut_anywhere(cuts: tuple[int, int], values: bool, dropped: float, biased: bool) -> None:
    """Three stages as DeepSpeed runs them: what a stage is given are leaves, and each of floats has to have a gradient
    to send back, those that it only hands on as well, and those that nothing uses in an update that passes all of its
    blocks by."""
    changes = BIASES | {"residual": "prenorm"} if biased else {}
    config = two_stacks(**changes, value_residual=values, stochastic_depth=dropped)
    plain = Transformer(config, VOCAB, seed=9)
    ids, labels, source = random_ids(2, 8), random_ids(2, 8, seed=1), random_source(2, 6)
    documents = torch.zeros_like(ids)
    layers = [layer.build() for layer in pipeline_layers(config, VOCAB, seed=9)]
    for block in [*plain.blocks(), *(layer for layer in layers if isinstance(layer, Block))] if dropped else []:
        block.draw(0, 1)  # which passes the last block of both stacks by
    carry: tuple[Tensor, ...] = (*source, ids, documents)
    given, made = [], []
    for begin, end in pairwise([0, *cuts, len(layers)]):
        carry = tuple(each.detach().requires_grad_(each.is_floating_point()) for each in carry)
        given.append([each for each in carry if each.is_floating_point()])
        for layer in layers[begin:end]:
            carry = layer(carry)
        made.append([each for each in carry if each.is_floating_point()])
    pipeline_loss(carry, labels).backward()
    for outputs, inputs in zip(made[-2::-1], given[:0:-1], strict=True):
        gradients = [each.grad for each in inputs if each.grad is not None]
        assert len(gradients) == len(outputs)
        torch.autograd.backward(outputs, gradients)
    plain(ids, documents, labels, source=source).backward()
    expected = [parameter.grad for parameter in plain.parameters()]
    found = [parameter.grad for layer in layers for parameter in layer.parameters()]
    assert [each is None for each in found] == [each is None for each in expected]
    assert any(each is None for each in found) == (dropped > 0.0)
    for one, two in zip(found, expected, strict=True):
        if one is not None:
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("changes", [*({"attention": flags} for flags in ATTENTION.values()), BIASES], ids=str)
@settings(deadline=None, max_examples=15)
@given(cuts=st.lists(st.integers(1, 11), max_size=11, unique=True))
def test_cached_logits_equal_those_of_the_whole_row(changes: dict[str, object], values: bool, cuts: list[int]) -> None:
    """A prompt and new tokens, one or several at a time, within 1e-5 of the largest logit; windows of 3 to 5."""
    config = tiny_config(**changes, layers=3, value_residual=values)
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


@pytest.mark.parametrize("flags", ["vanilla", "rope", "local", "hybrid"])
@settings(deadline=None, max_examples=10)
@given(cuts=st.lists(st.integers(1, 11), max_size=11, unique=True))
def test_cached_logits_behind_a_source_equal_those_of_the_whole_row(flags: str, cuts: list[int]) -> None:
    config = two_stacks(layers=3, attention=ATTENTION[flags], value_residual=flags == "local")
    model = spread_model(config).eval()
    ids = random_ids(2, 12)
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 12], dtype=torch.int32)
    source = Source(random_ids(2, 6, seed=2), torch.tensor([[1, 1, 0, 0, 0, -1], [0] * 6]))
    cache = KeyValueCache(config, batch_rows=2, capacity_tokens=12)
    bounds = [0, *sorted(cuts), 12]
    read = []
    assert model.encoder is not None
    model.encoder.register_forward_hook(lambda *_: read.append(1))
    with torch.no_grad():
        whole = model(ids, documents, source=source)
        pieces = [
            model(ids[:, begin:end], documents[:, begin:end], cache=cache, source=None if begin else source)
            for begin, end in pairwise(bounds)
        ]
        assert len(read) == 2, "once with the cache, and once without"
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0.0, atol=1e-5 * float(whole.abs().max()))
        with pytest.raises(ValueError, match="got a second source"):
            model(ids[:, :1], documents[:, -1:], cache=cache, source=source)


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
@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", ["hybrid", "much at once", "two stacks"])
@pytest.mark.spare
def test_compiled_blocks_of_every_kind_give_the_same(kind: str) -> None:
    """A local block in blocks of a window and a global one each, and blocks of an encoder and with cross-attention,
    loss and gradients in fp32 within 1e-5. Half a minute a kind on a CPU."""
    found = []
    source = random_source(2, 9) if kind == "two stacks" else None
    for compiled in (False, True):
        model = spread_model(
            two_stacks(layers=1, encoder_layers=1) if source else tiny_config(attention=ATTENTION[kind])
        )
        if compiled:
            assert compile_blocks(model) == 2
        ids, labels = random_ids(2, 12), random_ids(2, 12, seed=1)
        loss = model(ids, torch.tensor([[0] * 5 + [1] * 7, [0] * 12]), labels, source=source)
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
