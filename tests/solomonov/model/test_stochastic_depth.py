"""Blocks that are passed by: which, and how often; against loops, and branches that are computed and multiplied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from torch import Tensor, nn

from solomonov.model.attention import attention_context
from solomonov.model.cache import KeyValueCache
from solomonov.model.config import NOTHING_AGAIN, ModelConfig, Recompute
from solomonov.model.counts import flops_per_token, layer_flops
from solomonov.model.residual import MODES
from solomonov.model.stochastic_depth import drawn_factor, drop_rate
from solomonov.model.transformer import Transformer
from tests.solomonov.model.common import (
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

SEED = 5


def factors_of(config: ModelConfig, update: int, seed: int = SEED) -> dict[str, float]:
    """b / p of each block, by its name: dropped where the digest, as a share of 2^64, is below the rate."""
    found = {}
    stacks = {"": config.layers}
    if config.architecture == "encoder_decoder":
        stacks = {"encoder.": config.encoder_layers or config.layers, "": config.layers}
    for prefix, depth in stacks.items():
        for layer in range(depth):
            name = f"{prefix}layers.{layer}"
            rate = config.stochastic_depth * (layer / (depth - 1) if depth > 1 else 0.0)
            share = xxhash.xxh3_64_intdigest(f"{seed}/stochastic_depth/{update}/{name}".encode()) / 2**64
            found[name] = 0.0 if share < rate else 1.0 / (1.0 - rate)
    return found


def tell(model: Transformer, update: int) -> None:
    """What an engine does before each update."""
    for block in model.blocks():
        block.draw(SEED, update)


@contextmanager
def multiplied(model: Transformer, factors: dict[str, float]) -> Iterator[None]:
    """All branches computed, and multiplied: the definition, written as hooks on what a branch ends in."""
    with ExitStack() as hooks:
        for name, factor in factors.items():
            block = model.get_submodule(name)
            for branch in ("attention", "cross_attention", "feed_forward"):
                out = getattr(block, f"{branch}_out_norm", None) or getattr(block, branch, None)
                if isinstance(out, nn.Module):
                    hook = out.register_forward_hook(lambda _, __, found, factor=factor: factor * found)
                    hooks.callback(hook.remove)
        yield


def rows() -> tuple[Tensor, Tensor, Tensor]:
    ids, labels = random_ids(2, 8), random_ids(2, 8, seed=1)
    return ids, torch.zeros_like(ids), labels


def test_the_rate_rises_in_equal_steps_to_that_of_the_last_block() -> None:
    config = tiny_config(layers=5, stochastic_depth=0.4)
    assert [drop_rate(config, layer) for layer in range(5)] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    both = two_stacks(layers=2, encoder_layers=3, stochastic_depth=0.5)
    rates = [[drop_rate(both, layer, stack) for layer in range(stack.layers)] for stack in both.stacks]
    assert rates == [[0.0, 0.25, 0.5], [0.0, 0.5]]
    assert drop_rate(tiny_config(layers=1, stochastic_depth=0.5), 0) == 0.0
    with pytest.raises(ValueError, match="less than 1"):
        tiny_config(stochastic_depth=1.0)


def test_a_draw_follows_from_seed_update_and_name_alone() -> None:
    """Written down: a resumed run has to draw as the one before it did, of whatever release."""
    config = two_stacks(layers=4, encoder_layers=4, stochastic_depth=0.5)
    drawn = []
    for update in range(4):
        factors = [
            drawn_factor(config, layer, stack, seed=7, update=update) for stack in config.stacks for layer in range(4)
        ]
        drawn.append("".join("01"[factor > 0.0] for factor in factors))
    assert drawn == WRITTEN_DOWN
    for update in range(20):
        expected = factors_of(config, update)
        for stack in config.stacks:
            for layer in range(4):
                found = drawn_factor(config, layer, stack, seed=SEED, update=update)
                assert found == pytest.approx(expected[f"{stack.prefix}layers.{layer}"], rel=1e-12)


WRITTEN_DOWN = ["11011110", "11101011", "11101010", "11001111"]
"""Of four updates, the blocks that are kept, those of the encoder first."""


def test_blocks_drop_as_often_as_the_rate_says_and_each_by_itself() -> None:
    """4,000 updates: a share of 0.5 within 0.03, 3.8 standard deviations; b / p is 1 on average."""
    config, updates = tiny_config(layers=3, stochastic_depth=0.5), 4000
    stack = config.stacks[-1]
    drawn = np.array(
        [
            [drawn_factor(config, layer, stack, seed=SEED, update=update) for layer in range(3)]
            for update in range(updates)
        ]
    )
    dropped = drawn == 0.0
    assert dropped.mean(axis=0) == pytest.approx([0.0, 0.25, 0.5], abs=0.03)
    assert drawn.mean(axis=0) == pytest.approx([1.0, 1.0, 1.0], abs=0.06)
    assert abs(np.corrcoef(dropped[:, 1], dropped[:, 2])[0, 1]) < 0.06
    assert abs(np.corrcoef(dropped[1:, 2], dropped[:-1, 2])[0, 1]) < 0.06


@pytest.mark.parametrize("architecture", ["decoder", "encoder", "encoder_decoder"])
@pytest.mark.parametrize("mode", MODES)
def test_logits_of_an_update_equal_float64_loops(mode: str, architecture: str) -> None:
    """With value residual, on every set of blocks that may be left."""
    hold({"architecture": architecture, "residual": mode, "base_layers": 2})


@pytest.mark.parametrize("architecture", ["decoder", "encoder", "encoder_decoder"])
def test_logits_of_an_update_with_biases_equal_float64_loops(architecture: str) -> None:
    """What is passed by adds its biases neither."""
    hold({**BIASES, "architecture": architecture})


def hold(changes: dict[str, Any]) -> None:
    shape, architecture = {**changes, "layers": 3}, changes["architecture"]
    if architecture == "encoder_decoder":
        shape["encoder_layers"] = 2
    config = tiny_config(**shape, value_residual=True, stochastic_depth=0.6)
    model = spread_model(config)
    ids = random_ids(1, 6)
    source = random_source(1, 5) if architecture == "encoder_decoder" else None
    updates = {tuple(factors_of(config, update).values()): update for update in range(200)}
    assert len(updates) == (8 if source else 4)
    for update in updates.values():
        tell(model, update)
        found = model(ids, torch.zeros_like(ids), source=source).detach().numpy()[0]
        of_source = source.input_ids[0].tolist() if source else ()
        factors = factors_of(config, update)
        expected = naive.logits(float64_state(model), config, ids[0].tolist(), of_source, factors)
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("recompute", [NOTHING_AGAIN, Recompute("selective"), Recompute("full"), Recompute("full", 2)])
@pytest.mark.parametrize("mode", MODES)
def test_loss_and_gradients_equal_those_of_branches_that_are_multiplied(mode: str, recompute: Recompute) -> None:
    config = tiny_config(residual=mode, layers=5, value_residual=True, stochastic_depth=0.8)
    reference, model = spread_model(config), spread_model(config, recompute=recompute)
    for update in range(3):
        factors = factors_of(config, update)
        assert 0.0 in factors.values()
        model.zero_grad()
        reference.zero_grad()
        tell(model, update)
        loss = model(*rows())
        loss.backward()
        with multiplied(reference, factors):
            expected = reference(*rows())
            expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0.0)
        for (name, one), two in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert two.grad is not None
            computed = two.grad.abs().max() > 0.0
            if one.grad is None:
                assert not computed, f"{name} has a gradient where it is multiplied by 0"
            else:
                distance = torch.linalg.vector_norm(one.grad - two.grad)
                assert distance <= 1e-4 * torch.linalg.vector_norm(two.grad), name


@pytest.mark.parametrize("again", [NOTHING_AGAIN, Recompute("full"), Recompute("full", 3)], ids=str)
def test_what_is_dropped_is_not_computed_and_what_runs_again_is_what_ran(again: Recompute) -> None:
    config = tiny_config(layers=6, stochastic_depth=0.8)
    model = spread_model(config, recompute=again)
    calls = dict.fromkeys(range(6), 0)

    def count(layer: int) -> None:
        calls[layer] += 1

    for layer, block in enumerate(model.layers):
        for part in (block, block.attention, block.feed_forward, block.attention_norm):
            part.register_forward_pre_hook(lambda *_, layer=layer: count(layer))
    dropped = 0
    for update in range(5):
        factors = factors_of(config, update)
        calls.update(dict.fromkeys(range(6), 0))
        tell(model, update)
        model(*rows()).backward()
        runs = 2 if again.mode == "full" else 1
        assert calls == {layer: 4 * runs * (factors[f"layers.{layer}"] > 0.0) for layer in range(6)}
        dropped += sum(factor == 0.0 for factor in factors.values())
    assert dropped > 5


def test_evaluation_and_generation_drop_nothing() -> None:
    config = tiny_config(layers=5, stochastic_depth=0.9)
    model = spread_model(config)
    ids, documents, _ = rows()
    plain = model(ids, documents)
    tell(model, 0)
    assert not torch.equal(model(ids, documents), plain)
    model.eval()
    assert torch.equal(model(ids, documents), plain)
    cache = KeyValueCache(config, batch_rows=2, capacity_tokens=8)
    with torch.no_grad():
        pieces = [model(ids[:, begin : begin + 4], documents[:, begin : begin + 4], cache=cache) for begin in (0, 4)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["prenorm", "scaled", "lns", "layerscale", "rezero", "peri", "outnorm"])
def test_on_average_a_branch_adds_what_it_adds_in_evaluation(mode: str) -> None:
    """Of a block with one branch: p * (kept) + (1 - p) * (passed by) = (in evaluation)."""
    config = tiny_config(layers=3, residual=mode, stochastic_depth=0.6)
    block = spread_model(config).layers[1]
    ending = block.feed_forward_out_norm or block.feed_forward
    ending.register_forward_hook(lambda _, __, found: 0.0 * found)
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    context, ways = attention_context(torch.zeros(2, 8, dtype=torch.int32), config), {}
    for update in range(60):
        block.draw(SEED, update)
        ways[factors_of(config, update)["layers.1"]] = block((x,), context)[0]
    assert len(ways) == 2
    passed_by, kept = (way for _, way in sorted(ways.items()))
    assert torch.equal(passed_by, x)
    (expected,) = block.eval()((x,), context)
    torch.testing.assert_close(0.7 * kept + 0.3 * passed_by, expected, rtol=1e-5, atol=1e-5)


def test_a_draw_asks_no_generator() -> None:
    model = spread_model(tiny_config(layers=4, stochastic_depth=0.9))
    state, of_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    tell(model, 3)
    model(*rows())
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], of_numpy)  # noqa: NPY002


def test_operations_are_those_that_are_expected_of_an_update() -> None:
    whole, config = (tiny_config(layers=5, stochastic_depth=rate) for rate in (0.0, 0.4))
    costs, expected = layer_flops(whole, VOCAB, 16), layer_flops(config, VOCAB, 16)
    for layer in range(5):
        assert expected[f"layers.{layer}"] == pytest.approx(costs[f"layers.{layer}"] * (1.0 - 0.1 * layer), abs=1.0)
    assert expected["head"] == costs["head"]
    blocks = sum(cost for name, cost in costs.items() if name.startswith("layers."))
    saved = flops_per_token(whole, VOCAB, 16) - flops_per_token(config, VOCAB, 16)
    assert saved == pytest.approx(3 * 0.2 * blocks, rel=1e-3)


@pytest.mark.timeout(900)
def test_compiled_blocks_drop_out_without_another_graph() -> None:
    """One graph for the first block, which has no values of another one to add, and one for all that follow, whatever
    their rates and whatever drops."""
    from torch._dynamo.utils import counters

    config = tiny_config(layers=5, residual="deepnorm", value_residual=True, stochastic_depth=0.8)
    eager, compiled = spread_model(config), spread_model(config)
    torch._dynamo.reset()
    counters.clear()
    for block in compiled.layers:
        block.compile(dynamic=False, backend="aot_eager")
    for update in range(4):
        found = []
        for model in (eager, compiled):
            tell(model, update)
            model.zero_grad()
            loss = model(*rows())
            loss.backward()
            found.append((loss.detach(), [parameter.grad for parameter in model.parameters()]))
        (expected_loss, expected), (loss, gradients) = found
        torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0.0)
        assert [each is None for each in gradients] == [each is None for each in expected]
        for one, two in zip(gradients, expected, strict=True):
            if one is not None:
                torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2
