"""What a rank leaves on disk while it trains: one line and one point a step, events, and the verdict on replays."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from solomonov.checkpoint.store import ResumeFact
from solomonov.config import flatten
from solomonov.plan import plan_batch
from solomonov.record import RunRecord, StepLine
from solomonov.runfolder import RunFolder
from tests.support.events import read_events, read_scalars
from tests.support.runs import begin_run
from tests.support.user import User

LAYOUT = {"device": "cpu", "precision": "fp32", "zero_stage": 1, "world": 1}
EVERY_STEP_TAGS = {
    "train/loss",
    "train/grad_norm",
    "train/lr",
    "perf/tokens_per_second",
    "perf/step_seconds",
    "perf/data_wait_seconds",
    "perf/log_seconds",
    "perf/model_tflops_per_second",
    "memory/host_peak_gib",
    "data/padding_rate",
    "train/attended_tokens",
    "train/batch_rows",
    "health/update_skipped",
}


@pytest.fixture
def begun(user: User) -> RunFolder:
    return begin_run(user, "metrics.every_steps=2", "training.total_steps=5")


def record_of(run: RunFolder, *, rank: int = 0) -> RunRecord:
    config = run.config()
    plan = plan_batch(config.training, config.schedule, sequence_tokens=config.data.sequence_tokens, data_parallel=1)
    return RunRecord(run, config, plan, rank=rank)


def line(step: int, **changes: Any) -> StepLine:
    values = {"loss": 4.0 / step, "grad_norm": 1.5, "lr": 0.25, "tokens": 100 + step, "data_digest": f"{step:016x}"}
    made = StepLine(step, **{**values, **changes})
    made.lap("data_wait")
    return made


def train(run: RunFolder, first: int, last: int, layout: dict[str, Any] = LAYOUT, **changes: Any) -> None:
    run.journal.write("attempt_started", attempt=run.journal.next_attempt())
    with record_of(run) as record:
        record.begin(first - 1, layout, resumed=first > 1)
        for step in range(first, last + 1):
            record.step(line(step, **changes))
        record.sync()


def metrics(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(text) for text in run.metrics.read_text().splitlines()]


# --- one line ------------------------------------------------------------------------------------------------


def test_a_line_keeps_full_precision_and_null_for_what_is_not_finite() -> None:
    made = StepLine(7, loss=1 / 3, grad_norm=math.nan, lr=0.1, tokens=9, rows=8, attended_tokens=16, data_digest="0f")
    made.skipped = True
    text = json.dumps(made.to_json())
    assert json.loads(text) == {
        "step": 7,
        "loss": 1 / 3,
        "grad_norm": None,
        "lr": 0.1,
        "tokens": 9,
        "rows": 8,
        "attended_tokens": 16,
        "skipped": True,
        "data_digest": "0f",
        "seconds": 0.0,
    }
    assert StepLine(1, loss=math.inf).to_json()["loss"] is None


def test_laps_are_the_parts_of_the_seconds() -> None:
    made = StepLine(1)
    for name in ("a", "b", "a"):
        made.lap(name)
    assert list(made.laps) == ["a", "b"]
    assert made.seconds == sum(made.laps.values()) > 0
    assert made.to_json()["seconds"] == round(made.seconds, 6)


# --- a run ---------------------------------------------------------------------------------------------------


def test_each_step_has_its_line_and_every_second_one_its_points(
    begun: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    train(begun, 1, 5)
    assert [(item["step"], item["loss"], item["tokens"]) for item in metrics(begun)] == [
        (step, 4.0 / step, 100 + step) for step in range(1, 6)
    ]
    scalars = read_scalars(begun.path / "tensorboard")
    assert scalars.keys() == EVERY_STEP_TAGS
    assert scalars["train/loss"] == {2: 2.0, 4: 1.0, 5: pytest.approx(0.8)}, "every second step, and the last"
    assert set(scalars["train/lr"].values()) == {0.25}
    output = capsys.readouterr().out
    assert "step 2/5 loss 2.0000 grad_norm 1.500 lr 2.50e-01 tokens/s " in output
    assert "step 1/5" not in output


def test_the_configuration_is_a_text_at_the_beginning_only(begun: RunFolder) -> None:
    train(begun, 1, 2)
    train(begun, 3, 4)
    [text] = read_events(begun.path / "tensorboard").Tensors("run/configuration/text_summary")
    rows = text.tensor_proto.string_val[0].decode().splitlines()[2:]
    assert len(rows) == len(flatten(begun.config()))
    assert "| optimizer.lr | `0.003` |" in rows


def test_evaluations_and_stalls_have_their_points(begun: RunFolder) -> None:
    with record_of(begun) as record:
        record.begin(0, LAYOUT, resumed=False)
        record.evaluated(4, 3.0, 0.5, 8)
        record.evaluated(8, 2.0, 0.5, 8, 1.5)
        record.saved(4, 0.5)
    scalars = read_scalars(begun.path / "tensorboard")
    assert scalars == {
        "eval/loss": {4: 3.0, 8: 2.0},
        "eval/bits_per_byte": {4: 1.5, 8: 1.0},
        "eval/ema_loss": {8: 1.5},
        "eval/ema_bits_per_byte": {8: 0.75},
        "perf/checkpoint_stall_seconds": {4: 0.5},
    }
    without, event = begun.journal.events("evaluated")
    assert "ema_loss" not in without
    keys = ("step", "loss", "bits_per_byte", "ema_loss", "ema_bits_per_byte", "rows", "attempt")
    assert {key: event[key] for key in keys} == {
        "step": 8,
        "loss": 2.0,
        "bits_per_byte": 1.0,
        "ema_loss": 1.5,
        "ema_bits_per_byte": 0.75,
        "rows": 8,
        "attempt": 1,
    }


def test_a_skipped_update_is_told(begun: RunFolder) -> None:
    train(begun, 1, 2, skipped=True, grad_norm=math.nan)
    assert [event["step"] for event in begun.journal.events("update_skipped")] == [1, 2]
    assert read_scalars(begun.path / "tensorboard")["health/update_skipped"] == {2: 1.0}


def test_without_tensorboard_there_are_no_event_files(user: User) -> None:
    run = begin_run(user, "metrics.tensorboard=false")
    train(run, 1, 2)
    with record_of(run) as record:
        record.begin(2, LAYOUT, resumed=True)
        record.saved(2, 0.5)
        record.evaluated(2, 1.0, 1.0, 1)
        record.sync()
    assert not (run.path / "tensorboard").exists()
    assert [item["step"] for item in metrics(run)] == [1, 2]


def test_other_ranks_write_nothing(begun: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in begun.path.rglob("*") if path.is_file()}
    with record_of(begun, rank=1) as record:
        record.begin(0, LAYOUT, resumed=False)
        record.event("anything")
        record.step(line(1))
        record.evaluated(1, 1.0, 1.0, 1)
        record.saved(1, 1.0)
        record.sync()
    assert {path: path.read_bytes() for path in begun.path.rglob("*") if path.is_file()} == before
    assert capsys.readouterr().out == ""


def test_a_rank_that_was_started_without_a_supervisor_is_attempt_1(begun: RunFolder) -> None:
    assert record_of(begun).attempt == 1
    begun.journal.write("attempt_started", attempt=4)
    assert record_of(begun).attempt == 4


# --- going on ------------------------------------------------------------------------------------------------


def test_a_replay_that_is_equal_is_no_news(begun: RunFolder) -> None:
    train(begun, 1, 4)
    train(begun, 4, 5)
    assert not list(begun.journal.events("replay_mismatch"))
    assert [item["step"] for item in metrics(begun)] == [1, 2, 3, 4, 5]
    assert list(read_scalars(begun.path / "tensorboard")["train/loss"]) == [2, 4, 5]
    assert record_of(begun).resumes() == [ResumeFact(1, 0), ResumeFact(2, 3)]


@pytest.mark.parametrize(
    ("changes", "layout", "mismatch"),
    [
        ({"data_digest": "f" * 16}, LAYOUT, ["data_digest"]),
        ({"tokens": 5}, LAYOUT, ["tokens"]),
        ({"loss": 1.0000001}, LAYOUT, ["loss"]),
        ({"loss": 1.0000001}, {**LAYOUT, "world": 2}, None),
        ({"loss": 1.001}, {**LAYOUT, "world": 2}, ["loss"]),
        ({"loss": 1.001}, {**LAYOUT, "precision": "bf16"}, None),
        ({"loss": 1.0000001}, {**LAYOUT, "device": "cuda"}, None),
    ],
    ids=str,
)
def test_a_replay_that_differs_is_told(
    changes: dict[str, Any], layout: dict[str, Any], mismatch: list[str] | None, begun: RunFolder
) -> None:
    """Step 4 (loss 1.0) is replayed; only the same layout on a CPU must give the same bits."""
    train(begun, 1, 4)
    train(begun, 4, 4, layout, **changes)
    events = list(begun.journal.events("replay_mismatch"))
    if mismatch is None:
        assert not events
    else:
        [event] = events
        assert event["step"] == 4
        assert [text.split(":")[0] for text in event["differences"]] == mismatch
        assert event["same_layout"] == (layout == LAYOUT)


def test_cuda_is_held_to_the_bit_only_where_it_was_asked_to_be_deterministic(user: User) -> None:
    run = begin_run(user, "run.deterministic=true")
    cuda = {**LAYOUT, "device": "cuda"}
    train(run, 1, 4, cuda)
    train(run, 4, 4, cuda, loss=1.0000001)
    [event] = run.journal.events("replay_mismatch")
    assert event["same_layout"]


def test_a_layout_is_that_of_the_attempt_which_wrote_the_step(begun: RunFolder) -> None:
    """Steps 1-2 in one layout, 3-4 in another: a replay of 2 to 4 in the first is held to the bit at 2 only."""
    train(begun, 1, 2)
    train(begun, 3, 4, {**LAYOUT, "world": 2})
    run = begun
    run.journal.write("attempt_started", attempt=3)
    with record_of(run) as record:
        record.begin(1, LAYOUT, resumed=True)
        for step in (2, 3, 4):
            record.step(line(step, loss=4.0 / step * (1 + 1e-7)))
    assert [event["step"] for event in run.journal.events("replay_mismatch")] == [2]


def test_records_go_on_without_a_place_for_event_files(begun: RunFolder) -> None:
    """The points are lost, and told once; the lines are not."""
    Path(begun.path / "tensorboard").touch()
    train(begun, 1, 5)
    assert [item["step"] for item in metrics(begun)] == [1, 2, 3, 4, 5]
    [event] = begun.journal.events("tensorboard_failed")
    assert "tensorboard" in event["message"]


# --- a later attempt -----------------------------------------------------------------------------------------


def test_an_attempt_is_superseded_when_a_later_one_begins(begun: RunFolder) -> None:
    begun.journal.write("attempt_started", attempt=1)
    with record_of(begun) as first, record_of(begun, rank=1) as peer:
        assert first.attempt == 1
        assert not first.superseded()
        begun.journal.write("resumed", attempt=1, step=0, layout=LAYOUT)
        assert not first.superseded(), "its own lines are no later attempt"
        begun.journal.write("attempt_started", attempt=2)
        assert first.superseded()
        assert not peer.superseded(), "rank 0 tells the others"
    with record_of(begun) as second:
        assert (second.attempt, second.superseded()) == (2, False)
        begun.journal.write("attempt_started", attempt=1)
        assert not second.superseded(), "an earlier one that is heard of late does not count"
        begun.journal.write("attempt_started", attempt=5)
        assert second.superseded()


def test_without_a_journal_nothing_is_known_of_later_attempts(begun: RunFolder) -> None:
    with record_of(begun) as record:
        begun.journal.path.unlink()
        assert not record.superseded()
        begun.journal.write("attempt_started", attempt=7)
        assert record.superseded()
