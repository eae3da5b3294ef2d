"""Learning-rate factors against their closed forms, and the properties that any schedule must have."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from solomonov.schedule import ScheduleConfig, lr_factor

ENDING = st.builds(
    ScheduleConfig,
    kind=st.sampled_from(["wsd", "cosine"]),
    warmup_steps=st.integers(0, 40),
    decay_fraction=st.floats(0.05, 1.0),
    final_lr_ratio=st.floats(0.0, 1.0),
)
ENDLESS = st.builds(ScheduleConfig, kind=st.just("inverse_sqrt"), warmup_steps=st.integers(0, 40))


def test_wsd_by_hand() -> None:
    schedule = ScheduleConfig(kind="wsd", warmup_steps=2, decay_fraction=0.4, final_lr_ratio=0.0)
    factors = [lr_factor(schedule, update, 10) for update in range(10)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_wsd_decays_over_so_many_updates_as_it_is_told() -> None:
    schedule = ScheduleConfig(kind="wsd", warmup_steps=2, decay_fraction=0.4, decay_steps=2, final_lr_ratio=0.5)
    assert [lr_factor(schedule, update, 6) for update in range(6)] == pytest.approx([0.5, 1, 1, 1, 1, 0.75])


def test_a_decay_that_begins_now_starts_from_the_rate_that_it_finds() -> None:
    """From step 40 of a long run, eight updates down: the same rate before as without it, then eighths of it."""
    long, now = ScheduleConfig(warmup_steps=4), ScheduleConfig(warmup_steps=4, decay_steps=8)
    assert [lr_factor(now, update, 48) for update in range(40)] == [
        lr_factor(long, update, 1000) for update in range(40)
    ]
    assert [lr_factor(now, update, 48) for update in range(40, 48)] == pytest.approx([k / 8 for k in range(8, 0, -1)])


@given(st.integers(1, 60), st.integers(1, 300), st.floats(1e-5, 1.0))
def test_inverse_sqrt_is_the_rate_of_the_transformer_paper(warmup: int, total: int, peak: float) -> None:
    """lr = c min(s^-0.5, s W^-1.5) for s = 1, 2, ...; c such that the rate at s = W is the peak."""
    schedule = ScheduleConfig(kind="inverse_sqrt", warmup_steps=warmup)
    constant = peak * warmup**0.5
    expected = [constant * min(s**-0.5, s * warmup**-1.5) for s in range(1, total + 1)]
    assert [peak * lr_factor(schedule, update, total) for update in range(total)] == pytest.approx(expected, rel=1e-12)


def test_inverse_sqrt_without_warm_up_begins_at_the_peak() -> None:
    schedule = ScheduleConfig(kind="inverse_sqrt", warmup_steps=0)
    assert [lr_factor(schedule, update, 9) for update in (0, 3, 8)] == pytest.approx([1, 1 / 2, 1 / 3])


@pytest.mark.parametrize(
    ("given_keys", "words"),
    [
        ({"kind": "cosine", "decay_steps": 5}, "only wsd decays"),
        ({"kind": "inverse_sqrt", "decay_steps": 5}, "only wsd decays"),
        ({"kind": "inverse_sqrt", "final_lr_ratio": 0.1}, "has no end"),
    ],
)
def test_a_key_that_would_do_nothing_is_refused(given_keys: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        ScheduleConfig.model_validate(given_keys)


def test_cosine_by_hand() -> None:
    schedule = ScheduleConfig(kind="cosine", warmup_steps=2, final_lr_ratio=0.1)
    expected = [0.5, 1.0, *(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8))]
    assert [lr_factor(schedule, update, 10) for update in range(10)] == pytest.approx(expected)


@given(ENDING | ENDLESS, st.integers(1, 200))
def test_bounded_and_rising_then_falling(schedule: ScheduleConfig, total: int) -> None:
    factors = [lr_factor(schedule, update, total) for update in range(total)]
    assert all(0.0 <= factor <= 1.0 for factor in factors)
    assert factors[0] > 0.0
    top = min(schedule.warmup_steps, total)
    assert factors[:top] == sorted(factors[:top])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert all(factor >= schedule.final_lr_ratio - 1e-12 for factor in factors[top:])


@given(ENDING, st.integers(50, 200))
def test_peak_follows_warmup_and_last_update_is_near_the_final_ratio(schedule: ScheduleConfig, total: int) -> None:
    assert lr_factor(schedule, schedule.warmup_steps, total) == pytest.approx(1.0)
    decay = max(1, min(round(total * schedule.decay_fraction), total - schedule.warmup_steps))
    last = lr_factor(schedule, total - 1, total)
    room = 1.0 - schedule.final_lr_ratio
    assert last - schedule.final_lr_ratio <= room * (1.0 / decay if schedule.kind == "wsd" else 0.26) + 1e-12


def test_an_update_outside_the_run_is_a_programming_error() -> None:
    with pytest.raises(AssertionError, match="outside"):
        lr_factor(ScheduleConfig(), 10, 10)
