"""What is computed again equals what would have been kept, to the bit; and as much less is kept as is said."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from solomonov.footprint import Allocated
from solomonov.model.config import NOTHING_AGAIN, Recompute
from solomonov.model.transformer import Transformer
from tests.solomonov.model.common import VOCAB, random_ids, spread_model, tiny_config

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
    attention = aten._scaled_dot_product_flash_attention_for_cpu.default
    products, norms, activations = aten.mm.default, aten.rsqrt.default, aten.silu.default
    assert kept[attention] == 4
    assert kept[norms] == 4 * 4 + 1, "two of a block, two of its heads, the final one"
    assert [selective[name] - kept[name] for name in (products, attention)] == [0, 0]
    assert [selective[name] - kept[name] for name in (norms, activations)] == [4 * 4, 4]
    # All of a block is run again, but for the last product, from which no gradient is computed.
    assert [full[name] - kept[name] for name in (products, attention)] == [4 * 6, 4]
    assert [full[name] - kept[name] for name in (norms, activations)] == [4 * 4, 4]


def test_nothing_is_computed_again_where_no_gradient_is_wanted() -> None:
    ids = random_ids(2, 8)
    documents = torch.zeros_like(ids)
    for recompute in (Recompute("selective"), Recompute("full", 2)):
        model, reference = (spread_model(tiny_config(), recompute=again) for again in (recompute, NOTHING_AGAIN))
        with torch.no_grad():
            assert torch.equal(model(ids, documents), reference(ids, documents))
            assert torch.equal(model.eval()(ids, documents), reference.eval()(ids, documents))


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


def test_at_the_root_of_the_depth_memory_grows_like_it() -> None:
    """Four times the depth: four times the peak where all is kept, twice where groups of root L are computed again."""
    shallow, deep = 16, 64

    def growth(modes: tuple[Recompute, Recompute]) -> float:
        (_, small), (_, large) = (activation_bytes(*case) for case in zip((shallow, deep), modes, strict=True))
        return large / small

    assert growth((NOTHING_AGAIN, NOTHING_AGAIN)) > 3.7
    roots = (Recompute("full", math.isqrt(shallow)), Recompute("full", math.isqrt(deep)))
    assert growth(roots) <= 2.6


def test_the_peak_is_least_where_inputs_weigh_as_much_as_a_group() -> None:
    """A block keeps some 25 times its input, so that of 64 blocks root of 64 / 25 belong together."""
    (_, single), (_, pair), (_, root) = (activation_bytes(64, Recompute("full", every)) for every in (1, 2, 8))
    assert pair < single < root
