"""Initial values: statistics against the table, and equality whatever was built before, beside or instead."""

from __future__ import annotations

import math

import pytest
import torch

from solomonov.model.counts import parameter_shapes
from solomonov.model.init import initial_value
from solomonov.model.naming import canonical, layer_names
from solomonov.model.parameterization import row_of
from solomonov.model.pipeline import pipeline_layers
from solomonov.model.transformer import Transformer
from tests.solomonov.model.common import VOCAB, tiny_config, two_stacks


def test_a_tensor_depends_on_seed_and_name_alone() -> None:
    config = tiny_config()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model = Transformer(config, VOCAB, seed=11)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    for name, parameter in reversed(list(model.named_parameters())):
        assert torch.equal(parameter, initial_value(name, parameter.shape, config, 11)), name
    other = dict(Transformer(config, VOCAB, seed=12).named_parameters())
    drawn = [name for name in other if row_of(name).std is not None]
    assert all(not torch.equal(other[name], parameter) for name, parameter in model.named_parameters() if name in drawn)
    firsts = {float(dict(model.named_parameters())[name].flatten()[0].detach()) for name in drawn}
    assert len(firsts) == len(drawn), "two tensors were drawn from one generator"


@pytest.mark.parametrize("architecture", ["decoder", "encoder", "encoder_decoder"])
@pytest.mark.parametrize("tied", [False, True])
def test_pipeline_layers_have_the_same_numbers(tied: bool, architecture: str) -> None:
    config = tiny_config(layers=3, tie_embeddings=tied, architecture=architecture)
    plain = dict(Transformer(config, VOCAB, seed=4).named_parameters())
    names = layer_names(config)
    met = set()
    for number, layer in reversed(list(enumerate(pipeline_layers(config, VOCAB, seed=4)))):
        place = number if layer.tied_key is None else f"tied_modules.{layer.tied_key}"
        for name, parameter in layer.build().named_parameters():
            ours = canonical(f"{place}.{name}", names)
            met.add(ours)
            assert torch.equal(parameter, plain[ours]), ours
    assert met == set(plain)


def test_cross_attention_starts_like_attention_with_values_of_its_own() -> None:
    start = dict(Transformer(two_stacks(attention={"output_gate": "head"}), VOCAB, seed=1).named_parameters())
    assert torch.equal(start["layers.1.cross_attention.gate.weight"], torch.zeros(4, 16))
    assert torch.equal(start["layers.1.cross_attention.gate.bias"], torch.full((4,), 2.0))
    assert torch.equal(start["layers.1.cross_attention_norm.weight"], torch.ones(16))
    assert torch.equal(start["encoder.final_norm.weight"], torch.ones(16))
    of_one_shape = ["encoder.layers.1.attention.q", "layers.1.attention.q", "layers.1.cross_attention.q"]
    firsts = {float(start[f"{name}.weight"].flatten()[0].detach()) for name in of_one_shape}
    assert len(firsts) == 3


@pytest.mark.parametrize("residual", ["prenorm", "scaled"])
def test_spreads_are_those_of_the_table(residual: str) -> None:
    config = tiny_config(layers=8, d_model=128, d_ff=256, residual=residual)
    out = math.sqrt(16) if residual == "prenorm" else 1.0
    expected = {
        "layers.5.attention.q.weight": 1 / math.sqrt(128),
        "layers.5.feed_forward.gate.weight": 1 / math.sqrt(128),
        "layers.5.attention.out.weight": 1 / math.sqrt(128) / out,
        "layers.5.feed_forward.down.weight": 1 / math.sqrt(256) / out,
        "head.weight": 1 / math.sqrt(128),
        "embedding.weight": 1.0,
    }
    shapes = parameter_shapes(config, 300)
    for name, std in expected.items():
        value = initial_value(name, shapes[name], config, 0)
        assert float(value.std()) == pytest.approx(std, rel=0.03), name
        assert abs(float(value.mean())) < 0.03 * std, name
    assert torch.equal(initial_value("final_norm.weight", (128,), config, 0), torch.ones(128))


def test_gates_start_open_sinks_small_and_scales_at_the_length_of_training() -> None:
    flags = {"output_gate": "head", "log_n_scale": True, "sink": True, "train_tokens": 256}
    for tokens, attention in ((256, flags), (1024, {**flags, "train_tokens": None})):
        config = tiny_config(attention=attention)
        start = dict(Transformer(config, VOCAB, seed=1).named_parameters())
        for layer in ("layers.0.attention", "layers.1.attention"):
            assert torch.equal(start[f"{layer}.gate.weight"], torch.zeros(4, 16))
            assert torch.equal(start[f"{layer}.gate.bias"], torch.full((4,), 2.0))
            assert torch.equal(start[f"{layer}.sink"], torch.zeros(4))
            assert start[f"{layer}.log_scale"].tolist() == pytest.approx([1 / math.log(tokens)] * 4)
