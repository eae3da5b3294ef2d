"""A warm-up through the user's command: killed in it and moved, it trains what an undisturbed run trains."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest

from solomonov.proof import prove_record
from solomonov.runfolder import RunFolder
from tests.support.user import User, unexpected

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.spare]
WORDS = (
    "train",
    "own.yaml",
    "schedule.sequence_warmup.from_tokens=4",
    "schedule.sequence_warmup.tokens=7000",
    "schedule.batch_warmup.from_tokens=64",
    "schedule.batch_warmup.tokens=3000",
)
FREE = ("data_digest", "tokens", "rows", "attended_tokens", "lr")


def holds(user: User) -> bool:
    with contextlib.chdir(user.folder):
        return prove_record(RunFolder(Path("runs/own").resolve())).holds


def test_a_run_killed_in_its_warm_up_and_moved_is_the_undisturbed_run(user: User, tmp_path: Path) -> None:
    """Two ranks, one killed; then one rank; then a pipeline of two stages: each takes over within the warm-up."""
    other = user.copy(tmp_path / "undisturbed")
    other.must(*WORDS)
    expected = other.metrics()
    lengths = [line["attended_tokens"] for line in expected]
    assert lengths == sorted(lengths)
    assert sorted(set(lengths)) == [4, 8, 16, 32]
    rows = [line["rows"] for line in expected]
    assert sorted(set(rows)) == [2, 4, 6, 8]
    assert holds(other)

    with user.command(*WORDS) as program:
        program.wait_for(lambda: user.steps_done() >= 7, deadline=120, what="some steps")
        os.kill(user.journal("attempt_started")[0]["pids"][1], signal.SIGKILL)
        program.wait_for(lambda: len(user.journal("resumed")) == 2, deadline=120, what="it goes on")
        program.send(signal.SIGTERM)
        assert program.wait(deadline=120) == 75, program.output()
    with user.command(*WORDS, "launch.ranks_per_node=1") as program:
        target = user.steps_done() + 2
        program.wait_for(lambda: user.steps_done() >= target, deadline=120, what=f"step {target}")
        program.send(signal.SIGTERM)
        assert program.wait(deadline=120) == 75, program.output()
    user.must(*WORDS, "parallel.pipeline=2")
    lines = user.metrics()
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert [[line[name] for name in FREE] for line in lines] == [[line[name] for name in FREE] for line in expected]
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in expected], rel=1e-5)
    resumed = user.journal("resumed")
    begun = resumed[-1]["step"]
    assert lengths[begun] < 32, "the pipeline did not begin within the warm-ups"
    assert rows[begun] < 8
    layouts = [(event["layout"]["world"], event["layout"]["pipeline"]) for event in resumed]
    assert layouts == [(2, 1), (2, 1), (1, 1), (2, 2)]
    assert holds(user)
    assert not unexpected(user.journal())
