"""Folds of residual forms against the models they come from, in float64; what no stock class holds is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from solomonov.interop import export_refusal, folded
from solomonov.model.config import ModelConfig
from solomonov.model.counts import parameter_shapes
from solomonov.model.transformer import Transformer
from tests.solomonov.model.common import VOCAB, random_ids, spread_model, tiny_config


def _logits(config: ModelConfig, state: dict[str, Tensor]) -> Tensor:
    model = Transformer(config, VOCAB, seed=None).double()
    model.load_state_dict(state)
    ids = random_ids(2, 9)
    found: Tensor = model(ids, torch.zeros_like(ids)).detach()
    return found


@pytest.mark.parametrize("mode", ["prenorm", "scaled", "lns", "layerscale", "rezero"])
def test_a_folded_model_is_a_plain_one_with_the_same_logits(mode: str) -> None:
    config = tiny_config(residual=mode, layers=4, base_layers=2)
    assert export_refusal(config) is None
    state = {name: value.detach().double() for name, value in spread_model(config).named_parameters()}
    plain = config.model_copy(update={"residual": "prenorm"})
    found = folded(state, config)
    assert list(found) == list(parameter_shapes(plain, VOCAB))
    # The norms compute in fp32, and a gain that was multiplied first rounds once more.
    torch.testing.assert_close(_logits(plain, found), _logits(config, state), rtol=1e-5, atol=1e-5)
    if mode != "prenorm":
        as_it_was = {name: state[name] for name in found}
        assert not torch.allclose(_logits(plain, as_it_was), _logits(config, state), rtol=0.1)


@pytest.mark.parametrize("mode", ["postnorm", "peri", "deepnorm", "keel"])
def test_forms_that_do_not_fold_are_refused_by_name(mode: str) -> None:
    refusal = export_refusal(tiny_config(residual=mode, layers=3))
    assert refusal is not None
    assert refusal.got == f"model.residual: {mode}"
    assert "model.residual: auto" in refusal.remedy


@pytest.mark.parametrize(("key", "value"), [("norm", "layernorm"), ("feed_forward", "gelu"), ("feed_forward", "relu2")])
def test_other_norms_and_feed_forwards_are_refused_by_name(key: str, value: str) -> None:
    refusal = export_refusal(tiny_config(**{key: value}))
    assert refusal is not None
    assert refusal.got == f"model.{key}: {value}"
