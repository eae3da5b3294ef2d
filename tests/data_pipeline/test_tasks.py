"""The task runner with real processes: records, failures, dead workers, a killed parent, Ctrl-C, the lock.

On a real cluster: tests/e2e/test_prepare_on_ray.py.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import psutil
import pytest

from data_pipeline.errors import DamagedDataError, DataConfigurationError, DataError
from data_pipeline.files import explained_os_errors, write_atomically, write_bytes
from data_pipeline.progress import Progress
from data_pipeline.tasks import WORK, Runner, Task, _execute_on_node, work_lock
from tests.support.processes import Program

ROOT = Path(__file__).resolve().parents[2]


def note(folder: Path, name: str, text: str) -> dict[str, Any]:
    """Task: writes a file; a later run of it is seen in `runs`."""
    from data_pipeline.shards import file_record

    (folder / name).write_text(text)
    with (folder / "runs").open("a") as runs:
        runs.write(name + "\n")
    return {"files": [file_record(folder, name)], "text": text, "pid": os.getpid()}


def fail(kind: str) -> dict[str, Any]:
    """Task: fails in one of the ways that a task may."""
    told = {"got": "g", "rule": "r", "remedy": "m"}
    if kind == "configuration":
        raise DataConfigurationError("wrong", **told)
    if kind == "damage":
        raise DamagedDataError("damaged", **told)
    if kind == "os":
        Path("/nonexistent/file").read_bytes()
    if kind == "exit":
        os._exit(9)
    raise ZeroDivisionError("a bug")


def hang(folder: Path) -> dict[str, Any]:
    """Task: says who it is and does not end."""
    (folder / f"worker-{os.getpid()}").touch()
    time.sleep(600)
    return {}


@contextmanager
def runner(folder: Path, workers: int = 1) -> Iterator[Runner]:
    with Progress(show=False) as progress, Runner(folder, workers, progress) as running:
        yield running


def notes(folder: Path, count: int = 3) -> list[Task]:
    return [
        Task(f"note-{number}", note, {"folder": folder, "name": f"{number}.txt", "text": f"text {number}"})
        for number in range(count)
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_recorded_tasks_are_not_run_again(tmp_path: Path, workers: int) -> None:
    with runner(tmp_path, workers) as running:
        first = running.run("notes", notes(tmp_path))
        assert [result["text"] for result in first] == ["text 0", "text 1", "text 2"]
        assert running.redone == 3
        assert all((result["pid"] == os.getpid()) == (workers == 1) for result in first)
    with runner(tmp_path, workers) as running:
        assert running.run("notes", notes(tmp_path)) == first
        assert running.redone == 0
        (tmp_path / "0.txt").unlink()
        (tmp_path / "1.txt").write_text("tExt 1")
        assert [each["text"] for each in running.run("notes", notes(tmp_path))] == ["text 0", "text 1", "text 2"]
        assert running.redone == 2
    assert sorted((tmp_path / "runs").read_text().split()) == ["0.txt", "0.txt", "1.txt", "1.txt", "2.txt"]


def test_a_cluster_is_joined_for_a_task_alone(tmp_path: Path) -> None:
    with runner(tmp_path) as running:
        first = running.run("notes", notes(tmp_path))
    # Nobody listens there.
    with Progress(show=False) as progress, Runner(tmp_path, 2, progress, "127.0.0.1:1") as running:
        assert running.run("notes", notes(tmp_path)) == first


def test_tasks_without_a_name_always_run_and_need_not_be_counted(tmp_path: Path) -> None:
    task = Task("", note, {"folder": tmp_path, "name": "a.txt", "text": "x"}, counted=False)
    with runner(tmp_path) as running:
        running.run("notes", [task])
        running.run("notes", [task])
        assert running.redone == 0
        assert running.run("nothing", []) == []
    assert (tmp_path / "runs").read_text() == "a.txt\n" * 2
    assert not (tmp_path / WORK).exists()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("configuration", DataConfigurationError),
        ("damage", DamagedDataError),
        ("os", FileNotFoundError),
        ("bug", ZeroDivisionError),
    ],
)
def test_a_failure_arrives_as_it_was_raised(tmp_path: Path, workers: int, kind: str, error: type[Exception]) -> None:
    with pytest.raises(error) as caught, runner(tmp_path, workers) as running:
        running.run("failing", [Task("fail", fail, {"kind": kind})])
    if isinstance(caught.value, DataError):
        assert (caught.value.got, caught.value.rule, caught.value.remedy) == ("g", "r", "m")
    if isinstance(caught.value, OSError):
        assert caught.value.filename == "/nonexistent/file"
    assert not (tmp_path / WORK / "done" / "fail.json").exists()


def test_tasks_that_finish_beside_a_failing_one_are_kept(tmp_path: Path) -> None:
    with pytest.raises(DataConfigurationError), runner(tmp_path) as running:
        running.run("mixed", [*notes(tmp_path), Task("fail", fail, {"kind": "configuration"})])
    assert len(list((tmp_path / WORK / "done").iterdir())) == 3


def test_a_dead_worker_is_one_clear_message(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="worker process of the preparation died") as caught, runner(tmp_path, 2) as r:
        r.run("dying", [Task("exit", fail, {"kind": "exit"})])
    assert "data.prepare.workers" in caught.value.remedy


HANGING = """
import sys
from pathlib import Path
from tests.data_pipeline.test_tasks import hang, runner
from data_pipeline.tasks import Task

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    try:
        with runner(folder, 2) as running:
            running.run("hanging", [Task(f"hang-{n}", hang, {"folder": folder}) for n in range(2)])
    except KeyboardInterrupt:
        print("interrupted")
        raise SystemExit(130)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_busy_workers_end_with_their_parent(tmp_path: Path, number: int) -> None:
    script = tmp_path / "hanging.py"
    script.write_text(HANGING)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with Program([sys.executable, script, tmp_path], log=tmp_path / "log", cwd=ROOT, env=env) as parent:
        parent.wait_for(lambda: len(list(tmp_path.glob("worker-*"))) == 2, deadline=120, what="two workers")
        workers = [psutil.Process(int(path.name.removeprefix("worker-"))) for path in tmp_path.glob("worker-*")]
        if number == signal.SIGINT:
            # A terminal sends Ctrl-C to the whole group.
            os.killpg(parent.pid, number)
            assert parent.wait(deadline=60) == 130
            assert parent.output() == "interrupted\n"
        else:
            os.kill(parent.pid, number)
            parent.wait(deadline=60)
        _, alive = psutil.wait_procs(workers, timeout=30)
        assert not alive


def test_a_worker_whose_parent_is_gone_already_ends_at_once() -> None:
    code = "from data_pipeline.tasks import _start_worker; _start_worker(1); print('still here')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.parametrize("content", [None, "prepare-other"])
def test_a_node_that_does_not_see_the_folder_is_named_and_writes_nothing(tmp_path: Path, content: str | None) -> None:
    mark = tmp_path / "mark"
    if content is not None:
        mark.write_text(content)
    arguments = {"folder": tmp_path, "name": "a.txt", "text": "x"}
    with pytest.raises(DataConfigurationError, match="cannot use") as caught:
        _execute_on_node(note, arguments, (mark, "prepare-ours")).unwrap()
    assert socket.gethostname() in caught.value.what
    assert str(mark) in caught.value.got
    assert "backend: local" in caught.value.remedy
    assert not (tmp_path / "a.txt").exists()
    mark.write_text("prepare-ours")
    assert _execute_on_node(note, arguments, (mark, "prepare-ours")).unwrap()["text"] == "x"


def refused(number: int) -> dict[str, Any]:
    """Task: fails as the system does."""
    raise OSError(number, os.strerror(number), "/shared/file")


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EACCES, "no permission"),
        (errno.ENOENT, "cannot use"),
        (errno.EIO, "cannot use"),
    ],
)
def test_what_the_system_refuses_on_a_node_names_it(tmp_path: Path, number: int, message: str) -> None:
    with pytest.raises(DataConfigurationError, match=message) as caught, explained_os_errors(tmp_path):
        _execute_on_node(refused, {"number": number}, None).unwrap()
    assert "/shared/file" in caught.value.got
    assert socket.gethostname() in caught.value.got


def test_two_writers_with_one_pid_do_not_meet_in_one_unfinished_file(tmp_path: Path) -> None:
    path, aside = tmp_path / "file", tmp_path / "aside"

    def write(file: IO[bytes]) -> None:
        file.write(b"same ")
        write_bytes(path, aside, b"same bytes")
        file.write(b"bytes")

    write_atomically(path, aside, write)
    assert path.read_bytes() == b"same bytes"
    assert not list(aside.iterdir())


def test_the_lock_is_free_again_after_its_holder(tmp_path: Path) -> None:
    with work_lock(tmp_path / "new" / "folder"):
        assert (tmp_path / "new" / "folder" / WORK / "lock").exists()
    with work_lock(tmp_path / "new" / "folder"):
        pass


def test_a_lock_on_a_file_that_was_removed_meanwhile_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def finished_just_now(*_: object) -> None:
        (tmp_path / WORK / "lock").unlink()

    monkeypatch.setattr(fcntl, "flock", finished_just_now)
    with pytest.raises(DataConfigurationError, match="Another process"), work_lock(tmp_path):
        pass


def test_progress_says_a_line_a_phase_where_there_is_no_terminal(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Progress(show=True, stream=stream) as progress, Runner(tmp_path, 1, progress) as running:
        running.run("take notes", notes(tmp_path))
    assert stream.getvalue().startswith("take notes: 3 of 3, ")
    assert stream.getvalue().count("\n") == 1
