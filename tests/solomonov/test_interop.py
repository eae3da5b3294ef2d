"""Folds of residual forms and of other classes' factors against the models they come from, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from solomonov.interop import folded, to_ours, to_theirs
from solomonov.interop_families import Multipliers, family_of
from solomonov.model.config import ModelConfig
from solomonov.model.counts import parameter_shapes
from solomonov.model.transformer import Transformer
from tests.solomonov.model.common import BIASES, VOCAB, random_ids, random_source, spread_model, tiny_config


def _logits(config: ModelConfig, state: dict[str, Tensor]) -> Tensor:
    model = Transformer(config, VOCAB, seed=None).double()
    model.load_state_dict(state)
    ids = random_ids(2, 9)
    source = random_source(2, 5) if config.architecture == "encoder_decoder" else None
    found: Tensor = model(ids, torch.zeros_like(ids), source=source).detach()
    return found


def _state(config: ModelConfig) -> dict[str, Tensor]:
    return {name: value.detach().double() for name, value in spread_model(config).named_parameters()}


@pytest.mark.parametrize("mode", ["prenorm", "scaled", "lns", "layerscale", "rezero"])
def test_a_folded_model_is_a_plain_one_with_the_same_logits(mode: str) -> None:
    config = tiny_config(residual=mode, layers=4, base_layers=2)
    state = _state(config)
    plain = config.model_copy(update={"residual": "prenorm"})
    found = folded(state, config)
    assert list(found) == list(parameter_shapes(plain, VOCAB))
    # The norms compute in fp32, and a gain that was multiplied first rounds once more.
    torch.testing.assert_close(_logits(plain, found), _logits(config, state), rtol=1e-5, atol=1e-5)
    if mode != "prenorm":
        as_it_was = {name: state[name] for name in found}
        assert not torch.allclose(_logits(plain, as_it_was), _logits(config, state), rtol=0.1)


def test_what_is_normed_after_the_branch_stays_as_it_is() -> None:
    config = tiny_config(residual="peri", layers=3)
    state = _state(config)
    assert all(torch.equal(tensor, state[name]) for name, tensor in folded(state, config).items())
    assert folded(state, config).keys() == state.keys()


@pytest.mark.parametrize("mode", ["postnorm", "deepnorm"])
@pytest.mark.parametrize("architecture", ["encoder", "encoder_decoder"])
def test_a_folded_model_of_biases_is_a_plain_one(architecture: str, mode: str) -> None:
    """In float64 and with an eps that is nothing, but for what the norms round."""
    config = tiny_config(**BIASES | {"residual": mode, "architecture": architecture, "layers": 3, "norm_eps": 1e-12})
    state = _state(config)
    plain = config.model_copy(update={"residual": "postnorm"})
    found = folded(state, config)
    assert found.keys() == state.keys()
    torch.testing.assert_close(_logits(plain, found), _logits(config, state), rtol=1e-5, atol=1e-5)
    if mode == "deepnorm":
        assert not torch.allclose(_logits(plain, state), _logits(config, state), rtol=0.1)


@pytest.mark.parametrize("mode", ["lns", "layerscale", "rezero", "scaled"])
def test_factors_reach_biases_as_well(mode: str) -> None:
    config = tiny_config(**BIASES | {"residual": mode, "layers": 3, "base_layers": 2})
    state, plain = _state(config), config.model_copy(update={"residual": "prenorm"})
    found = folded(state, config)
    torch.testing.assert_close(_logits(plain, found), _logits(config, state), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    model_type=st.sampled_from(["llama", "qwen3", "smollm3", "gemma2", "gemma3_text", "olmo2"]),
    layers=st.integers(1, 4),
    tied=st.booleans(),
    seed=st.integers(0, 99),
)
def test_weights_come_back_from_a_class_as_they_went(model_type: str, layers: int, tied: bool, seed: int) -> None:
    family = family_of(model_type)
    assert family is not None
    config = tiny_config(
        layers=layers,
        tie_embeddings=tied,
        residual=family.residual,
        attention={
            "qk_norm": family.qk_norm != "none",
            "qk_norm_over": "all" if family.qk_norm == "all" else "head",
            "position": "nope" if family.bare_layers else "rope",
        },
    )
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) for name, shape in parameter_shapes(config, VOCAB).items()}
    sent = to_theirs(state, config, family)
    assert len(sent) == len(state) + (family.gemma and tied)
    read = config.model_copy(update={"tie_embeddings": tied and not family.gemma})
    back = {name: sent[family.name_of(name)] for name in parameter_shapes(read, VOCAB)}
    factors = Multipliers(embedding=config.d_model**0.5) if family.gemma else Multipliers()
    found = to_ours(back, read, family, factors)
    state.setdefault("head.weight", state["embedding.weight"])
    for name in parameter_shapes(read, VOCAB):
        torch.testing.assert_close(found[name], state[name], rtol=1e-6, atol=3e-7)


@settings(deadline=None, max_examples=25)
@given(
    embedding=st.floats(0.1, 20.0),
    query=st.floats(0.1, 4.0),
    branch=st.floats(0.1, 2.0),
    head=st.floats(0.1, 4.0),
    qk_norm=st.booleans(),
)
def test_factors_outside_of_the_weights_are_folded_into_them(
    embedding: float, query: float, branch: float, head: float, qk_norm: bool
) -> None:
    """Against the same model with the factors applied on their way."""
    family = family_of("qwen3" if qk_norm else "granite")
    assert family is not None
    config = tiny_config(attention={"qk_norm": qk_norm}, layers=3)
    state = _state(config)
    model = Transformer(config, VOCAB, seed=None).double()
    model.load_state_dict(state)
    model.embedding.register_forward_hook(lambda _, __, out: embedding * out)
    model.head.register_forward_hook(lambda _, __, out: head * out)
    for block in model.layers:
        place = block.attention.q_norm if qk_norm else block.attention.q
        place.register_forward_hook(lambda _, __, out: query * out)
        block.attention.register_forward_hook(lambda _, __, out: branch * out)
        block.feed_forward.register_forward_hook(lambda _, __, out: branch * out)
    ids = random_ids(2, 9)
    expected = model(ids, torch.zeros_like(ids)).detach()
    found = to_ours(state, config, family, Multipliers(embedding, query, branch, head))
    torch.testing.assert_close(_logits(config, found), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
