"""Layouts through the user's command: the same rows and losses, whatever the ranks hold."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.support.sampling import sampler
from tests.support.user import User, unexpected

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.spare]
BOUND = 1e-5


def assert_same_run(user: User, other: User) -> None:
    """Every step on the same rows, losses and norms within the bound of the promise."""
    lines, expected = user.metrics(), other.metrics()
    assert [line["data_digest"] for line in lines] == [line["data_digest"] for line in expected]
    assert [line["tokens"] for line in lines] == [line["tokens"] for line in expected]
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in expected], rel=BOUND)
    evaluated = [(event["step"], event["loss"]) for event in user.journal("evaluated")]
    for (step, loss), event in zip(evaluated, other.journal("evaluated"), strict=True):
        assert step == event["step"]
        assert loss == pytest.approx(event["loss"], rel=BOUND)


def test_two_stages_of_two_ranks(user: User, undisturbed: User) -> None:
    user.must("train", "own.yaml", "parallel.pipeline=2", "launch.ranks_per_node=4")
    assert_same_run(user, undisturbed)
    [started] = user.journal("resumed")
    layout = started["layout"]
    assert (layout["pipeline"], layout["data_parallel"], layout["world"]) == (2, 2, 4)
    [whole] = undisturbed.journal("resumed")
    assert layout["parameters_held"] < 0.6 * whole["layout"]["parameters_held"]
    assert not unexpected(user.journal())


@pytest.mark.sampled(1, group="moves")
def test_a_pipeline_is_killed_goes_on_and_is_left_for_another_layout(user: User, undisturbed: User) -> None:
    """A rank of it dies; then it is asked to leave; then two ranks that share everything finish the run."""
    draw = sampler("kill of a pipeline")
    with user.command("train", "own.yaml", "parallel.pipeline=2", "training.micro_batch_sequences=2") as program:
        killed_at = draw.randrange(6, 12)
        program.wait_for(lambda: user.steps_done() >= killed_at, deadline=120, what="some steps")
        os.kill(user.journal("attempt_started")[0]["pids"][draw.randrange(2)], signal.SIGKILL)
        program.wait_for(lambda: len(user.journal("resumed")) == 2, deadline=120, what="it goes on")
        target = user.journal("resumed")[-1]["step"] + 3
        program.wait_for(lambda: user.steps_done() >= target, deadline=120, what=f"step {target}")
        program.send(signal.SIGTERM)
        assert program.wait(deadline=120) == 75, program.output()
    user.must("train", "own.yaml", "parallel.zero_stage=3")
    assert_same_run(user, undisturbed)
    steps = [event["step"] for event in user.journal("resumed")]
    assert 0 < steps[1] <= steps[2]
    assert [event["layout"]["pipeline"] for event in user.journal("resumed")] == [2, 2, 1]
    assert not unexpected(user.journal())


@pytest.mark.sampled(1, group="moves")
def test_ranks_that_share_rows_are_killed_go_on_and_are_left_for_another_layout(user: User, undisturbed: User) -> None:
    """Two copies of the model on two ranks each; then a pipeline finishes the run."""
    draw = sampler("kill of ranks that share rows")
    with user.command("train", "own.yaml", "parallel.sequence=2", "launch.ranks_per_node=4") as program:
        killed_at = draw.randrange(6, 12)
        program.wait_for(lambda: user.steps_done() >= killed_at, deadline=120, what="some steps")
        os.kill(user.journal("attempt_started")[0]["pids"][draw.randrange(4)], signal.SIGKILL)
        program.wait_for(lambda: len(user.journal("resumed")) == 2, deadline=120, what="it goes on")
        target = user.journal("resumed")[-1]["step"] + 3
        program.wait_for(lambda: user.steps_done() >= target, deadline=120, what=f"step {target}")
        program.send(signal.SIGTERM)
        assert program.wait(deadline=120) == 75, program.output()
    user.must("train", "own.yaml", "parallel.pipeline=2")
    assert_same_run(user, undisturbed)
    resumed = user.journal("resumed")
    assert 0 < resumed[1]["step"] <= resumed[2]["step"]
    shapes = [(event["layout"]["sequence"], event["layout"]["data_parallel"]) for event in resumed]
    assert shapes == [(2, 2), (2, 2), (1, 1)]
    assert not unexpected(user.journal())


@pytest.mark.sampled(1, group="moves")
@pytest.mark.timeout(900)
def test_a_thousand_layers_are_killed_on_two_stages_and_go_on_elsewhere(prepared: User, tmp_path: Path) -> None:
    """All ranks of a 1,000-layer pipeline die, and the run ends on one rank: the numbers of one rank."""
    shape = ("layers=1000", "d_model=16", "heads=2", "kv_heads=1", "d_ff=16")
    size = (*(f"model.{each}" for each in shape), "training.total_steps=6", "checkpoint.every_steps=2")
    one = ("parallel.zero_stage=0", "launch.ranks_per_node=1")
    user, alone = (prepared.copy(tmp_path / name) for name in ("moved", "alone"))
    code, output = alone.solomonov("train", "own.yaml", *size, *one, deadline=400)
    assert code == 0, output
    with user.command("train", "own.yaml", *size, "parallel.pipeline=2") as program:
        program.wait_for(lambda: user.steps_done() >= 2, deadline=200, what="two updates")
        program.wait_for(lambda: user.journal("checkpoint_durable"), deadline=100, what="a checkpoint")
        assert program.kill() == -signal.SIGKILL
    code, output = user.solomonov("train", "own.yaml", *size, *one, deadline=400)
    assert code == 0, output
    steps = [event["step"] for event in user.journal("resumed")]
    assert steps[0] == 0
    assert len(steps) == 2
    assert 2 <= steps[1] < 6
    assert [event["layout"]["pipeline"] for event in user.journal("resumed")] == [2, 1]
    assert_same_run(user, alone)
    assert user.journal("signal")[0]["verdict"] == "even", "asked before the first update, unasked"
    assert not unexpected(user.journal())
