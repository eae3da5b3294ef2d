"""The forms of the residual against the papers' own sentences: constants, initial values, which norms there are."""

from __future__ import annotations

import math

import pytest
import torch

from solomonov.model.config import ModelConfig
from solomonov.model.counts import parameter_shapes
from solomonov.model.init import initial_value
from solomonov.model.naming import layer_names
from solomonov.model.residual import MODES, BranchForm, branch_form, has_final_norm, learned_scale_start
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


@pytest.mark.parametrize(
    ("layers", "encoder_layers", "encoder", "decoder"),
    [
        # 0.81 (N^4 M)^(1/16), 0.87 (N^4 M)^(-1/16); (3M)^(1/4), (12M)^(-1/4), of figure 2.
        (16, 16, (0.81 * 2**1.25, 0.87 * 2**-1.25), (48**0.25, 192**-0.25)),
        (1, 256, (0.81 * 4, 0.87 / 4), (3**0.25, 12**-0.25)),
        (256, 1, (0.81 * 2**0.5, 0.87 * 2**-0.5), (768**0.25, 3072**-0.25)),
    ],
)
def test_constants_of_deepnorm_with_two_stacks(
    layers: int, encoder_layers: int, encoder: tuple[float, float], decoder: tuple[float, float]
) -> None:
    config = tiny_config(
        architecture="encoder_decoder", residual="deepnorm", layers=layers, encoder_layers=encoder_layers, d_model=128
    )
    for stack, (alpha, beta) in zip(config.stacks, (encoder, decoder), strict=True):
        assert branch_form(config, 0, stack).alpha == pytest.approx(alpha, rel=1e-6)
        names = [f"{branch}.{part}" for branch in stack.branches[:-1] for part in ("v", "out")]
        for name in [*names, "feed_forward.up", "feed_forward.down"]:
            value = initial_value(f"{stack.prefix}layers.0.{name}.weight", (128, 128), config, 3)
            assert float(value.std()) == pytest.approx(beta / math.sqrt(128), rel=0.03), name
        for branch in stack.branches[:-1]:
            value = initial_value(f"{stack.prefix}layers.0.{branch}.k.weight", (128, 128), config, 3)
            assert float(value.std()) == pytest.approx(1 / math.sqrt(128), rel=0.03), branch
    # An encoder by itself is a stack like a decoder's: (2N)^(1/4).
    alone = tiny_config(architecture="encoder", residual="deepnorm", layers=8)
    assert branch_form(alone, 0).alpha == pytest.approx(2.0)


def test_of_two_stacks_each_goes_by_its_own_depth_and_branches() -> None:
    def forms(mode: str, layer: int) -> list[BranchForm]:
        config = tiny_config(
            architecture="encoder_decoder", residual=mode, layers=6, encoder_layers=16, base_layers=3, d_model=128
        )
        return [branch_form(config, layer, stack) for stack in config.stacks]

    assert [form.scale for form in forms("scaled", 0)] == [3 / 16, 3 / 6]
    assert [form.alpha for form in forms("keel", 0)] == [1.0, 1.0]
    assert [form.alpha for form in forms("keel", 5)] == [32.0, 18.0]
    assert [form.inner for form in forms("lns", 3)] == [0.5, 0.5]
    config = tiny_config(architecture="encoder_decoder", residual="prenorm", layers=6, encoder_layers=16, d_model=128)
    for prefix, branch, sublayers in (
        ("encoder.", "attention", 32),
        ("", "attention", 18),
        ("", "cross_attention", 18),
    ):
        value = initial_value(f"{prefix}layers.0.{branch}.out.weight", (128, 128), config, 0)
        assert float(value.std()) == pytest.approx(1 / math.sqrt(128 * sublayers), rel=0.03)
    config = tiny_config(architecture="encoder_decoder", residual="layerscale", layers=3, encoder_layers=20)
    for name, start in (("encoder.layers.0.attention_scale", 1e-5), ("layers.0.cross_attention_scale", 0.1)):
        assert torch.equal(initial_value(name, (16,), config, 0), torch.full((16,), start))


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
    assert learned_scale_start(config, config.stacks[-1]) == start
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
def test_names_of_two_stacks_are_those_of_the_modules(mode: str) -> None:
    config = tiny_config(architecture="encoder_decoder", residual=mode, layers=3, encoder_layers=2, norm="layernorm")
    model = Transformer(config, VOCAB, seed=0)
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert list(built.items()) == list(parameter_shapes(config, VOCAB).items())
    assert ("encoder.final_norm.bias" in built) == ("final_norm.bias" in built) == (mode not in POST)
    for prefix, branch in (("", "attention"), ("", "cross_attention"), ("encoder.", "attention")):
        of_branch = {name.removeprefix(f"{prefix}layers.1.") for name in built if f"{prefix}layers.1." in name}
        assert (f"{branch}_norm.weight" in of_branch) == (mode not in ("postnorm", "deepnorm", "outnorm"))
        assert (f"{branch}_out_norm.weight" in of_branch) == (mode in ("peri", "outnorm"))
        assert (f"{branch}_post_norm.weight" in of_branch) == (mode in POST)
        assert (f"{branch}_scale" in of_branch) == (mode in ("layerscale", "rezero"))
    assert not any("cross" in name for name in built if name.startswith("encoder."))


@pytest.mark.parametrize("mode", MODES)
def test_auto_is_prenorm_as_far_as_the_rate_was_found_and_scaled_beyond(mode: str) -> None:
    assert ModelConfig(layers=12).residual_mode == "prenorm"
    assert ModelConfig(layers=13).residual_mode == "scaled"
    assert ModelConfig.model_validate({"layers": 13, "residual": mode}).residual_mode == mode


@pytest.mark.parametrize(
    ("layers", "encoder_layers", "mode"),
    [(12, 12, "prenorm"), (12, 13, "scaled"), (99, 1, "scaled"), (100, 1, "deepnorm"), (1, 100, "deepnorm")],
)
def test_auto_of_two_stacks_goes_by_the_deeper_one(layers: int, encoder_layers: int, mode: str) -> None:
    shape = {"architecture": "encoder_decoder", "layers": layers, "encoder_layers": encoder_layers}
    assert ModelConfig.model_validate(shape).residual_mode == mode
    assert ModelConfig.model_validate({"architecture": "encoder", "layers": 100}).residual_mode == "scaled"
    assert ModelConfig.model_validate({**shape, "parameterization": "completep"}).residual_mode == "scaled"
