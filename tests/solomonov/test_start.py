"""What is refused before any rank is started, and what a run that may start says of itself."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from data_pipeline.errors import DamagedDataError
from solomonov import start
from solomonov.errors import ConfigurationError
from solomonov.runfolder import RunFolder
from solomonov.start import PreparedRun, finished_step, prepare_run
from tests.solomonov.checkpoint.common import ordinary_user
from tests.support.runs import load, model_state
from tests.support.user import User


def prepared(user: User, *overrides: str, ranks: int = 2) -> PreparedRun:
    return prepare_run(load(user, *overrides), ranks_per_node=ranks, launch={"ranks_per_node": ranks})


def refusal(user: User, *overrides: str, ranks: int = 2) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        prepared(user, *overrides, ranks=ranks)
    assert not (user.folder / "runs/own/resolved.json").exists(), "a refused run leaves no record"
    return caught.value


def test_a_run_that_may_start_knows_its_plan_data_and_size(user: User) -> None:
    made = prepared(user)
    assert (made.plan.batch_rows, made.plan.accumulation, made.plan.data_parallel) == (8, 1, 2)
    manifest = json.loads((user.folder / "dataset/MANIFEST.json").read_text())
    assert made.data["tokenizer"] == manifest["tokenizer"]["xxh3_128"]
    assert made.derived["ranks"] == 2
    assert not made.run.resolved_path.exists(), "the record is written with the lock held"
    made.write()
    assert made.run.resolved()["data"] == made.data
    state = model_state(made.run, 1)
    assert made.derived["parameters"] == sum(tensor.numel() for tensor in state.values())


def test_data_that_is_not_prepared_is_refused(user: User) -> None:
    error = refusal(user, "data.folder=elsewhere")
    assert "not prepared" in error.what
    assert "solomonov prepare" in error.remedy


def test_data_that_is_damaged_is_refused_with_another_code(user: User) -> None:
    shard = next((user.folder / "dataset/shards").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(DamagedDataError, match=shard.name) as caught:
        prepared(user)
    assert caught.value.exit_code == 74


def test_another_vocabulary_is_refused(user: User) -> None:
    assert "another tokenizer" in refusal(user, "tokenizer.vocab_size=400").what


def test_a_world_that_does_not_divide_the_batch_is_refused(user: User) -> None:
    assert "use 1 or 2 data-parallel ranks" in refusal(user, ranks=3).remedy


def test_the_precision_that_cuda_would_choose_is_checked_before(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepared(user, "parallel.zero_stage=0").plan.batch_rows == 8
    monkeypatch.setattr(start, "visible_gpus", lambda: 2)
    assert "bf16" in refusal(user, "parallel.zero_stage=0").what
    assert prepared(user, "parallel.zero_stage=0", "training.precision=fp32").plan.batch_rows == 8


def test_more_ranks_than_gpus_are_refused(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "visible_gpus", lambda: 1)
    error = refusal(user)
    assert "more ranks than GPUs" in error.what
    assert "launch.ranks_per_node to 1" in error.remedy


def test_a_warm_up_as_long_as_the_run_is_refused(user: User) -> None:
    error = refusal(user, "training.total_steps=20", "schedule.warmup_steps=20")
    assert error.remedy == "set schedule.warmup_steps to 2, or train longer"


def test_a_decay_that_begins_within_the_warm_up_is_refused(user: User) -> None:
    words = ("training.total_steps=20", "schedule.warmup_steps=5")
    assert prepared(user, *words, "schedule.decay_steps=15").plan.total_steps == 20
    error = refusal(user, *words, "schedule.decay_steps=16")
    assert error.remedy == "set schedule.decay_steps to at most 15, or train longer"


def test_a_warm_up_of_the_row_length_that_does_not_end_is_refused(user: User) -> None:
    words = ("training.total_steps=20", "schedule.sequence_warmup.from_tokens=8")
    assert prepared(user, *words, "schedule.sequence_warmup.tokens=4864").plan.sequence_warmup_steps == 19
    error = refusal(user, *words, "schedule.sequence_warmup.tokens=4865")
    assert error.remedy == "set schedule.sequence_warmup.tokens to at most 4864, or train longer"


def test_a_warm_up_of_the_batch_that_does_not_end_is_refused(user: User) -> None:
    """One row at first, eight in the end, of 32 tokens each."""
    words = ("training.total_steps=20", "schedule.batch_warmup.from_tokens=32")
    plan = prepared(user, *words, "schedule.batch_warmup.tokens=640").plan
    assert len(plan.batches.rows(0)) == 1
    assert len(plan.batches.rows(19)) == 8
    error = refusal(user, *words, "schedule.batch_warmup.tokens=100000")
    assert error.what == "no update has its full size"
    least = int(error.remedy.split()[5].rstrip(","))
    assert error.remedy == f"set schedule.batch_warmup.tokens to at most {least}, or train longer"


def test_a_home_folder_is_found(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(user.folder))
    made = prepared(user, "data.folder=~/dataset", "run.folder=~/elsewhere")
    assert made.run.path == user.folder / "elsewhere" / "own"


def test_a_place_without_permission_is_refused(user: User) -> None:
    """A folder that belongs to somebody else, seen from one's own working folder."""
    for path in (user.folder, *user.folder.parents):
        if path.stat().st_uid == os.geteuid():
            path.chmod(path.stat().st_mode | 0o055)
    loaded = load(user, "run.folder=others/runs")
    (user.folder / "others").mkdir(mode=0o555)
    with ordinary_user(), pytest.raises(ConfigurationError, match="cannot be written") as caught:
        prepare_run(loaded, ranks_per_node=2, launch={}).make_folder()
    assert "run.folder" in caught.value.remedy


def finished(user: User) -> RunFolder:
    run = prepared(user).run
    folder = run.checkpoints / "step-00000060"
    folder.mkdir(parents=True)
    (folder / "MANIFEST.json").touch()
    return run


def test_a_run_is_finished_where_it_said_so_and_kept_the_last_checkpoint(user: User) -> None:
    run = finished(user)
    assert finished_step(run, 60) is None
    run.journal.write("resumed", step=0)
    run.journal.write("training_finished", step=60)
    assert finished_step(run, 60) == 60
    assert finished_step(run, 61) is None, "it is to be longer now"
    run.journal.write("resumed", step=55)
    assert finished_step(run, 60) is None, "it was taken up again"
    run.journal.write("training_finished", step=60)
    shutil.rmtree(run.checkpoints)
    assert finished_step(run, 60) is None, "what it trained is gone"


def test_the_folder_of_the_data_is_relative_to_the_working_folder(user: User, tmp_path: Path) -> None:
    made = prepared(user)
    made.write()
    assert made.run.resolved()["working_folder"] == str(user.folder)
    assert made.run.data_folder() == user.folder / "dataset"
