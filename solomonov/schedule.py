"""Learning-rate schedules: pure functions of the update's index, so that resuming needs no state."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from solomonov.section import Section


class ScheduleConfig(Section):
    """How the learning rate moves over the run."""

    kind: Literal["wsd", "cosine"] = "wsd"
    """`wsd`: warm up, stay, decay linearly over the last `decay_fraction`; `cosine`: warm up, then half a cosine."""
    warmup_steps: int = Field(default=100, ge=0)
    """Updates over which the rate rises linearly from 0 to `optimizer.lr`."""
    decay_fraction: float = Field(default=0.2, gt=0.0, le=1.0)
    """Share of all updates over which `wsd` decays, at the end of the run."""
    final_lr_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """The rate that the decay would reach one update after the last, as a share of `optimizer.lr`."""


def lr_factor(schedule: ScheduleConfig, update: int, total_steps: int) -> float:
    """Factor in [0, 1] on the peak rate for update number `update` (0-based) of `total_steps`.

    Warm-up uses (update + 1) / warmup_steps, so that the first update is not lost to a zero rate; the decay reaches
    `final_lr_ratio` at update `total_steps`, one after the last, for the same reason.
    """
    assert 0 <= update < total_steps, f"update {update} is outside 0..{total_steps - 1}"
    if update < schedule.warmup_steps:
        return (update + 1) / schedule.warmup_steps
    if schedule.kind == "wsd":
        decay_steps = max(1, min(round(total_steps * schedule.decay_fraction), total_steps - schedule.warmup_steps))
        remaining = min(1.0, (total_steps - update) / decay_steps)
    else:
        progress = (update - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps)
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    return schedule.final_lr_ratio + (1.0 - schedule.final_lr_ratio) * remaining
