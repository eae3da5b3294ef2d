"""One rank started by hand, with the torchrun variables alone: its lock, its journal, its exit code."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.heartbeat import read_heartbeat
from solomonov import exits
from solomonov.runfolder import RunFolder, lock_holder, run_lock
from tests.support.processes import ROOT, Program, program_environment
from tests.support.runs import begin_run
from tests.support.tiny_run import lines_of
from tests.support.user import User, unexpected

pytestmark = pytest.mark.e2e
VARIABLES = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",  # the only rank meets nobody: any free port
}


@contextmanager
def rank(folder: Path, *words: str | Path, **environment: str) -> Iterator[Program]:
    """`python -m solomonov.rank WORDS` from a folder that is not the run's."""
    argv = [sys.executable, "-m", "solomonov.rank", *words]
    variables = program_environment(CUDA_VISIBLE_DEVICES="", **VARIABLES, **environment)
    with Program(argv, log=folder / "rank.txt", cwd=folder, env=variables) as program:
        yield program


def begun(user: User, *overrides: str) -> RunFolder:
    quiet = ("schedule.warmup_steps=0", "evaluation.every_steps=0", "metrics.tensorboard=false")
    return begin_run(user, *quiet, *overrides)


def test_it_takes_the_lock_counts_the_attempt_and_goes_on(user: User, tmp_path: Path) -> None:
    """Asked to stop after its first steps it saves and ends with 75; started again, it goes on from there."""
    run = begun(user, "training.total_steps=2000", "checkpoint.every_steps=500")
    beat = tmp_path / "heartbeat"
    with rank(tmp_path, run.path, SOLOMONOV_HEARTBEAT=str(beat)) as program:
        program.wait_for(lambda: run.metrics.exists() and run.metrics.read_bytes(), deadline=120, what="a step")
        assert lock_holder(run)["pid"] == program.pid
        with pytest.raises(Exception, match="another command is working"), run_lock(run, wait_seconds=0.0):
            pass
        program.send(signal.SIGUSR2)
        assert program.wait(deadline=120) == exits.AGAIN, program.output()
    stopped = lines_of(run)[-1]["step"]
    assert 0 < stopped < 2000
    [started] = run.journal.events("attempt_started")
    assert (started["attempt"], started["supervisor"]) == (1, None)
    preempted = run.journal.last("preempted")
    assert preempted is not None
    assert (preempted["step"], preempted["signal"]) == (stopped, "SIGUSR2")
    last = read_heartbeat(beat)
    assert last is not None
    assert (last.pid, last.step, last.section) == (program.pid, stopped, "save")

    with rank(tmp_path, run.path) as program:
        program.wait_for(lambda: lines_of(run)[-1]["step"] > stopped, deadline=120, what="the next step")
        program.send(signal.SIGTERM)
        assert program.wait(deadline=120) == exits.AGAIN, program.output()
    assert [event["step"] for event in run.journal.events("resumed")] == [0, stopped]
    assert [event["attempt"] for event in run.journal.events("attempt_started")] == [1, 2]
    assert [line["step"] for line in lines_of(run)] == list(range(1, lines_of(run)[-1]["step"] + 1))
    assert not unexpected(list(run.journal.events()))


def test_under_a_supervisor_that_holds_the_lock_it_trains_to_its_end(user: User, tmp_path: Path) -> None:
    """This process holds the lock and says which attempt it is, as a supervisor does."""
    run = begun(user, "training.total_steps=2", "run.deterministic=true")
    run.journal.write("attempt_started", attempt=7)
    with run_lock(run), rank(tmp_path, run.path, SOLOMONOV_ATTEMPT="7") as program:
        assert program.wait(deadline=120) == exits.DONE, program.output()
    assert [event["attempt"] for event in run.journal.events("attempt_started")] == [7], "it counted one itself"
    finished = run.journal.last("training_finished")
    assert finished is not None
    assert (finished["step"], finished["attempt"]) == (2, 7)
    assert "step 2/2 loss " in program.output()


HOLDER = """
import signal, sys
from pathlib import Path
from solomonov.runfolder import RunFolder, run_lock
with run_lock(RunFolder(Path(sys.argv[1]))):
    print("held", flush=True)
    signal.pause()
"""


def test_a_run_that_another_command_works_on_is_left_alone(user: User, tmp_path: Path) -> None:
    run = begun(user)
    argv = [sys.executable, "-c", HOLDER, str(run.path)]
    with Program(argv, log=tmp_path / "holder.txt", cwd=ROOT, env=program_environment()) as holder:
        holder.wait_for(lambda: "held" in holder.output(), deadline=60, what="the lock")
        with rank(tmp_path, run.path) as program:
            assert program.wait(deadline=120) == exits.CONFIGURATION, program.output()
        assert f"process {holder.pid} on" in program.output()
    assert not run.metrics.exists()
    assert run.journal.last("attempt_started") is None


def test_damaged_data_ends_with_74_and_a_fault_in_the_journal(user: User, tmp_path: Path) -> None:
    """A bit of the first block is flipped after its manifest was written; the size is as it was."""
    run = begun(user)
    shard = next((user.folder / "dataset/shards").glob("own-train-*.tar"))
    index = json.loads(shard.with_suffix("").with_suffix(".index.json").read_text())
    content = bytearray(shard.read_bytes())
    for member in index["members"]:
        if member["name"].endswith(".tokens.bin"):
            content[member["offset"]] ^= 1
    shard.write_bytes(content)
    with rank(tmp_path, run.path) as program:
        assert program.wait(deadline=120) == exits.DAMAGED, program.output()
    assert "error: " in program.output()
    assert "Traceback" not in program.output()
    fault = run.journal.last("fault")
    assert fault is not None
    assert (fault["rank"], fault["kind"]) == (0, "DamagedDataError")
    assert shard.name in fault["message"]


def test_a_folder_that_is_no_run_is_refused_at_once(tmp_path: Path) -> None:
    with rank(tmp_path, tmp_path) as program:
        assert program.wait(deadline=60) == exits.CONFIGURATION
    assert "this is not the folder of a run" in program.output()


def test_a_crash_ends_with_1_and_its_traceback(tmp_path: Path) -> None:
    with rank(tmp_path, "one", "word too many") as program:
        assert program.wait(deadline=60) == 1
    assert "ValueError: too many values to unpack" in program.output()
