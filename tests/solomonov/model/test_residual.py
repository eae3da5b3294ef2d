"""The forms of the residual against the papers' own sentences: constants, initial values, which norms there are."""

from __future__ import annotations

import math

import pytest
import torch

from solomonov.model.config import ModelConfig
from solomonov.model.counts import parameter_shapes
from solomonov.model.init import initial_value
from solomonov.model.naming import layer_names
from solomonov.model.residual import MODES, branch_form, has_final_norm, learned_scale_start
from solomonov.model.transformer import Transformer
from tests.solomonov.model.common import VOCAB, tiny_config

POST = ("postnorm", "deepnorm", "keel")


def test_constants_of_deepnorm_are_those_of_its_table() -> None:
    """Decoder of M layers: alpha = (2M)^(1/4), beta = (8M)^(-1/4) (arXiv 2203.00555, figure 2)."""
    for layers, alpha, beta in ((8, 2.0, 8**-0.5), (1000, 6.6874, 0.10574)):
        config = tiny_config(residual="deepnorm", layers=layers, d_model=128, heads=8, kv_heads=8, d_ff=512)
        assert branch_form(config, layers - 1).alpha == pytest.approx(alpha, rel=1e-4)
        for name, shape in (
            ("attention.v", (128, 128)),
            ("attention.out", (128, 128)),
            ("feed_forward.down", (128, 512)),
        ):
            value = initial_value(f"layers.1.{name}.weight", shape, config, 3)
            assert float(value.std()) == pytest.approx(beta / math.sqrt(shape[1]), rel=0.03), name
        for name in ("attention.q", "attention.k", "feed_forward.gate"):
            value = initial_value(f"layers.1.{name}.weight", (128, 128), config, 3)
            assert float(value.std()) == pytest.approx(1 / math.sqrt(128), rel=0.03), name


def test_keel_begins_with_a_plain_block_and_weighs_the_stream_by_its_branches() -> None:
    config = tiny_config(residual="keel", layers=6)
    assert (branch_form(config, 0).post, branch_form(config, 0).alpha) == (False, 1.0)
    for layer in range(1, 6):
        assert (branch_form(config, layer).post, branch_form(config, layer).alpha) == (True, 12.0)


def test_layernorm_scaling_shrinks_with_the_number_of_the_layer() -> None:
    config = tiny_config(residual="lns", layers=16)
    assert [branch_form(config, layer).inner for layer in (0, 3, 15)] == pytest.approx([1.0, 0.5, 0.25])


@pytest.mark.parametrize(("layers", "start"), [(18, 0.1), (24, 1e-5), (25, 1e-6), (1000, 1e-6)])
def test_layerscale_starts_smaller_in_deeper_models(layers: int, start: float) -> None:
    config = tiny_config(residual="layerscale", layers=layers)
    assert learned_scale_start(config) == start
    assert torch.equal(initial_value("layers.2.attention_scale", (16,), config, 0), torch.full((16,), start))


def test_rezero_starts_as_the_identity() -> None:
    config = tiny_config(residual="rezero", layers=3)
    model = Transformer(config, VOCAB, seed=0)
    ids = torch.arange(8)[None]
    last = model.final_norm
    assert last is not None
    expected = model.head(last(model.embedding(ids)))
    assert torch.equal(model(ids, torch.zeros_like(ids)), expected)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("mode", MODES)
def test_names_and_shapes_are_those_of_the_modules(mode: str, norm: str) -> None:
    config = tiny_config(residual=mode, norm=norm, layers=3)
    model = Transformer(config, VOCAB, seed=0)
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert built == parameter_shapes(config, VOCAB)
    assert has_final_norm(config) == (mode not in POST) == ("final_norm" in layer_names(config))
    assert ("layers.2.attention_norm.weight" in built) == (mode not in ("postnorm", "outnorm", "deepnorm"))
    assert ("layers.2.feed_forward_out_norm.weight" in built) == (mode in ("peri", "outnorm"))
    assert ("layers.0.attention_post_norm.weight" in built) == (mode in ("postnorm", "deepnorm"))
    assert ("final_norm.bias" in built) == (norm == "layernorm" and mode not in POST)


@pytest.mark.parametrize("mode", MODES)
def test_auto_is_prenorm_as_far_as_the_rate_was_found_and_scaled_beyond(mode: str) -> None:
    assert ModelConfig(layers=12).residual_mode == "prenorm"
    assert ModelConfig(layers=13).residual_mode == "scaled"
    assert ModelConfig.model_validate({"layers": 13, "residual": mode}).residual_mode == mode
