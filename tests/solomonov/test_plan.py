"""The batch plan divides exactly, or says what would: checked by hand and for any numbers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from data_pipeline.batches import BatchRows
from solomonov.errors import ConfigurationError
from solomonov.model.config import Recompute
from solomonov.plan import TrainingConfig, legal_data_parallel, plan_batch, total_steps
from solomonov.schedule import ScheduleConfig

PLAIN = ScheduleConfig()


def config(**values: object) -> TrainingConfig:
    return TrainingConfig.model_validate({"total_steps": 10, **values})


def test_by_hand() -> None:
    plan = plan_batch(
        config(global_batch_tokens=16384, micro_batch_sequences=4), PLAIN, sequence_tokens=512, data_parallel=2
    )
    assert (plan.batch_rows, plan.micro_rows, plan.accumulation) == (32, 4, 4)
    assert plan.describe() == (
        "4 rows x 4 accumulated x 2 data-parallel ranks = 32 rows of 512 = 16,384 tokens an update;"
        " 10 updates = 163,840 tokens"
    )


def test_a_warm_up_of_the_row_length_is_in_the_plan() -> None:
    """16 of 64 tokens at first; 16 + 48 * 256 / 700 = 33 allows 32 at the second update, and the fourth is past 700."""
    schedule = ScheduleConfig.model_validate({"sequence_warmup": {"from_tokens": 16, "tokens": 700}})
    training = config(global_batch_tokens=256, micro_batch_sequences=4)
    plan = plan_batch(training, schedule, sequence_tokens=64, data_parallel=1)
    assert [plan.attended_tokens(step) for step in range(5)] == [16, 32, 32, 64, 64]
    assert plan.describe_total() == (
        "4 rows of 64 = 256 tokens an update; 10 updates = 2,560 tokens;"
        " attention over 16 tokens at first, over 64 after 3 updates"
    )


def test_a_warm_up_of_the_batch_is_in_the_plan() -> None:
    """2 of 8 rows at first, to 8 over 12: two updates of 2 rows, one of 4, one of 6; by hand in the loader's terms."""
    schedule = ScheduleConfig.model_validate({"batch_warmup": {"from_tokens": 128, "tokens": 768}})
    training = config(global_batch_tokens=512, micro_batch_sequences=2)
    plan = plan_batch(training, schedule, sequence_tokens=64, data_parallel=2)
    assert [plan.micro_batches(step) for step in range(6)] == [1, 1, 1, 2, 2, 2]
    assert [plan.trained_tokens(step) // 64 for step in range(6)] == [0, 2, 4, 8, 14, 22]
    assert plan.describe_total() == (
        "8 rows of 64 = 512 tokens an update; 10 updates = 3,968 tokens; 2 rows at first, 8 after 4 updates"
    )
    by_tokens = config(total_steps=None, total_tokens=3969, global_batch_tokens=512, micro_batch_sequences=2)
    assert plan_batch(by_tokens, schedule, sequence_tokens=64, data_parallel=2).total_steps == 11


@pytest.mark.parametrize(
    ("first", "remedy"),
    [(100, "64 or 128"), (512, "448"), (10**6, "448"), (1, "64")],
    ids=["half", "all", "more", "1"],
)
def test_a_first_batch_that_is_none_is_refused(first: int, remedy: str) -> None:
    schedule = ScheduleConfig.model_validate({"batch_warmup": {"from_tokens": first, "tokens": 768}})
    training = config(global_batch_tokens=512, micro_batch_sequences=2)
    with pytest.raises(ConfigurationError, match="first batch") as caught:
        plan_batch(training, schedule, sequence_tokens=64, data_parallel=2)
    assert caught.value.remedy == (
        f"set schedule.batch_warmup.from_tokens to {remedy}; or remove schedule.batch_warmup"
    )


@given(batch=st.integers(1, 5000), micro=st.integers(1, 40), sequence=st.integers(1, 300), ranks=st.integers(1, 70))
def test_exact_or_refused_with_a_legal_way_out(batch: int, micro: int, sequence: int, ranks: int) -> None:
    training = config(global_batch_tokens=batch, micro_batch_sequences=micro)
    if batch % sequence == 0 and (batch // sequence) % (micro * ranks) == 0:
        plan = plan_batch(training, PLAIN, sequence_tokens=sequence, data_parallel=ranks)
        assert plan.micro_rows * plan.accumulation * plan.data_parallel * sequence == batch
        return
    with pytest.raises(ConfigurationError) as caught:
        plan_batch(training, PLAIN, sequence_tokens=sequence, data_parallel=ranks)
    assert caught.value.exit_code == 78
    advised = int(caught.value.remedy.rsplit(" ", 1)[1])  # the last advice names a batch
    assert advised % sequence == 0
    if batch % sequence == 0:
        better = config(global_batch_tokens=advised, micro_batch_sequences=micro)
        plan_batch(better, PLAIN, sequence_tokens=sequence, data_parallel=ranks)


def test_names_the_nearest_legal_ranks() -> None:
    with pytest.raises(ConfigurationError) as caught:
        plan_batch(
            config(global_batch_tokens=4096, micro_batch_sequences=2), PLAIN, sequence_tokens=512, data_parallel=3
        )
    assert "use 1 or 2 or 4 data-parallel ranks" in caught.value.remedy
    assert "8 rows, over 3 data-parallel ranks x 2 rows" in caught.value.got


@given(rows=st.integers(1, 400), micro=st.integers(1, 20))
def test_legal_data_parallel_is_all_divisors(rows: int, micro: int) -> None:
    assert legal_data_parallel(rows, micro) == [d for d in range(1, rows + 1) if rows % (micro * d) == 0]


def test_length_in_tokens_rounds_up_to_whole_batches() -> None:
    training = TrainingConfig.model_validate({"total_tokens": 1001, "global_batch_tokens": 100})
    assert total_steps(training, BatchRows(10), 10) == 11
    assert total_steps(training, BatchRows(10, first=2, over=20), 10) == 14, "2, 2, 2, 4, 6, 8 rows, then 10"


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_only_full_recomputes_groups_of_blocks(mode: str) -> None:
    with pytest.raises(ValidationError, match="only full computes groups") as caught:
        config(activation_checkpointing=mode, activation_checkpointing_every=2)
    assert f"activation_checkpointing {mode}" in str(caught.value)
    assert config(activation_checkpointing=mode).recompute.mode == mode
    allowed = config(activation_checkpointing="full", activation_checkpointing_every=2)
    assert allowed.recompute == Recompute("full", 2)


@pytest.mark.parametrize("values", [{}, {"total_steps": 1, "total_tokens": 1}])
def test_exactly_one_length(values: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match="exactly one"):
        TrainingConfig.model_validate(values)


@pytest.mark.parametrize("decay", [0, 1, 0.0, 1.0, -0.1, 1.5, math.nan, math.inf, "0.9", True])
def test_a_decay_that_averages_nothing_or_everything_alike_is_refused(decay: object) -> None:
    with pytest.raises(ValidationError, match="ema_decay"):
        config(ema_decay=decay)
    assert config().ema_decay is None
    assert config(ema_decay=0.9999).ema_decay == 0.9999
