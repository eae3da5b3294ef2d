"""What moves over a run. Learning-rate schedules: pure functions of the update's index, so that resuming needs no
state."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from solomonov.section import Section
from solomonov.warmup import WarmupConfig


class ScheduleConfig(Section):
    """How learning rate, batch and row length move over the run."""

    kind: Literal["wsd", "cosine", "inverse_sqrt"] = "wsd"
    """`wsd`: warm up, stay, decay linearly at the end; `cosine`: warm up, then half a cosine; `inverse_sqrt`: warm up,
    then fall as one over the root of the step, which needs no end (Vaswani et al., arXiv 1706.03762, section 5.3)."""
    warmup_steps: int = Field(default=100, ge=0)
    """Updates over which the rate rises linearly from 0 to `optimizer.lr`."""
    decay_fraction: float = Field(default=0.2, gt=0.0, le=1.0)
    """Share of all updates over which `wsd` decays, at the end of the run."""
    decay_steps: int | None = Field(default=None, ge=1)
    """Updates over which `wsd` decays, at the end of the run, instead of `decay_fraction` of them; null: that."""
    final_lr_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """The rate that the decay would reach one update after the last, as a share of `optimizer.lr`."""
    batch_warmup: WarmupConfig | None = None
    """{from_tokens, tokens}: updates of `from_tokens` at first, and of `training.global_batch_tokens` after so many
    tokens (row positions) of the run; in between of multiples of the first, along a straight line. The learning rate
    follows the updates all the same. null: whole batches from the start."""
    sequence_warmup: WarmupConfig | None = None
    """{from_tokens, tokens}: attention reaches within pieces of `from_tokens` at first, and of `data.sequence_tokens`
    after so many tokens (row positions); in between over the divisors of that, along a straight line. Rows stay as they
    are, and every token of them is trained on; evaluation is always on whole rows. null: whole rows from the start."""

    @model_validator(mode="after")
    def _says_nothing_in_vain(self) -> Self:
        if self.decay_steps is not None and self.kind != "wsd":
            raise ValueError(
                f"schedule.decay_steps is {self.decay_steps} with schedule.kind {self.kind}: only wsd decays over so"
                " many updates; remove schedule.decay_steps, or set schedule.kind to wsd"
            )
        if self.final_lr_ratio and self.kind == "inverse_sqrt":
            raise ValueError(
                f"schedule.final_lr_ratio is {self.final_lr_ratio:g} with schedule.kind inverse_sqrt, which has no end"
                " to reach it at; remove schedule.final_lr_ratio, or choose wsd or cosine"
            )
        return self

    def decay_length(self, total_steps: int) -> int:
        """Updates over which `wsd` decays in a run of so many, at least 1, and none of them of the warm-up."""
        wanted = self.decay_steps or round(total_steps * self.decay_fraction)
        return max(1, min(wanted, total_steps - self.warmup_steps))


def lr_factor(schedule: ScheduleConfig, update: int, total_steps: int) -> float:
    """Factor in [0, 1] on the peak rate for update number `update` (0-based) of `total_steps`.

    With s = update + 1, the number of the update in the records, W = `warmup_steps`, N = `total_steps`, D = the updates
    of the decay and f = `final_lr_ratio`:

    * warm-up, s <= W: s / W, so that the first update is not lost to a zero rate
    * wsd (Hu et al., arXiv 2404.06395): f + (1 - f) min(1, (N - update) / D)
    * cosine (Loshchilov & Hutter, arXiv 1608.03983): f + (1 - f) (1 + cos(pi (update - W) / (N - W))) / 2
    * inverse_sqrt (Vaswani et al., arXiv 1706.03762, section 5.3, with the peak at `optimizer.lr`): sqrt(W / s),
      without a warm-up 1 / sqrt(s)

    The decay of the first two reaches f at update N, one after the last, for the same reason as the warm-up's.
    """
    assert 0 <= update < total_steps, f"update {update} is outside 0..{total_steps - 1}"
    if update < schedule.warmup_steps:
        return (update + 1) / schedule.warmup_steps
    if schedule.kind == "inverse_sqrt":
        return math.sqrt(max(1, schedule.warmup_steps) / (update + 1))
    if schedule.kind == "wsd":
        remaining = min(1.0, (total_steps - update) / schedule.decay_length(total_steps))
    else:
        progress = (update - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps)
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    return schedule.final_lr_ratio + (1.0 - schedule.final_lr_ratio) * remaining
