"""The run folder against what a second command would find: its records, what it refuses, and a lock that real
processes hold, inherit and lose by SIGKILL."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from solomonov.config import flatten
from solomonov.errors import ConfigurationError
from solomonov.runfolder import (
    LockOwner,
    RunFolder,
    all_runs,
    find_run,
    is_locked,
    lock_holder,
    open_run,
    run_lock,
    write_atomically,
)
from tests.solomonov.checkpoint.common import ordinary_user, small_disk
from tests.support.processes import ROOT, Program, program_environment, wait_for
from tests.support.runs import begin_run, load
from tests.support.user import User

DATA = {"manifest_digest": "aa", "tokenizer_digest": "bb"}


def opened(user: User, *overrides: str, data: dict[str, str] | None = None) -> RunFolder:
    return open_run(load(user, *overrides), launch={"nodes": 1}, data=data or DATA, derived={"ranks": 1})


def refusal(user: User, *overrides: str, data: dict[str, str] | None = None) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        opened(user, *overrides, data=data)
    return caught.value


# --- records -------------------------------------------------------------------------------------------------


def test_the_record_gives_back_the_configuration(user: User) -> None:
    run = opened(user, "optimizer.lr=0.125", "data.sources.0.weight=2.5")
    loaded = load(user, "optimizer.lr=0.125", "data.sources.0.weight=2.5")
    assert run.config() == loaded.config
    assert (run.path / "config.yaml").read_text() == loaded.text
    record = run.resolved()
    assert record["values"]["optimizer.lr"] == {"value": 0.125, "origin": "override"}
    assert record["values"]["model.layers"] == {"value": 2, "origin": "config"}
    assert record["values"]["optimizer.eps"]["origin"] == "default"
    assert record["values"].keys() == flatten(loaded.config).keys(), "every value has its line"
    assert record["overrides"] == ["optimizer.lr=0.125", "data.sources.0.weight=2.5"]
    assert (record["data"], record["derived"], record["launch"]) == (
        DATA,
        {"ranks": 1},
        {"nodes": {"value": 1, "origin": "default"}},
    )
    assert record["values"]["data.sources"]["origin"] == "override"
    assert run.data_folder() == user.folder / "dataset"
    assert [event["run_id"] for event in run.journal.events("run_created")] == [run.run_id()]


def test_opening_again_keeps_the_identity_and_takes_the_new_values(user: User) -> None:
    before = opened(user).run_id()
    free = ("checkpoint.every_steps=7", "parallel.zero_stage=3", "training.micro_batch_sequences=2")
    run = opened(user, *free, "training.ema_decay=0.9")
    assert run.run_id() == before
    assert run.config().checkpoint.every_steps == 7
    assert run.config().training.ema_decay == 0.9
    assert len(list(run.journal.events("run_created"))) == 1
    assert opened(user, "run.name=other").run_id() != before


LAYOUTS = [
    ("parallel=auto",),
    ("parallel.zero_stage=1",),
    ("parallel.zero_stage=3",),
    ("parallel.zero_stage=1", "parallel.pipeline=2"),
]


@pytest.mark.parametrize("before", LAYOUTS, ids=" ".join)
@pytest.mark.parametrize("after", LAYOUTS, ids=" ".join)
def test_a_run_goes_on_in_another_layout_or_in_one_that_is_chosen_for_it(
    before: tuple[str, ...], after: tuple[str, ...], user: User
) -> None:
    """`auto` is one value in the place of a whole section."""
    identity = opened(user, *before).run_id()
    run = opened(user, *after)
    assert run.run_id() == identity
    assert run.config().parallel == load(user, *after).config.parallel


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (None, "this is not the folder of a run"),
        ("{", "this is not the folder of a run"),
        ("[]", "schema"),
        ('{"schema_version": 99}', "schema"),
    ],
)
def test_a_record_that_cannot_be_read_is_refused(text: str | None, what: str, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    if text is not None:
        run.resolved_path.write_text(text)
    with pytest.raises(ConfigurationError, match=what):
        run.resolved()


def test_a_run_is_found_by_name_and_by_path(user: User) -> None:
    run = opened(user)
    assert find_run("own") == find_run("runs/own") == RunFolder(Path("runs/own"))
    assert find_run(str(run.path.resolve())).run_id() == run.run_id()
    with pytest.raises(ConfigurationError, match="there is no such run") as caught:
        find_run("owm")
    assert caught.value.got == "owm"


def test_all_runs_by_name(tmp_path: Path) -> None:
    assert all_runs(tmp_path) == all_runs(tmp_path / "missing") == []
    for name in ("b", "a", "a-2", "a/deeper", "empty"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        if name != "empty":
            (tmp_path / name / "resolved.json").write_text("{}")
    (tmp_path / "resolved.json").write_text("{}")
    assert all_runs(tmp_path) == [RunFolder(tmp_path / name) for name in ("a", "a-2", "b")]


# --- refusals ------------------------------------------------------------------------------------------------


def test_what_is_learned_may_not_change(user: User) -> None:
    run = opened(user)
    before = {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    error = refusal(user, "optimizer.lr=0.5", "model.layers=3", "checkpoint.every_steps=9")
    assert "belongs to a run with another configuration" in error.what
    assert " ".join(error.got.split()) == "model.layers: was 2, now 3 optimizer.lr: was 0.003, now 0.5"
    error = refusal(user, data={**DATA, "manifest_digest": "cc"})
    assert error.got == "data manifest_digest: was aa, now cc"
    assert {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()} == before, "it was changed"


def test_a_key_of_a_later_release_is_at_its_default(user: User) -> None:
    """A run that an older release began has no value for it: it goes on with the default, and with no other value."""
    run = opened(user)
    record = run.resolved()
    del record["values"]["training.z_loss"]
    run.resolved_path.write_text(json.dumps(record))
    assert "training.z_loss: was None, now 0.1" in refusal(user, "training.z_loss=0.1").got
    assert opened(user).config().training.z_loss == 0.0


def test_a_folder_with_something_else_is_refused(user: User) -> None:
    notes = user.folder / "runs/own/notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    assert "holds something else" in refusal(user).what
    assert [path.name for path in notes.parent.iterdir()] == ["notes.txt"]


def test_what_a_kill_during_the_first_write_leaves_is_no_obstacle(user: User) -> None:
    folder = user.folder / "runs/own"
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    (folder / ".resolved.json.tmp-77").write_text('{"half')
    assert opened(user).config() == load(user).config


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 4, 5])
def test_a_start_that_was_killed_between_two_files_is_taken_up(kept: int, user: User) -> None:
    """Whatever number of the first start's files and folders stands, in the order in which they were made."""
    run = opened(user)
    made = sorted(run.path.iterdir(), key=lambda path: (path.stat().st_ctime_ns, path.name))
    for path in made[kept:]:
        path.rmdir() if path.is_dir() else path.unlink()
    again = opened(user)
    assert again.config() == load(user).config
    assert len(list(again.journal.events("run_created"))) == 1


def test_a_folder_without_permission_is_refused(user: User) -> None:
    loaded = load(user)
    with ordinary_user() as folder:
        os.chdir(folder)
        folder.chmod(0o500)
        with pytest.raises(ConfigurationError, match="Permission denied") as caught:
            open_run(loaded, launch={}, data=DATA, derived={})
        assert "run.folder" in caught.value.rule
        with pytest.raises(ConfigurationError, match="Permission denied"), run_lock(RunFolder(folder)):
            pass


def test_a_full_disk_at_the_start_is_refused(user: User) -> None:
    loaded = load(user)
    with small_disk("16k") as disk:
        os.chdir(disk)
        with pytest.raises(OSError, match="No space"):
            (disk / "filler").write_bytes(b"x" * (1 << 20))
        with pytest.raises(ConfigurationError, match="No space left"):
            open_run(loaded, launch={}, data=DATA, derived={})
        os.chdir("/")


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "one")
    before = os.open(path, os.O_RDONLY)
    write_atomically(path, "another")
    assert os.read(before, 100) == b"one", "who has it open reads the old one to its end"
    os.close(before)
    assert path.read_text() == "another"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


# --- lock ----------------------------------------------------------------------------------------------------

# Takes the lock; with an argument also starts a child that inherits it, and says its pid; with two, job and start, on
# behalf of that start of a cluster's job.
HOLDER = """
import subprocess, sys, time
from pathlib import Path
from solomonov.runfolder import LockOwner, RunFolder, run_lock
owner = LockOwner(sys.argv[2], int(sys.argv[3])) if len(sys.argv) == 4 else None
with run_lock(RunFolder(Path(sys.argv[1])), wait_seconds=60.0, owner=owner) as fd:
    child = None
    if len(sys.argv) == 3:
        child = subprocess.Popen(["sleep", "600"], pass_fds=[fd])
    print("held", child.pid if child else 0, flush=True)
    time.sleep(600)
"""


def holder(run: RunFolder, folder: Path, *words: str) -> Program:
    argv = [sys.executable, "-c", HOLDER, str(run.path), *words]
    return Program(argv, log=folder / "holder.txt", cwd=ROOT, env=program_environment())


def test_a_second_process_is_refused_with_pid_and_host_of_the_first(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "own")
    run.path.mkdir()
    with holder(run, tmp_path) as first:
        first.wait_for(lambda: "held" in first.output(), deadline=60, what="the lock")
        with pytest.raises(ConfigurationError) as caught, run_lock(run, wait_seconds=0.0):
            pass
        assert f"process {first.pid} on {socket.gethostname()}" in caught.value.got
        assert "another command is working on this run" in caught.value.what
        assert lock_holder(run)["pid"] == first.pid
        os.kill(first.pid, signal.SIGKILL)
        with run_lock(run, wait_seconds=60.0):
            assert lock_holder(run)["pid"] == os.getpid(), "a killed holder does not hold it"


def test_an_inherited_lock_is_held_until_the_child_is_gone(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "own")
    run.path.mkdir()
    with holder(run, tmp_path, "with a child") as first:
        first.wait_for(lambda: "held" in first.output(), deadline=60, what="the lock")
        child = int(first.output().split()[1])
        os.kill(first.pid, signal.SIGKILL)
        assert first.wait(deadline=30) == -signal.SIGKILL
        with pytest.raises(ConfigurationError, match=f"process {first.pid} "), run_lock(run, wait_seconds=0.0):
            pass
        os.kill(child, signal.SIGKILL)
        with run_lock(run, wait_seconds=60.0) as fd:
            assert os.get_inheritable(fd), "the ranks get it from their supervisor"


def test_the_lock_can_be_taken_again_after_it_was_given_back(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert lock_holder(run) == {}
    for _ in range(2):
        with run_lock(run, wait_seconds=0.0), pytest.raises(ConfigurationError), run_lock(run, wait_seconds=0.0):
            pass
    (tmp_path / "lock").write_text("[1]")
    assert lock_holder(run) == {}
    with run_lock(run, wait_seconds=0.0):
        assert json.loads((tmp_path / "lock").read_text())["host"] == socket.gethostname()


@pytest.fixture
def lost(tmp_path: Path) -> Iterator[tuple[RunFolder, Program]]:
    """A run whose lock is held by start 1 of Slurm's job 7, on a machine that the cluster lost sight of."""
    run = RunFolder(tmp_path / "own")
    run.path.mkdir()
    with holder(run, tmp_path, "slurm 7", "1") as program:
        program.wait_for(lambda: "held" in program.output(), deadline=60, what="the lock")
        yield run, program


def test_a_later_start_of_the_same_job_takes_the_lock(lost: tuple[RunFolder, Program]) -> None:
    run, first = lost
    assert (lock_holder(run)["job"], lock_holder(run)["start"]) == ("slurm 7", 1)
    with run_lock(run, wait_seconds=0.0, owner=LockOwner("slurm 7", 3)):
        assert first.running, "it does not wait for its end"
        assert (lock_holder(run)["pid"], lock_holder(run)["start"]) == (os.getpid(), 3)
        assert is_locked(run)
        for owner in (None, LockOwner("slurm 7", 1), LockOwner("slurm 7", 3), LockOwner("slurm 8", 9)):
            with pytest.raises(ConfigurationError, match="another command"), run_lock(run, wait_seconds=0, owner=owner):
                pass
        first.kill()
        assert is_locked(run), "the end of the first one does not give it away"
    assert not is_locked(run)
    with run_lock(run, wait_seconds=0.0):
        assert "job" not in lock_holder(run), "a command of a person has no owner"


@pytest.mark.parametrize(
    "owner", [None, LockOwner("slurm 7", 1), LockOwner("slurm 7", 0), LockOwner("slurm 8", 2), LockOwner("", 2)]
)
def test_nobody_else_takes_it(owner: LockOwner | None, lost: tuple[RunFolder, Program]) -> None:
    run, first = lost
    with (
        pytest.raises(ConfigurationError, match=f"process {first.pid} on") as caught,
        run_lock(run, wait_seconds=0.1, owner=owner),
    ):
        pass
    assert "another command is working on this run" in caught.value.what
    assert lock_holder(run)["pid"] == first.pid
    first.kill()
    with run_lock(run, wait_seconds=60.0, owner=owner):
        assert lock_holder(run)["pid"] == os.getpid()


def test_no_start_of_a_job_takes_the_lock_of_a_person(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with (
        run_lock(run),
        pytest.raises(ConfigurationError, match="another command"),
        run_lock(run, wait_seconds=0.0, owner=LockOwner("slurm 7", 99)),
    ):
        pass


def test_each_later_start_takes_it_from_the_one_before(lost: tuple[RunFolder, Program], tmp_path: Path) -> None:
    run, first = lost
    (tmp_path / "second").mkdir()
    with holder(run, tmp_path / "second", "slurm 7", "2") as second:
        second.wait_for(lambda: "held" in second.output(), deadline=60, what="the lock")
        assert first.running
        with run_lock(run, wait_seconds=0.0, owner=LockOwner("slurm 7", 4)):
            assert second.running
            assert lock_holder(run)["start"] == 4


def lock_of(program: Program) -> str | None:
    """Name that the lock file which a process has opened bears now."""
    for descriptor in Path(f"/proc/{program.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            name = descriptor.readlink().name
            if name.startswith("lock"):
                return name
    return None


def test_of_many_that_wait_one_at_a_time_has_it(lost: tuple[RunFolder, Program], tmp_path: Path) -> None:
    """People's commands that wait while the lock is taken from its holder meet at the new one."""
    run, first = lost
    with contextlib.ExitStack() as stack:
        waiting = []
        for number in range(3):
            (tmp_path / str(number)).mkdir()
            waiting.append(stack.enter_context(holder(run, tmp_path / str(number))))
        wait_for(lambda: all(lock_of(program) == "lock" for program in waiting), deadline=60, what="they wait")
        with run_lock(run, wait_seconds=0.0, owner=LockOwner("slurm 7", 2)):
            first.kill()
            wait_for(lambda: all(lock_of(program) == "lock" for program in waiting), deadline=60, what="they moved on")
            assert lock_holder(run)["pid"] == os.getpid()
            assert not [program for program in waiting if "held" in program.output()]
        for left in range(3, 0, -1):
            [has_it] = wait_for(lambda: [p for p in waiting if "held" in p.output()], deadline=60, what="the next")
            assert lock_holder(run)["pid"] == has_it.pid
            has_it.kill()
            waiting.remove(has_it)
            assert len(waiting) == left - 1


def test_the_support_makes_the_same_folder_as_the_command(user: User) -> None:
    run = begin_run(user)
    assert {path.name for path in run.path.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "exports",
        "journal.jsonl",
        "logs",
        "resolved.json",
    }
