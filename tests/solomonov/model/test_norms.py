"""Norms against float64 formulas, and their precision in bf16."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from solomonov.model.norms import RMSNorm, StreamNorm
from tests.solomonov.model.common import tiny_config
from tests.support import naive


def _filled(module: nn.Module) -> nn.Module:
    """With values that no initialisation gives."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_a_norm_of_the_stream_equals_its_formula(kind: str, size: float) -> None:
    config = tiny_config(norm=kind, norm_eps=1e-6)
    norm = _filled(StreamNorm(config))
    state = {f"n.{name}": value.detach().double().numpy() for name, value in norm.named_parameters()}
    assert len(state) == (2 if kind == "layernorm" else 1)
    x = (torch.randn(5, config.d_model, generator=torch.Generator().manual_seed(0)) + 0.5) * size
    for row in range(5):
        expected = naive.norm(state, "n", config, x[row].double().numpy())
        np.testing.assert_allclose(norm(x)[row].detach().numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_rms_norm_equals_its_formula(size: float) -> None:
    norm = _filled(RMSNorm(12, 1e-6))
    gain = next(norm.parameters()).detach().double().numpy()
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)) * size
    for row in range(5):
        expected = naive.rms_norm(x[row].double().numpy(), gain, 1e-6)
        np.testing.assert_allclose(norm(x)[row].detach().numpy(), expected, rtol=2e-6)


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_bf16_is_normed_in_fp32(kind: str) -> None:
    config = tiny_config(norm=kind, d_model=64)
    norm = _filled(StreamNorm(config)).bfloat16()
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    wide = StreamNorm(config)
    wide.load_state_dict({name: value.float() for name, value in norm.state_dict().items()})
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), wide(x.float()).bfloat16())
