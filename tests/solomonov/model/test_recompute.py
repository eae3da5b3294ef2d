"""What is computed again equals what would have been kept, to the bit; and as much less is kept as is said."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from solomonov.activations import Allocated
from solomonov.model.attention import attention_context
from solomonov.model.config import NOTHING_AGAIN, Recompute
from solomonov.model.cross import Source
from solomonov.model.packed import attend_documents
from solomonov.model.transformer import Transformer, compile_blocks
from tests.solomonov.model.common import ATTENTION, BIASES, VOCAB, random_ids, spread_model, tiny_config, two_stacks

MODES = [Recompute("selective"), *[Recompute("full", every) for every in (1, 2, 3, 5, 8)]]
aten = torch.ops.aten


def train_once(model: Transformer, tokens: int = 8) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of two rows."""
    ids, labels = random_ids(2, tokens), random_ids(2, tokens, seed=1)
    loss = model(ids, torch.zeros_like(ids), labels)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_autocast"])
@pytest.mark.parametrize("recompute", MODES, ids=str)
def test_no_bit_of_loss_and_gradients_changes(recompute: Recompute, precision: str) -> None:
    found = []
    for again in (NOTHING_AGAIN, recompute):
        model = spread_model(tiny_config(layers=5), recompute=again)
        if precision == "bf16":
            model = model.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16_autocast"):
            found.append(train_once(model))
    (expected_loss, expected), (loss, gradients) = found
    assert torch.equal(loss, expected_loss)
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


@pytest.mark.parametrize("flags", ["hybrid", "much at once", "alibi"])
@pytest.mark.parametrize("recompute", MODES[:2], ids=str)
def test_no_bit_changes_with_other_kinds_of_attention(recompute: Recompute, flags: str) -> None:
    found = [
        train_once(spread_model(tiny_config(layers=3, attention=ATTENTION[flags]), recompute=again), tokens=14)
        for again in (NOTHING_AGAIN, recompute)
    ]
    (expected_loss, expected), (loss, gradients) = found
    assert torch.equal(loss, expected_loss)
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_autocast"])
@pytest.mark.parametrize("recompute", MODES[:3], ids=str)
@pytest.mark.parametrize("values", [False, True])
def test_no_bit_changes_with_biases(values: bool, recompute: Recompute, precision: str) -> None:
    found = []
    for again in (NOTHING_AGAIN, recompute):
        model = spread_model(tiny_config(**BIASES, value_residual=values), recompute=again)
        model = model.bfloat16() if precision == "bf16" else model
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16_autocast"):
            found.append(train_once(model))
    (expected_loss, expected), (loss, gradients) = found
    assert torch.equal(loss, expected_loss)
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


@pytest.mark.parametrize("recompute", MODES[:3], ids=str)
def test_no_bit_changes_with_two_stacks(recompute: Recompute) -> None:
    found = []
    for again in (NOTHING_AGAIN, recompute):
        found.append(train_pair(spread_model(two_stacks(layers=3, attention={"output_gate": True}), recompute=again)))
    (expected_loss, expected), (loss, gradients) = found
    assert torch.equal(loss, expected_loss)
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def train_pair(model: Transformer) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of two rows behind a source, of which a document of the target has none."""
    ids, labels, source_ids = random_ids(2, 8), random_ids(2, 8, seed=1), random_ids(2, 6, seed=2)
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2, -1], [0] * 8])
    source = Source(source_ids, torch.tensor([[0, 1, 1, 1, -1, -1], [0] * 6]))
    loss = model(ids, documents, labels, source=source)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


def computed(recompute: Recompute) -> Counter[Any]:
    model = spread_model(tiny_config(layers=4), recompute=recompute)
    with Operations() as operations:
        train_once(model)
    return operations.counts


def test_selective_computes_norms_again_and_neither_products_nor_attention() -> None:
    kept, selective, full = (computed(again) for again in (NOTHING_AGAIN, Recompute("selective"), Recompute("full")))
    attention = attend_documents
    products, norms, activations = aten.mm.default, aten.rsqrt.default, aten.silu.default
    assert kept[attention] == 4
    assert kept[norms] == 4 * 4 + 1, "two of a block, two of its heads, the final one"
    assert [selective[name] - kept[name] for name in (products, attention)] == [0, 0]
    assert [selective[name] - kept[name] for name in (norms, activations)] == [4 * 4, 4]
    # All of a block is run again, but for the last product, from which no gradient is computed.
    assert [full[name] - kept[name] for name in (products, attention)] == [4 * 6, 4]
    assert [full[name] - kept[name] for name in (norms, activations)] == [4 * 4, 4]


@pytest.mark.parametrize("flags", ["hybrid", "all local"])
def test_selective_computes_no_product_again_that_a_gate_or_a_window_has(flags: str) -> None:
    def counts(recompute: Recompute) -> Counter[Any]:
        model = spread_model(tiny_config(layers=2, attention=ATTENTION[flags]), recompute=recompute)
        with Operations() as operations:
            train_once(model, tokens=14)
        return operations.counts

    kept, selective = counts(NOTHING_AGAIN), counts(Recompute("selective"))
    assert kept[attend_documents] == 2
    for name in (aten.mm.default, aten.addmm.default, attend_documents):
        assert selective[name] == kept[name], str(name)
    assert selective[aten.sigmoid.default] > kept[aten.sigmoid.default]


@pytest.mark.parametrize("values", [False, True])
def test_selective_computes_no_product_with_a_bias_again(values: bool) -> None:
    config = tiny_config(**BIASES | {"residual": "prenorm", "value_residual": values})

    def counts(recompute: Recompute) -> Counter[Any]:
        with Operations() as operations:
            train_once(spread_model(config, recompute=recompute))
        return operations.counts

    kept, selective = counts(NOTHING_AGAIN), counts(Recompute("selective"))
    assert kept[aten.addmm.default] == 0, "a bias is no part of a product"
    assert selective[aten.mm.default] == kept[aten.mm.default]
    assert selective[aten.gelu.default] == kept[aten.gelu.default] + 2


def test_selective_computes_no_product_of_two_stacks_again() -> None:
    """Full computes all of them again, but for the last product of each block."""

    def counts(recompute: Recompute) -> Counter[Any]:
        model = spread_model(two_stacks(layers=2, encoder_layers=3), recompute=recompute)
        with Operations() as operations:
            train_pair(model)
        return operations.counts

    kept, selective, full = (counts(again) for again in (NOTHING_AGAIN, Recompute("selective"), Recompute("full")))
    attention, products = attend_documents, aten.mm.default
    assert kept[attention] == 3 + 2 * 2
    assert [selective[name] - kept[name] for name in (products, attention)] == [0, 0]
    assert [full[name] - kept[name] for name in (products, attention)] == [3 * 6 + 2 * 10, 3 + 2 * 2]
    assert selective[aten.silu.default] == 2 * kept[aten.silu.default]


def activation_bytes(layers: int, recompute: Recompute, tokens: int = 64) -> tuple[int, int]:
    """Bytes that are kept after the forward pass, and the most that were there until the end of the backward pass."""
    ids, labels = random_ids(2, tokens), random_ids(2, tokens, seed=1)
    with Allocated() as allocated:
        model = Transformer(tiny_config(layers=layers), VOCAB, seed=0, recompute=recompute)
        for parameter in model.parameters():  # gradients are none of the activations
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        parameters = allocated.peak = allocated.now
        loss = model(ids, torch.zeros_like(ids), labels)
        kept = allocated.now
        loss.backward()
    return kept - parameters, allocated.peak - parameters


def test_less_is_kept_the_more_is_computed_again() -> None:
    modes = (NOTHING_AGAIN, Recompute("selective"), Recompute("full"))
    none, selective, full = (activation_bytes(8, recompute) for recompute in modes)
    for of_none, of_selective, of_full in zip(none, selective, full, strict=True):
        assert of_full < 0.6 * of_selective < 0.6 * 0.6 * of_none


def test_selective_keeps_products_and_attention_and_nothing_else() -> None:
    """Of a block and token: the input, queries, keys, values, what attention mixed with a number a head, its
    projection, and the two inner products of the feed-forward; not the last product."""
    config = tiny_config()
    width, of_keys, inner = config.d_model, config.kv_head_count * config.head_width, config.feed_forward_width
    numbers = width + (width + 2 * of_keys) + (width + config.heads) + width + 2 * inner
    four, eight = (activation_bytes(layers, Recompute("selective"), tokens=64)[0] for layers in (4, 8))
    assert eight - four == 4 * 2 * 64 * numbers * 4


@pytest.mark.timeout(600)
@pytest.mark.spare
def test_a_compiled_block_keeps_no_more() -> None:
    """Half a minute on a CPU. Without `selective` a compiled block keeps three quarters of an eager one."""
    config = tiny_config(layers=1)
    found = []
    for recompute in (NOTHING_AGAIN, Recompute("selective")):
        model = spread_model(config, recompute=recompute)
        if recompute.mode == "selective":
            compile_blocks(model)
        hidden = torch.randn(2, 64, config.d_model, generator=torch.Generator().manual_seed(0))
        context = attention_context(torch.zeros(2, 64, dtype=torch.int32), config)
        own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def keep(tensor: Tensor, own: set[int] = own, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            (output,) = model.layers[0]((hidden,), context)
        output.square().sum().backward()
        found.append((sum(kept.values()), [p.grad for p in model.layers.parameters()]))
    (of_all, expected), (of_selective, gradients) = found
    assert of_selective < 0.6 * of_all
    for gradient, other in zip(gradients, expected, strict=True):
        assert torch.linalg.vector_norm(gradient - other) <= 1e-5 * torch.linalg.vector_norm(other)


@pytest.mark.spare
def test_at_the_root_of_the_depth_memory_grows_like_it() -> None:
    """Four times the depth: four times the peak where all is kept, twice where groups of root L are computed again."""
    shallow, deep = 16, 64

    def growth(modes: tuple[Recompute, Recompute]) -> float:
        (_, small), (_, large) = (activation_bytes(*case) for case in zip((shallow, deep), modes, strict=True))
        return large / small

    assert growth((NOTHING_AGAIN, NOTHING_AGAIN)) > 3.7
    roots = (Recompute("full", math.isqrt(shallow)), Recompute("full", math.isqrt(deep)))
    assert growth(roots) <= 2.6


@pytest.mark.spare
def test_the_peak_is_least_where_inputs_weigh_as_much_as_a_group() -> None:
    """A block keeps some 25 times its input, so that of 64 blocks root of 64 / 25 belong together."""
    (_, single), (_, pair), (_, root) = (activation_bytes(64, Recompute("full", every)) for every in (1, 2, 8))
    assert pair < single < root
