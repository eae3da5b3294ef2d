"""Which layouts are legal: ZeRO stage, precision and number of ranks, before anything is allocated."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from solomonov.errors import ConfigurationError
from solomonov.section import Section


class ParallelConfig(Section):
    """How parameters, gradients and optimizer state are laid out over the ranks."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed partitions over the data-parallel ranks: 0 nothing, 1 optimizer state, 2 and gradients,
    3 and parameters."""
    pipeline: int = Field(default=1, ge=1)
    """Pipeline stages. Only 1 can be asked for in this release."""
    sequence: int = Field(default=1, ge=1)
    """Ranks that share one row (sequence parallel). Only 1 can be asked for in this release."""
    offload: Literal["none"] = "none"
    """Where optimizer state lives; only the device's own memory in this release."""


def check_layout(parallel: ParallelConfig, *, precision: str, world: int) -> int:
    """Data-parallel ranks of a legal layout.

    Args:
        precision: the resolved precision: fp32, bf16 or bf16_autocast.
        world: number of ranks.

    Raises:
        ConfigurationError: the layout is illegal; the message names the nearest legal one.
    """
    for key, degree in (("pipeline", parallel.pipeline), ("sequence", parallel.sequence)):
        if degree != 1:
            raise ConfigurationError(
                f"parallel.{key} cannot be more than 1 in this release",
                got=f"parallel.{key}: {degree}",
                rule=f"parallel.{key} must be 1",
                remedy=f"remove parallel.{key}, or set it to 1, and let the ranks be data-parallel",
            )
    if precision == "bf16" and parallel.zero_stage == 0:
        raise ConfigurationError(
            "bf16 parameters need ZeRO stage 1 or higher",
            got=f"parallel.zero_stage: 0 with precision {precision}",
            rule="at stage 0 DeepSpeed takes a hidden optimizer step at start, which changes the run's numbers",
            remedy="set parallel.zero_stage to 1 (right on one rank as well), or training.precision to bf16_autocast",
        )
    return world
