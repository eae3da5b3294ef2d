"""Bad input gets one clear message and the right exit code, nothing is lost, and nothing hangs.

Every fault is real: a file of wrong bytes, a flipped bit, a full file system, a bound socket, a second process.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.heartbeat import read_heartbeat
from tests.support.processes import program_environment, run_program
from tests.support.sampling import sampler
from tests.support.user import User, unexpected

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]
SHORT = ("training.total_steps=8", "checkpoint.every_steps=2", "launch.ranks_per_node=1", "evaluation.every_steps=0")


def refused(user: User, code: int, *words: str, **environment: str) -> str:
    """Run a command that must be refused: one message of four parts, no traceback."""
    found, output = user.solomonov(*words, **environment)
    assert found == code, output
    assert output.count("error: ") == 1, output
    assert all(f"  {part}:" in output for part in ("got", "rule", "remedy")), output
    assert "Traceback" not in output
    return output


def test_a_misspelt_key(user: User) -> None:
    output = refused(user, 78, "train", "own.yaml", "optimizer.learning_rat=1", "trainng.total_steps=3")
    assert "did you mean training" in output
    assert "optimizer.learning_rat" in output
    assert not user.run().exists()


def test_a_misspelt_launch_key(user: User) -> None:
    assert "did you mean launch.max_restarts?" in refused(user, 78, "train", "own.yaml", "launch.max_restart=1")


def test_a_batch_that_does_not_divide(user: User) -> None:
    output = refused(user, 78, "train", "own.yaml", "launch.ranks_per_node=3")
    assert "8 rows, over 3 data-parallel ranks x 4 rows" in output
    assert "use 1 or 2 data-parallel ranks" in output


@pytest.mark.sampled(4, group="bad input")
@pytest.mark.spare
def test_a_rank_that_cannot_allocate(user: User) -> None:
    """3 GiB of address space, of which the libraries take a part, for 8,192 rows in a micro-batch."""
    words = ("training.global_batch_tokens=262144", "training.micro_batch_sequences=8192")
    limit = ("prlimit", f"--as={3 * 2**30}", sys.executable, "-m", "solomonov.cli")
    code, output = run_program(
        [*limit, "train", "own.yaml", "launch.ranks_per_node=1", *words],
        log=user.folder / "limited.log",
        deadline=180,
        cwd=user.folder,
        env=program_environment(),
    )
    assert code == 78, output
    (fault,) = user.journal("fault")
    assert fault["kind"] == "ConfigurationError"
    message = fault["message"]
    assert "a rank could not allocate memory" in message
    assert "GiB at most" in message
    assert "foreseen ZeRO 1: " in message
    assert "the smallest change that would fit: training." in message
    assert len(user.journal("attempt_started")) == 1, "it would not fit the next time either"


def test_a_missing_corpus(tmp_path: Path) -> None:
    user = User.begin(tmp_path / "work")
    shutil.rmtree(user.folder / "text")
    assert "text/**/*.txt" in refused(user, 78, "prepare", "own.yaml")
    assert not (user.folder / "dataset" / "MANIFEST.json").exists()


def test_an_empty_corpus(tmp_path: Path) -> None:
    user = User.begin(tmp_path / "work")
    for path in (user.folder / "text").rglob("*.txt"):
        path.write_text("")
    refused(user, 78, "prepare", "own.yaml")


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    user = User.begin(tmp_path / "work")
    bad = user.folder / "text" / "part1" / "latin.txt"
    bad.write_bytes(b"all is well, then caf" + b"\xe9 noir\n")
    output = refused(user, 78, "prepare", "own.yaml")
    assert "latin.txt" in output
    assert "21" in output, "the byte offset is named"
    bad.write_text("café noir\n" * 20, encoding="utf-8")
    user.must("prepare", "own.yaml")


def test_data_that_is_not_prepared(tmp_path: Path) -> None:
    user = User.begin(tmp_path / "work")
    assert "solomonov prepare" in refused(user, 78, "train", "own.yaml")


def test_a_shard_that_changed_after_its_manifest(user: User) -> None:
    """Same size, one bit: found when the block is read, before any of its rows is used."""
    shard = next((user.folder / "dataset" / "shards").glob("own-train-*.tar"))
    index = json.loads(shard.with_name(shard.name.replace(".tar", ".index.json")).read_text())
    data = bytearray(shard.read_bytes())
    offset = next(m["offset"] for m in _members(index) if m["name"].endswith("tokens.bin"))
    data[offset] ^= 1
    shard.write_bytes(data)
    code, output = user.solomonov("train", "own.yaml")
    assert code == 74, output
    log = user.rank_logs()
    assert shard.name in log
    assert "remedy:" in log
    assert len(user.journal("attempt_started")) == 1, "retrying would not help"


def _members(index: object) -> Iterator[dict[str, int | str]]:
    """All member records of an index, wherever they stand in it."""
    if isinstance(index, dict):
        if {"name", "offset"} <= index.keys():
            yield index
        for value in index.values():
            yield from _members(value)
    elif isinstance(index, list):
        for value in index:
            yield from _members(value)


def test_a_truncated_shard(user: User) -> None:
    shard = next((user.folder / "dataset" / "shards").glob("own-train-*.tar"))
    os.truncate(shard, shard.stat().st_size - 512)
    assert shard.name in refused(user, 74, "train", "own.yaml")


@pytest.mark.sampled(4, group="bad input")
@pytest.mark.parametrize("damage", ["flip", "truncate", "manifest"])
@pytest.mark.spare
def test_a_damaged_checkpoint_the_one_before_is_used(damage: str, user: User, undisturbed: User) -> None:
    stopped = ("checkpoint.every_steps=10", "launch.ranks_per_node=2")
    with user.command("train", "own.yaml", *stopped) as program:
        program.wait_for(lambda: user.steps_done() >= 33, deadline=120, what="a step")
        program.kill()
    newest = sorted((user.run() / "checkpoints").glob("step-????????"))[-1]
    draw = sampler(f"damage {damage}")
    victim = newest / ("MANIFEST.json" if damage == "manifest" else "rank-00001.safetensors")
    data = bytearray(victim.read_bytes())
    if damage == "truncate":
        data = data[: draw.randrange(len(data))]
    else:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    victim.write_bytes(data)
    user.must("train", "own.yaml", *stopped)
    events = user.journal()
    broken = [event for event in events if event["event"] == "checkpoint_damaged"]
    assert broken, "the damage was not reported"
    assert int(newest.name[5:]) - 10 == user.journal("resumed")[-1]["step"]
    assert not unexpected(events, "checkpoint_damaged")
    assert user.metrics() == undisturbed.metrics()


@pytest.mark.sampled(4, group="bad input")
@pytest.mark.spare
def test_when_every_checkpoint_is_damaged_training_does_not_begin_anew(user: User) -> None:
    user.must("train", "own.yaml", *SHORT)
    for path in (user.run() / "checkpoints").glob("step-*/rank-00000.safetensors"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    before = user.metrics()
    with (user.run() / "journal.jsonl").open("a") as journal:  # as if it had not come to its end
        journal.write(json.dumps({"event": "resumed", "attempt": 1, "step": 0, "layout": {}}) + "\n")
    code, output = user.solomonov("train", "own.yaml", *SHORT)
    assert code == 74, output
    assert user.metrics() == before


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 3 MiB: room for the records of a run and a few checkpoints of 0.6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    done = subprocess.run(options, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.sampled(4, group="bad input")
@pytest.mark.parametrize("left", [0, 8192], ids=["nothing-left", "room-for-the-journal"])
@pytest.mark.spare
def test_a_full_disk_at_save_the_run_goes_on(left: int, user: User, disk: Path) -> None:
    folder = f"run.folder={disk}"
    long = ("training.total_steps=60", "checkpoint.every_steps=2", "launch.ranks_per_node=1")
    with user.command("train", "own.yaml", folder, *long) as program:
        journal = disk / "own" / "journal.jsonl"
        program.wait_for(lambda: _events(journal, "checkpoint_durable"), deadline=120, what="a checkpoint")
        filler = disk / "filler"
        fill(filler)
        if left:
            os.truncate(filler, filler.stat().st_size - left)
            failed = program.wait_for(
                lambda: _events(journal, "checkpoint_failed"), deadline=120, what="a refused checkpoint"
            )
            assert failed[0]["cause"] == "ENOSPC"
        full_since = _heartbeat_step(disk)
        program.wait_for(lambda: _heartbeat_step(disk) >= full_since + 7, deadline=120, what="steps on a full disk")
        filler.unlink()
        assert program.wait(deadline=180) == 0, program.output() + user.rank_logs()
    assert _steps(disk) == list(range(1, 61)), "a step was lost"
    assert len(_events(journal, "attempt_started")) == 1
    assert (disk / "own" / "checkpoints" / "step-00000060" / "MANIFEST.json").exists()
    user.must("checkpoints", "verify", str(disk / "own"))


def _heartbeat_step(disk: Path) -> int:
    """The step that the rank is at, which it tells without needing room on the disk."""
    record = read_heartbeat(disk / "own" / "logs" / "attempt-1" / "heartbeat-0")
    return record.step if record else -1


def fill(path: Path) -> None:
    """Write a file until its file system is full."""
    command = ["dd", "if=/dev/zero", f"of={path}", "bs=4096"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "No space left on device" in done.stderr, done.stderr


def _events(journal: Path, kind: str) -> list[dict[str, str]]:
    if not journal.exists():
        return []
    lines = [line for line in journal.read_bytes().splitlines(keepends=True) if line.endswith(b"}\n")]
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def _steps(disk: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (disk / "own" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.spare
def test_another_runs_folder(user: User) -> None:
    user.must("train", "own.yaml", *SHORT)
    before = user.metrics()
    output = refused(user, 78, "train", "own.yaml", *SHORT, "model.layers=3", "optimizer.lr=0.1")
    assert "model.layers: was 2, now 3" in output
    assert "optimizer.lr: was 0.003, now 0.1" in output
    assert user.metrics() == before


def test_a_folder_that_is_no_run(user: User) -> None:
    (user.run() / "photos").mkdir(parents=True)
    assert "holds something else" in refused(user, 78, "train", "own.yaml")


@pytest.mark.spare
def test_another_runs_checkpoint(user: User) -> None:
    user.must("train", "own.yaml", *SHORT)
    user.must("train", "own.yaml", *SHORT, "run.name=other")
    strange = user.run("other") / "checkpoints"
    shutil.rmtree(strange)
    shutil.copytree(user.run() / "checkpoints", strange)
    (user.run("other") / "journal.jsonl").unlink()
    code, output = user.solomonov("train", "own.yaml", *SHORT, "run.name=other")
    assert code == 78, output
    assert "another run" in user.rank_logs()


@pytest.mark.sampled(4, group="bad input")
@pytest.mark.spare
def test_two_processes_on_one_run(user: User, undisturbed: User) -> None:
    with user.command("train", "own.yaml") as program:
        program.wait_for(lambda: user.steps_done() >= 2, deadline=120, what="a step")
        os.kill(program.pid, 19)  # the first one holds still, so that the second meets it for certain
        pids = user.journal("attempt_started")[-1]["pids"]
        for pid in pids:
            os.kill(pid, 19)
        output = refused(user, 78, "train", "own.yaml")
        assert f"process {program.pid} on {socket.gethostname()}" in output
        for pid in (*pids, program.pid):
            os.kill(pid, 18)
        assert program.wait(deadline=180) == 0, program.output()
    assert user.metrics() == undisturbed.metrics()


def test_a_taken_port(user: User) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        assert str(port) in refused(user, 78, "train", "own.yaml", f"launch.master_port={port}")


@pytest.mark.sampled(4, group="bad input")
@pytest.mark.spare
def test_no_compiler_trains_eagerly_and_says_so(user: User, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    output = user.must("train", "own.yaml", *SHORT, "training.compile=true", PATH=str(programs))
    assert "torch.compile: eager instead" in output
    (event,) = user.journal("fallback")
    assert event["what"] == "torch.compile"
    assert "compiler" in event["reason"]
    assert len(user.metrics()) == 8


def test_no_write_permission(user: User, tmp_path: Path) -> None:
    """A read-only file system: the one kind of refusal that holds for root as well."""
    folder = tmp_path / "readonly"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a read-only file system cannot be mounted here: {done.stderr}")
    try:
        assert "Read-only" in refused(user, 78, "train", "own.yaml", f"run.folder={folder}")
        assert "Read-only" in refused(user, 78, "prepare", "own.yaml", f"data.folder={folder}/data")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("words", [("evaluate", "nothing"), ("export", "nothing"), ("checkpoints", "list", "nothing")])
def test_a_run_that_is_not_there(words: tuple[str, ...], user: User) -> None:
    assert "there is no such run" in refused(user, 78, *words)


@pytest.mark.sampled(4, group="bad input")
@pytest.mark.spare
def test_numbers_that_blow_up_end_with_70(user: User) -> None:
    """A learning rate of 1e30 makes the weights infinite: skipped updates are counted, then the run ends."""
    code, output = user.solomonov(
        "train", "own.yaml", "optimizer.lr=1e30", "resilience.max_skipped_updates=3", "launch.ranks_per_node=1"
    )
    assert code == 70, output
    assert "not finite" in user.rank_logs()
    assert len(user.journal("attempt_started")) == 1, "retrying would not help"
    lines = [json.loads(line) for line in (user.run() / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines[-4:]] == [True] * 4
