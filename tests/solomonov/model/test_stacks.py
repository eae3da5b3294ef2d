"""Stacks and names of every architecture, against those written out."""

from __future__ import annotations

import pytest

from solomonov.model.config import ModelConfig
from solomonov.model.naming import layer_names
from solomonov.model.stacks import block_number, block_place, stack_of, stacks_of
from tests.solomonov.model.common import tiny_config, two_stacks

TWO, THREE = ("attention", "feed_forward"), ("attention", "cross_attention", "feed_forward")


def test_stacks_of_each_architecture() -> None:
    for architecture, causal in (("decoder", True), ("encoder", False)):
        (stack,) = stacks_of(tiny_config(architecture=architecture, layers=5))
        assert (stack.layers, stack.causal, stack.prefix, stack.branches, stack.sublayers) == (5, causal, "", TWO, 10)
    encoder, decoder = stacks_of(two_stacks(layers=5, encoder_layers=4))
    assert (encoder.layers, encoder.causal, encoder.branches, encoder.sublayers) == (4, False, TWO, 8)
    assert (decoder.layers, decoder.causal, decoder.branches, decoder.sublayers) == (5, True, THREE, 15)
    assert [stack.layers for stack in stacks_of(two_stacks(layers=5, encoder_layers=None))] == [5, 5]


def test_where_names_belong() -> None:
    config = two_stacks(encoder_layers=12)
    encoder, decoder = stacks_of(config)
    found = {name: (stack_of(config, name), block_number(name)) for name in layer_names(config)}
    assert found["encoder.layers.11"] == (encoder, 11)
    assert found["encoder.final_norm"] == (encoder, None)
    assert found["layers.1"] == (decoder, 1)
    assert [found[name] for name in ("embedding", "final_norm", "head")] == [(decoder, None)] * 3
    assert block_number("encoder.layers.10.attention.q.weight") == 10
    assert block_number("layers.7.cross_attention.k_norm.weight") == 7


@pytest.mark.parametrize("config", [tiny_config(layers=5), two_stacks(layers=3, encoder_layers=12)])
def test_places_count_the_blocks_as_they_run(config: ModelConfig) -> None:
    places = [block_place(config, name) for name in layer_names(config)]
    assert [place for place in places if place is not None] == list(range(sum(s.layers for s in stacks_of(config))))
    assert block_place(config, "embedding.weight") is None


@pytest.mark.parametrize("name", ["", "layers", "layers.x.y", "encoder.final_norm.weight", "player.0.weight"])
def test_what_is_no_block_has_no_number(name: str) -> None:
    assert block_number(name) is None
