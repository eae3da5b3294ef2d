"""Norms over the last dimension, computed in fp32."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from solomonov.model.config import ModelConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in fp32 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width) in the dtype of x."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight.float()).to(x.dtype)


class StreamNorm(RMSNorm):
    """A norm of the residual stream: RMSNorm, or LayerNorm, (x - mean) / sqrt(variance + eps) * weight + bias (arXiv
    1607.06450), as `model.norm` says."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.d_model, config.norm_eps)
        self.bias = nn.Parameter(torch.empty(config.d_model)) if config.norm == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D) in the dtype of x."""
        if self.bias is None:
            return super().forward(x)
        gain, shift = self.weight.float(), self.bias.float()
        return functional.layer_norm(x.float(), gain.shape, gain, shift, self.eps).to(x.dtype)
