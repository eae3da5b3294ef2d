"""Order told otherwise than by rotation: sinusoids in the stream, ALiBi's slopes, and the number of keys in sight."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """sin(position / 10000^(2i/D)) at channel 2i and its cosine at 2i + 1 (arXiv 1706.03762, section 3.5).

    Args:
        positions: (B, T) integers.
        width: D; of an odd one the last cosine is left out.

    Returns:
        (B, T, D) fp32.
    """
    # In fp32 the angle of position 1,000 would be wrong by up to 6e-5.
    channels = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device)
    angles = positions[..., None].double() * 10_000.0 ** (-channels / width)
    return torch.stack((angles.sin().float(), angles.cos().float()), dim=-1).flatten(-2)[..., :width]


def grid_sinusoids(positions: Tensor, columns: int, width: int) -> Tensor:
    """`sinusoids` of the row in the first half of the channels, and of the column in the second one (DETR, arXiv
    2005.12872, appendix; MAE, 2111.06377, has the same).

    Args:
        positions: (B, N) integers, row by row.
        columns: of the grid.
        width: D; of an odd one the second half has one channel more.

    Returns:
        (B, N, D) fp32.
    """
    halves = sinusoids(positions // columns, width // 2), sinusoids(positions % columns, width - width // 2)
    return torch.cat(halves, dim=-1)


def alibi_slopes(heads: int) -> list[float]:
    """m_h of all heads: 2^(-8 (h + 1) / H) for H a power of 2 (arXiv 2108.12409, section 3).

    Other numbers take those of the next lower power of 2, and then every second one of the next higher one, as the
    authors' code does.
    """
    lower = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (head + 1) / lower) for head in range(lower)]
    between = [2.0 ** (-8.0 * (head + 1) / (2 * lower)) for head in range(0, 2 * lower, 2)]
    return (slopes + between)[:heads]


def log_visible(positions: Tensor) -> Tensor:
    """ln of the number of keys that a query sees which sees all of its document so far (arXiv 2501.19399).

    Args:
        positions: (B, T) integers, from 0 within the document.

    Returns:
        (B, 1, T, 1) fp32, broadcast over heads and channels.
    """
    return (positions[:, None, :, None] + 1).float().log()


def log_scale_start(train_tokens: int) -> float:
    """s_h at the start: 1 / ln(T), which leaves the logits of the last token of a row of T as they are."""
    return 1.0 / math.log(train_tokens)
