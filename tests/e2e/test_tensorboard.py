"""TensorBoard's files of a run that was killed and moved, read back with TensorBoard's own reader: one value a step,
equal to metrics.jsonl, and exactly the documented tags, which are an interface."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest

from tests.support.events import read_events, read_scalars
from tests.support.user import User, unexpected

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

EVERY_STEP = {
    "data/padding_rate",
    "train/attended_tokens",
    "train/batch_rows",
    "health/update_skipped",
    "memory/host_peak_gib",
    "perf/data_wait_seconds",
    "perf/forward_backward_seconds",
    "perf/log_seconds",
    "perf/model_tflops_per_second",
    "perf/step_seconds",
    "perf/tokens_per_second",
    "perf/update_seconds",
    "train/grad_norm",
    "train/loss",
    "train/lr",
}
CHECKPOINTS = {"perf/checkpoint_stall_seconds"}
EVALUATIONS = {"eval/bits_per_byte", "eval/loss"}
TEXTS = {"run/configuration/text_summary", "custom_scalars__config__"}
STEPS = list(range(1, 61))


def test_a_run_that_was_killed_and_moved_has_each_step_once(user: User) -> None:
    """Killed with its whole group, resumed on one rank, stopped by a signal, resumed on two."""
    with user.command("train", "own.yaml") as program:
        program.wait_for(lambda: user.steps_done() >= 8, deadline=120, what="a step")
        assert program.kill() == -signal.SIGKILL
    with user.command("train", "own.yaml", "launch.ranks_per_node=1") as program:
        program.wait_for(lambda: user.steps_done() >= 17, deadline=120, what="a step")
        program.send(signal.SIGTERM)
        assert program.wait(deadline=120) == 75, program.output()
    user.must("train", "own.yaml")
    assert len(user.journal("resumed")) == 3
    assert all(event["step"] > 0 for event in user.journal("resumed")[1:])
    assert not unexpected(user.journal())

    scalars = read_scalars(user.run() / "tensorboard")
    assert scalars.keys() == EVERY_STEP | CHECKPOINTS | EVALUATIONS
    lines = user.metrics()
    assert [line["step"] for line in lines] == STEPS
    for tag, key in (("train/loss", "loss"), ("train/grad_norm", "grad_norm"), ("train/lr", "lr")):
        # An event file holds float32; nothing else may be lost.
        assert scalars[tag] == {line["step"]: float(np.float32(line[key])) for line in lines}, tag
    for tag in EVERY_STEP:
        assert list(scalars[tag]) == STEPS, f"{tag} has another set of steps, or another order"
    assert set(scalars["health/update_skipped"].values()) == {0.0}
    assert set(range(5, 61, 5)) <= scalars["perf/checkpoint_stall_seconds"].keys()
    evaluated = {event["step"]: event for event in user.journal("evaluated")}
    for tag, key in (("eval/loss", "loss"), ("eval/bits_per_byte", "bits_per_byte")):
        assert scalars[tag] == {step: float(np.float32(evaluated[step][key])) for step in (30, 60)}, tag

    events = read_events(user.run() / "tensorboard")
    assert set(events.Tags()["tensors"]) == TEXTS
    [text] = events.Tensors("run/configuration/text_summary")
    resolved = json.loads((user.run() / "resolved.json").read_text())["values"]
    table = text.tensor_proto.string_val[0].decode()
    assert f"| optimizer.lr | `{resolved['optimizer.lr']['value']}` |" in table
    assert len(table.splitlines()) == len(resolved) + 2
