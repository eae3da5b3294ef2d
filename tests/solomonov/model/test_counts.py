"""Counts from the configuration against the parameters of the built module; FLOPs against torch's counter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from solomonov.model.counts import flops_per_token, layer_flops, parameter_count, parameter_shapes, visible_keys
from solomonov.model.residual import MODES
from solomonov.model.transformer import Transformer
from tests.solomonov.model.common import ATTENTION, BIASES, VOCAB, random_ids, random_source, tiny_config, two_stacks


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True},
        {"attention": {"qk_norm": False}},
        {"head_dim": 6},
        *({"residual": mode, "layers": 3, "norm": "layernorm"} for mode in MODES),
        {"feed_forward": "relu2"},
        {"feed_forward": "geglu", "d_ff": None},
        *({"attention": flags, "layers": 3, "head_dim": 6} for flags in ATTENTION.values()),
        {"architecture": "encoder", "attention": {"output_gate": "head"}},
        *({**BIASES, "tie_embeddings": tied, "architecture": "encoder_decoder"} for tied in (False, True)),
        {**BIASES, "attention": ATTENTION["much at once"], "feed_forward": "swiglu", "output_head": "bias"},
        *(
            {"architecture": "encoder_decoder", "encoder_layers": 3, "attention": flags, "head_dim": 6}
            for flags in ATTENTION.values()
            if flags.get("preset") != "alibi" and flags.get("position") != "alibi"
        ),
        {"architecture": "encoder_decoder", "tie_embeddings": True, "residual": "rezero"},
        *(
            {"architecture": architecture, "value_residual": True, "residual": "layerscale", "layers": 3}
            for architecture in ("decoder", "encoder", "encoder_decoder")
        ),
        {**BIASES, "architecture": "encoder_decoder", "value_residual": True, "layers": 3},
    ],
)
def test_shapes_are_those_of_the_module(changes: dict[str, object]) -> None:
    config = tiny_config(**changes)
    model = Transformer(config, VOCAB, seed=None)
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert parameter_shapes(config, VOCAB) == built
    assert list(parameter_shapes(config, VOCAB)) == [
        name
        for layer in ["embedding", "encoder.layers", "encoder.final_norm", "layers", "final_norm", "head"]
        for name in built
        if name.startswith(layer)
    ]
    assert parameter_count(config, VOCAB) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("changes", [{}, BIASES], ids=["plain", "biases"])
def test_flops_agree_with_a_count_of_the_products(changes: dict[str, Any]) -> None:
    config = tiny_config(**changes | {"layers": 3, "d_model": 32, "d_ff": None})
    tokens = 16
    model = Transformer(config, VOCAB, seed=0)
    documents = torch.zeros(1, tokens, dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        model(random_ids(1, tokens), documents, random_ids(1, tokens, seed=1)).backward()
    # The counter sees the whole T x T products and, on CPU, only the matrices: add ours without attention.
    products = counter.get_total_flops() - _attention_flops_seen(counter)
    attention = 6.0 * config.layers * config.heads * config.head_width * (tokens + 1)
    # The embedding's output needs no product backward towards the ids, so the first layer loses nothing.
    assert tokens * (flops_per_token(config, VOCAB, tokens) - attention) == pytest.approx(products, rel=1e-6)


@pytest.mark.parametrize("source_tokens", [8, 12, 40])
def test_flops_of_two_stacks_agree_with_a_count_of_the_products(source_tokens: int) -> None:
    """On one token of the target, with its share of the source."""
    tokens, config = 16, two_stacks(d_model=32, layers=3, encoder_layers=5, attention={"output_gate": True})
    model = Transformer(config, VOCAB, seed=0)
    ids = random_ids(1, tokens)
    with FlopCounterMode(display=False) as counter:
        model(
            ids, torch.zeros_like(ids), random_ids(1, tokens, seed=1), source=random_source(1, source_tokens)
        ).backward()
    products = counter.get_total_flops() - _attention_flops_seen(counter)
    pairs = 5 * source_tokens**2 + 3 * tokens * (tokens + 1) / 2 + 3 * tokens * source_tokens
    attention = 3 * 2 * 2 * config.heads * config.head_width * pairs
    found = tokens * flops_per_token(config, VOCAB, tokens, source_tokens)
    assert found - attention == pytest.approx(products, rel=1e-5)
    assert layer_flops(config, VOCAB, tokens) == layer_flops(config, VOCAB, tokens, tokens)


def test_in_an_encoder_a_token_sees_all_of_a_row() -> None:
    costs = [
        layer_flops(tiny_config(architecture=architecture), VOCAB, 9)["layers.1"]
        for architecture in ("encoder", "decoder")
    ]
    assert costs[0] - costs[1] == 4 * 16 * (9 - 5)


def test_attention_term_is_the_sum_over_visible_keys() -> None:
    config = tiny_config(layers=5, d_model=32)
    tokens = 9
    visible = sum(position + 1 for position in range(tokens)) / tokens
    without = flops_per_token(config, VOCAB, -1)  # T + 1 = 0: no attention at all
    assert flops_per_token(config, VOCAB, tokens) - without == pytest.approx(3 * 5 * 2 * 2 * 32 * visible)


@pytest.mark.parametrize("window", [1, 3, 8, 9, 50])
def test_a_window_shows_as_many_keys_as_are_counted_one_by_one(window: int) -> None:
    tokens = 9
    counted = sum(min(position + 1, window) for position in range(tokens)) / tokens
    assert visible_keys(tokens, window) == pytest.approx(counted)
    flags = {"window_tokens": window, "pattern": "LG"}
    full = layer_flops(tiny_config(), VOCAB, tokens)
    mixed = layer_flops(tiny_config(attention=flags), VOCAB, tokens)
    assert mixed["layers.1"] == full["layers.1"], "a global layer"
    assert full["layers.0"] - mixed["layers.0"] == pytest.approx(4 * 16 * ((tokens + 1) / 2 - counted), abs=0.5)


def _attention_flops_seen(counter: FlopCounterMode) -> int:
    return sum(flops for operator, flops in counter.get_flop_counts()["Global"].items() if "attention" in str(operator))
