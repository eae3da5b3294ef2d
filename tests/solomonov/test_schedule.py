"""Learning-rate factors against their closed forms, and the properties that any schedule must have."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solomonov.schedule import ScheduleConfig, lr_factor

CONFIGS = st.builds(
    ScheduleConfig,
    kind=st.sampled_from(["wsd", "cosine"]),
    warmup_steps=st.integers(0, 40),
    decay_fraction=st.floats(0.05, 1.0),
    final_lr_ratio=st.floats(0.0, 1.0),
)


def test_wsd_by_hand() -> None:
    schedule = ScheduleConfig(kind="wsd", warmup_steps=2, decay_fraction=0.4, final_lr_ratio=0.0)
    factors = [lr_factor(schedule, update, 10) for update in range(10)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_cosine_by_hand() -> None:
    schedule = ScheduleConfig(kind="cosine", warmup_steps=2, final_lr_ratio=0.1)
    expected = [0.5, 1.0, *(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8))]
    assert [lr_factor(schedule, update, 10) for update in range(10)] == pytest.approx(expected)


@given(CONFIGS, st.integers(1, 200))
def test_bounded_and_rising_then_falling(schedule: ScheduleConfig, total: int) -> None:
    factors = [lr_factor(schedule, update, total) for update in range(total)]
    assert all(0.0 <= factor <= 1.0 for factor in factors)
    assert factors[0] > 0.0
    top = min(schedule.warmup_steps, total)
    assert factors[:top] == sorted(factors[:top])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert all(factor >= schedule.final_lr_ratio - 1e-12 for factor in factors[top:])


@given(CONFIGS, st.integers(50, 200))
def test_peak_follows_warmup_and_last_update_is_near_the_final_ratio(schedule: ScheduleConfig, total: int) -> None:
    assert lr_factor(schedule, schedule.warmup_steps, total) == pytest.approx(1.0)
    decay = max(1, min(round(total * schedule.decay_fraction), total - schedule.warmup_steps))
    last = lr_factor(schedule, total - 1, total)
    room = 1.0 - schedule.final_lr_ratio
    assert last - schedule.final_lr_ratio <= room * (1.0 / decay if schedule.kind == "wsd" else 0.26) + 1e-12


def test_an_update_outside_the_run_is_a_programming_error() -> None:
    with pytest.raises(AssertionError, match="outside"):
        lr_factor(ScheduleConfig(), 10, 10)
