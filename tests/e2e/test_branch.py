"""A decay from a checkpoint of a run that goes on: its rows, from its state, at another rate."""

from __future__ import annotations

import json
import os
import signal

import pytest

from tests.support.user import User, unexpected

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
DECAY = ("run.name=decayed", "run.branch_of=own@55", "schedule.decay_steps=4", "training.total_steps=59")
"""The undisturbed run ends at step 60 with a decay of 12 steps, and keeps the checkpoints of 55 and 60."""


def state_digest(user: User, run: str) -> str:
    """Of the checkpoint of step 55: masters and moments, whatever the layout."""
    words = user.must("checkpoints", "digest", run, "--step", "55", "--json").splitlines()[-1]
    return str(json.loads(words)["digest"])


@pytest.mark.spare
def test_decay_now_from_a_checkpoint(undisturbed: User, user: User) -> None:
    user = undisturbed.copy(user.folder.parent / "branched")
    before = state_digest(user, "own")
    parent = user.metrics()
    assert "branched from step 55 of runs/own" in user.must("train", "own.yaml", *DECAY)

    lines = user.metrics("decayed")
    assert [line["step"] for line in lines] == [56, 57, 58, 59]
    assert [line["data_digest"] for line in lines] == [line["data_digest"] for line in parent[55:59]]
    assert [line["tokens"] for line in lines] == [line["tokens"] for line in parent[55:59]]
    assert lines[0]["loss"] == parent[55]["loss"], "the first loss is one at the parent's weights"
    assert [line["lr"] for line in lines] == pytest.approx([0.003, 0.00225, 0.0015, 0.00075])

    [branched] = user.journal("branched", name="decayed")
    [durable] = [event for event in user.journal("checkpoint_durable") if event["step"] == 55]
    [created] = user.journal("run_created")
    assert (branched["step"], branched["digest"]) == (55, durable["digest"])
    assert (branched["parent"], branched["parent_run_id"]) == ("runs/own", created["run_id"])
    [resumed] = user.journal("resumed", name="decayed")
    assert (resumed["step"], resumed["of"]) == (55, 59)
    assert state_digest(user, "decayed") == before, "another state was taken"
    assert state_digest(user, "own") == before, "the parent was changed"
    assert not unexpected(user.journal(name="decayed"))


@pytest.mark.spare
def test_a_branch_in_another_layout_that_is_killed_goes_on_without_its_parent(undisturbed: User, user: User) -> None:
    """Two pipeline stages; the ranks die after some steps, and the parent's folder is moved away meanwhile."""
    user = undisturbed.copy(user.folder.parent / "branched")
    parent = user.metrics()
    words = ("train", "own.yaml", *DECAY, "training.total_steps=75", "parallel.pipeline=2", "checkpoint.every_steps=50")
    with user.command(*words) as program:
        program.wait_for(lambda: user.steps_done("decayed") >= 57, deadline=120, what="some steps")
        (user.run()).rename(user.folder / "elsewhere")
        os.kill(user.journal("attempt_started", name="decayed")[0]["pids"][1], signal.SIGKILL)
        assert program.wait(deadline=180) == 0, program.output()
    assert [event["step"] for event in user.journal("resumed", name="decayed")] == [55, 55]
    assert len(user.journal("branched", name="decayed")) == 1
    lines = user.metrics("decayed")
    assert [line["step"] for line in lines] == list(range(56, 76))
    assert [line["data_digest"] for line in lines[:5]] == [line["data_digest"] for line in parent[55:60]]
    assert lines[0]["loss"] == pytest.approx(parent[55]["loss"], rel=1e-5)
    assert not unexpected(user.journal(name="decayed"))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("run.branch_of=own@50",), 78, "which has kept: 55, 60"),
        (("run.branch_of=owm@55",), 78, "there is no such run"),
        (("run.branch_of=own",), 78, "run.branch_of: String should match pattern"),
        (("run.seed=6",), 78, "run.seed: 5 there, 6 here"),
        (("model.d_ff=80",), 78, "model.d_ff: 64 there, 80 here"),
    ],
)
def test_what_cannot_be_a_branch_is_refused(
    words: tuple[str, ...], code: int, message: str, undisturbed: User, user: User
) -> None:
    (user.folder / "runs").symlink_to(undisturbed.folder / "runs")
    found, output = user.solomonov("train", "own.yaml", *DECAY, "run.folder=runs", "run.name=refused", *words)
    assert (found, message in output) == (code, True), output
    for part in ("got:", "rule:", "remedy:"):
        assert part in output
    assert not (undisturbed.folder / "runs/refused").exists()


def test_a_checkpoint_that_does_not_verify_is_not_branched_from(undisturbed: User, user: User) -> None:
    user = undisturbed.copy(user.folder.parent / "branched")
    path = user.run() / "checkpoints/step-00000055/rank-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    code, output = user.solomonov("train", "own.yaml", *DECAY)
    assert code == 74, output
    assert "rank-00001.safetensors is damaged" in output + user.rank_logs()
    assert not user.steps_done("decayed")
    assert not user.journal("branched", "resumed", name="decayed")
