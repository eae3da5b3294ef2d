"""Rotary positions (RoFormer, arXiv 2104.09864), restarting at every document of a packed row."""

from __future__ import annotations

import torch
from torch import Tensor


def document_positions(document_ids: Tensor) -> Tensor:
    """Position of each token within its document.

    Args:
        document_ids: (B, T) integers; a document is a run of equal numbers, padding (-1) is a run too.

    Returns:
        (B, T) int64, 0 at the first token of every run.
    """
    index = torch.arange(document_ids.shape[1], device=document_ids.device)
    first = torch.cummax(torch.where(_begins(document_ids), index, 0), dim=1).values
    return index - first


def document_numbers(document_ids: Tensor) -> Tensor:
    """(B, T) of runs of equal numbers -> (B, T) int64, 0, 1, ... of each row: a number that comes again is that of
    another document."""
    return _begins(document_ids).cumsum(dim=1) - 1


def _begins(document_ids: Tensor) -> Tensor:
    """(B, T) -> (B, T) bool, true at the first token of every run."""
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return begins


def rope_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * theta^(-2i/E), i = 0 .. E/2 - 1.

    Computed afresh in fp32: a buffer would be cast to bf16 with the module, and bf16 cannot tell position
    256 from 257.

    Args:
        positions: (B, T) integers.

    Returns:
        Two (B, 1, T, E/2) fp32 tensors, broadcast over heads.
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / theta ** (pairs / head_dim)
    angles = positions[:, None, :, None].float() * frequencies
    return angles.cos(), angles.sin()


def grid_rope_tables(positions: Tensor, columns: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """`rope_tables` on a grid: of the row theta^(-2i/(E/2)), i = 0 .. E/4 - 1, in the first half of the angles, and of
    the column likewise in the second (RoPE-Axial, arXiv 2403.13298; as in Qwen2-VL, 2409.12191). With `rotate`'s pairs
    half of a head's channels tell the row and half the column, and a logit depends on the differences of both alone.

    Args:
        positions: (B, N) integers, row by row.
        columns: of the grid.
        head_dim: E, a multiple of 4.

    Returns:
        Two (B, 1, N, E/2) fp32 tensors, broadcast over heads.
    """
    of_row, of_column = (
        rope_tables(places, head_dim // 2, theta) for places in (positions // columns, positions % columns)
    )
    return torch.cat((of_row[0], of_column[0]), dim=-1), torch.cat((of_row[1], of_column[1]), dim=-1)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + E/2}) by their angles, in fp32; the pairing is that of Llama and Qwen.

    Args:
        x: (B, heads, T, E).
        cosine, sine: (B, 1, T, E/2).

    Returns:
        (B, heads, T, E) in the dtype of x.
    """
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
    return turned.to(x.dtype)
