"""Small models and rows that several tests of the model use."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from solomonov.model.config import ModelConfig
from solomonov.model.cross import Source
from solomonov.model.transformer import Transformer

VOCAB = 23

ATTENTION: dict[str, dict[str, Any]] = {
    "vanilla": {"preset": "vanilla"},
    "rope": {"preset": "rope"},
    "alibi": {"preset": "alibi"},
    "local": {"preset": "local", "window_tokens": 3, "pattern": "LG"},
    "hybrid": {"preset": "hybrid", "window_tokens": 4, "pattern": "LG", "train_tokens": 12},
    "all local": {"position": "alibi", "window_tokens": 3, "sink": True, "output_gate": "head"},
    "normed together": {"qk_norm_over": "all"},
    "much at once": {"preset": "hybrid", "window_tokens": 5, "pattern": "LG", "global_position": "alibi", "sink": True},
}
"""The presets, and flags that none of them has, with windows that rows of a test outgrow."""


BIASES: dict[str, Any] = {
    "bias": True,
    "norm": "layernorm",
    "residual": "postnorm",
    "feed_forward": "gelu",
    "embedding_norm": True,
    "output_head": "transform",
    "attention": {"position": "learned", "train_tokens": 32, "qk_norm": False},
}
"""All that has a bias, and positions that are learned, as in BERT."""


def tiny_config(**changes: Any) -> ModelConfig:
    """Two layers, width 16, four heads on two key-value heads; attention of the preset `rope` where none is given."""
    attention = {"preset": "rope"} | changes.pop("attention", {})
    shape = {"layers": 2, "d_model": 16, "heads": 4, "kv_heads": 2, "d_ff": 24, "attention": attention}
    return ModelConfig.model_validate(shape | changes)


def two_stacks(**changes: Any) -> ModelConfig:
    """`tiny_config` behind an encoder of three layers."""
    return tiny_config(**{"architecture": "encoder_decoder", "encoder_layers": 3, "residual": "prenorm"} | changes)


def spread_model(config: ModelConfig, *, seed: int = 3, **options: Any) -> Transformer:
    """A model whose every parameter is far from its initial value, norm gains included."""
    model = Transformer(config, VOCAB, seed=seed, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def float64_state(model: Transformer) -> dict[str, NDArray[np.float64]]:
    """Canonical name -> float64 array."""
    return {name: value.detach().double().numpy() for name, value in model.named_parameters()}


def random_source(rows: int, tokens: int, seed: int = 2) -> Source:
    """Rows of one document each."""
    ids = random_ids(rows, tokens, seed)
    return Source(ids, torch.zeros_like(ids))


def random_ids(rows: int, tokens: int, seed: int = 0) -> Tensor:
    """(rows, tokens) int32 token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (rows, tokens), generator=generator, dtype=torch.int32)
