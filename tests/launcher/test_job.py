"""The contract of every launcher: one set of tests, with real processes, over each kind of place."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.config import LaunchConfig
from launcher.hang import HangLimits
from launcher.job import (
    SIDECAR_NAME,
    Attempt,
    Job,
    JobSpec,
    JobState,
    Sidecar,
    tail,
    take_request,
    write_request,
)
from launcher.local import LocalLauncher
from tests.support.processes import assert_no_process, wait_for

SECONDS = 60.0
Submit = Callable[..., Job]

READY = ': > "$1/ready-$RANK"; while :; do sleep 0.02; done'
TRAP = f'trap "echo saved > \\"$1/saved-$RANK\\"; exit 75" TERM; {READY}'


@pytest.fixture(params=["local"])
def submit(request: pytest.FixtureRequest, tmp_path: Path) -> Submit:
    """Starts a shell script as a job; `$1` in it is the test's folder."""

    def start(script: str, *, ranks: int = 1, options: dict[str, object] | None = None, **fields: object) -> Job:
        config = LaunchConfig.model_validate({"restart_backoff_seconds": 0.0, **(options or {})})
        command = ["sh", "-c", script, "sh", str(tmp_path)]
        spec = JobSpec(command=command, log_folder=tmp_path / "logs", ranks=ranks, **fields)  # type: ignore[arg-type]
        assert request.param == "local"
        return LocalLauncher(config).submit(spec)

    return start


def ready(folder: Path, ranks: int) -> None:
    """Wait until that many ranks have said that they are ready."""
    wait_for(lambda: len(list(folder.glob("ready-*"))) == ranks, deadline=SECONDS, what="ranks are ready")


def test_success(submit: Submit) -> None:
    job = submit("exit 0", ranks=2)
    assert job.wait(SECONDS) == 0
    assert (job.state, job.exit_code) == (JobState.DONE, 0)
    assert job.state.is_terminal


@pytest.mark.parametrize("code", [2, 70, 74, 78])
def test_a_verdict_passes_through_and_is_not_retried(submit: Submit, tmp_path: Path, code: int) -> None:
    job = submit(f'echo tried >> "$1/tries"; exit {code}')
    assert job.wait(SECONDS) == code
    assert (job.state, job.exit_code) == (JobState.FAILED, code)
    assert (tmp_path / "tries").read_text() == "tried\n"


def test_failure_passes_its_code_through(submit: Submit) -> None:
    job = submit("exit 9", options={"max_restarts": 0})
    assert job.wait(SECONDS) == 9
    assert job.state is JobState.FAILED


def test_a_signal_is_reported_as_a_shell_does(submit: Submit) -> None:
    assert submit("kill -9 $$", options={"max_restarts": 0}).wait(SECONDS) == 137


def test_75_from_all_ranks_passes_through(submit: Submit, tmp_path: Path) -> None:
    job = submit('echo tried >> "$1/tries-$RANK"; exit 75', ranks=2)
    assert job.wait(SECONDS) == 75
    assert job.state is JobState.SAVED
    assert (tmp_path / "tries-0").read_text() == (tmp_path / "tries-1").read_text() == "tried\n"


def test_cancel_saves(submit: Submit, tmp_path: Path) -> None:
    job = submit(TRAP, ranks=2)
    ready(tmp_path, 2)
    wait_for(lambda: job.state is JobState.RUNNING, deadline=SECONDS, what="it is known to run")
    assert job.exit_code is None
    assert job.cancel()
    assert job.wait(SECONDS) == 75
    assert (job.state, job.exit_code) == (JobState.SAVED, 75)
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]
    assert not job.cancel()


def test_cancel_now_does_not(submit: Submit, tmp_path: Path) -> None:
    job = submit(TRAP, ranks=2)
    ready(tmp_path, 2)
    assert job.cancel(now=True)
    assert job.wait(SECONDS) == 130
    assert job.state is JobState.CANCELLED
    assert not list(tmp_path.glob("saved-*"))
    assert_no_process(str(tmp_path))


@pytest.mark.parametrize(("now", "code", "state"), [(False, 75, JobState.SAVED), (True, 130, JobState.CANCELLED)])
def test_a_request_that_came_before_the_job_is_obeyed_once(
    submit: Submit, tmp_path: Path, now: bool, code: int, state: JobState
) -> None:
    """Nothing is started for it; and the next job, which nobody has asked, is not stopped by it."""
    request_file = tmp_path / "request"
    write_request(request_file, now=now)
    script = 'echo ran >> "$1/ran"'
    job = submit(script, request_file=request_file)
    assert (job.wait(SECONDS), job.state) == (code, state)
    assert not (tmp_path / "ran").exists()
    assert submit(script, request_file=request_file).wait(SECONDS) == 0
    assert (tmp_path / "ran").read_text() == "ran\n"


@pytest.mark.parametrize(("now", "code"), [(False, 75), (True, 130)])
def test_a_request_reaches_the_ranks(submit: Submit, tmp_path: Path, now: bool, code: int) -> None:
    job = submit(TRAP, ranks=2, request_file=tmp_path / "request")
    ready(tmp_path, 2)
    write_request(tmp_path / "request", now=now)
    assert job.wait(SECONDS) == code
    assert not list(tmp_path.glob("request*")), "it is taken"
    assert len(list(tmp_path.glob("saved-*"))) == (0 if now else 2)


def test_waiting_has_a_limit(submit: Submit, tmp_path: Path) -> None:
    job = submit(TRAP)
    ready(tmp_path, 1)
    with pytest.raises(TimeoutError):
        job.wait(0.01)
    job.cancel(now=True)
    job.wait(SECONDS)


def test_logs(submit: Submit) -> None:
    job = submit('echo "out of $RANK"; echo "err of $RANK" >&2', ranks=2)
    job.wait(SECONDS)
    assert [path.read_text() for path in job.logs()] == ["out of 0\nerr of 0\n", "out of 1\nerr of 1\n"]


def test_environment(submit: Submit, tmp_path: Path) -> None:
    script = 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $GROUP_RANK $MASTER_ADDR $EXTRA"; pwd'
    (tmp_path / "work here").mkdir()
    job = submit(script, ranks=2, environment={"EXTRA": "a 'b' \"c\""}, working_directory=tmp_path / "work here")
    job.wait(SECONDS)
    for rank, path in enumerate(job.logs()):
        place, folder = path.read_text().splitlines()
        assert place == f"{rank} {rank} 2 2 0 127.0.0.1 a 'b' \"c\""
        assert Path(folder).name == "work here"


def test_all_ranks_are_told_the_same_port(submit: Submit) -> None:
    job = submit("echo $MASTER_PORT", ranks=3)
    job.wait(SECONDS)
    ports = {int(path.read_text()) for path in job.logs()}
    assert len(ports) == 1
    assert 0 < ports.pop() < 65536


def test_two_ranks_meet(submit: Submit) -> None:
    # Each rank waits for the other one's file: they must run at the same time.
    script = ': > "$1/here-$RANK"; while [ ! -e "$1/here-$((1 - RANK))" ]; do sleep 0.02; done'
    assert submit(script, ranks=2).wait(SECONDS) == 0


@pytest.mark.parametrize("deaths", [1, 2])
def test_restart_after_a_rank_was_killed(submit: Submit, tmp_path: Path, deaths: int) -> None:
    # Rank 1 kills itself in its first attempts; rank 0, as in a broken collective, never ends by itself then.
    script = f"""
        echo x >> "$1/tries-$RANK"
        [ $(wc -l < "$1/tries-$RANK") -gt {deaths} ] && exit 0
        [ $RANK = 1 ] && kill -9 $$
        exec sleep 600
    """
    job = submit(script, ranks=2)
    assert job.wait(SECONDS) == 0
    assert job.state is JobState.DONE
    assert job.logs()[0].parent.name == f"attempt-{deaths + 1}"
    assert_no_process(str(tmp_path))


def test_restarts_have_a_limit(submit: Submit, tmp_path: Path) -> None:
    job = submit('echo x >> "$1/tries"; exit 5', options={"max_restarts": 2, "max_no_progress": 100})
    assert job.wait(SECONDS) == 5
    assert (tmp_path / "tries").read_text() == "x\n" * 3


def test_crashes_without_progress_have_a_lower_one(submit: Submit, tmp_path: Path) -> None:
    job = submit('echo x >> "$1/tries"; exit 5', options={"max_restarts": 100, "max_no_progress": 2})
    assert job.wait(SECONDS) == 5
    assert (tmp_path / "tries").read_text() == "x\n" * 2


def test_attempts_are_counted_on(submit: Submit, tmp_path: Path) -> None:
    job = submit("exit 1", first_attempt=7, options={"max_restarts": 1})
    job.wait(SECONDS)
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["attempt-7", "attempt-8"]


def test_a_command_that_cannot_be_started_comes_out_of_wait(tmp_path: Path) -> None:
    job = LocalLauncher(LaunchConfig()).submit(JobSpec(["/no/such/program"], tmp_path / "logs"))
    with pytest.raises(Exception, match="cannot be started"):
        job.wait(SECONDS)
    assert job.state is JobState.FAILED


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_file_descriptors_are_passed_on_and_no_others(submit: Submit, tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as lock, (tmp_path / "other").open("w") as other:
        os.set_inheritable(other.fileno(), True)
        job = submit(
            "readlink /proc/$$/fd/* ; echo locked > /proc/self/fd/$FD",
            pass_fds=[lock.fileno()],
            environment={"FD": str(lock.fileno())},
        )
        job.wait(SECONDS)
    listed = job.logs()[0].read_text()
    assert str(tmp_path / "lock") in listed
    assert str(tmp_path / "other") not in listed
    assert (tmp_path / "lock").read_text() == "locked\n"


@pytest.mark.parametrize(
    "fields",
    [
        {"command": []},
        {"command": "echo one string"},
        {"command": ["echo", "a\0b"]},
        {"ranks": 0},
        {"environment": {"A": "\0"}},
        {"environment": {"A=B": "c"}},
        {"environment": {"": "c"}},
    ],
)
def test_a_spec_that_no_system_can_start_is_a_programming_error(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        JobSpec(**{"command": ["true"], "log_folder": Path("logs"), **fields})  # type: ignore[arg-type]


passable = st.text(st.characters(exclude_characters="\0"), max_size=8)  # lone surrogates too: bytes that are no UTF-8
commands = st.lists(passable, min_size=1, max_size=4)
environments = st.dictionaries(passable.filter(lambda name: name and "=" not in name), passable, max_size=3)
folders = passable.map(Path)
seconds = st.floats(0, 1e300, exclude_min=True)
sidecars = st.builds(Sidecar, st.from_regex(SIDECAR_NAME, fullmatch=True), commands, environments, seconds)
specs = st.builds(
    JobSpec,
    command=commands,
    log_folder=folders,
    ranks=st.integers(1, 10**6),
    nodes=st.integers(1, 10**6),
    environment=environments,
    working_directory=st.none() | folders,
    pass_fds=st.lists(st.integers(3, 9), max_size=2),
    first_attempt=st.integers(1, 10**6),
    sidecars=st.lists(sidecars, max_size=3, unique_by=lambda sidecar: sidecar.name),
    request_file=st.none() | folders.map(Path.absolute),
    hang=st.none()
    | st.builds(
        HangLimits, seconds, seconds, st.dictionaries(passable, seconds, max_size=3), st.tuples(passable, passable)
    ),
)


@given(specs)
def test_a_spec_is_read_in_another_process_as_it_was_written(spec: JobSpec) -> None:
    """Through the text of a file. Open files stay behind, and the log folder is the same from any folder."""
    text = json.dumps(spec.to_json())
    text.encode()
    read = JobSpec.from_json(json.loads(text))
    assert read == replace(spec, pass_fds=[], log_folder=spec.log_folder.absolute())


def test_the_defaults_survive_too() -> None:
    spec = JobSpec(("a", "b"), Path("logs"), hang=HangLimits())
    read = JobSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert (list(read.command), list(read.sidecars), read.hang) == (["a", "b"], [], HangLimits())
    assert read.to_json() == spec.to_json()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_request_that_comes_while_an_earlier_one_is_read_is_not_lost(tmp_path: Path) -> None:
    """The earlier one is a pipe: its reader waits for the text, and the second one comes meanwhile."""
    path = tmp_path / "request"
    os.mkfifo(path)
    pipe = os.open(path, os.O_PATH)
    with ThreadPoolExecutor() as executor:
        reader = executor.submit(take_request, path)
        with open(f"/proc/self/fd/{pipe}", "w", encoding="ascii") as earlier:  # opened when its reader has opened it
            write_request(path, now=True)
            earlier.write("save")
        assert reader.result(SECONDS) == "save"
    os.close(pipe)
    assert [take_request(path), take_request(path)] == ["now", None]
    assert list(tmp_path.iterdir()) == []


def test_an_attempt_before_its_first_end_has_no_cause(tmp_path: Path) -> None:
    attempt = Attempt(number=1, folder=tmp_path, ranks=2, pids=[1, 2], master_port=9)
    assert (attempt.cause, attempt.step, attempt.tail) == (None, None, [])
    assert [path.name for path in attempt.logs] == ["rank-0.log", "rank-1.log"]


def test_the_tail_is_short_and_survives_anything(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert tail(log) == []
    log.write_bytes(b"\xff" * 100_000 + b"\n" + b"".join(b"line %d\n" % n for n in range(100)))
    assert tail(log, lines=3) == ["line 97", "line 98", "line 99"]
    assert len(tail(log)) == 20
