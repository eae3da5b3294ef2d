"""Sidecars as real processes under real signals: who is started again, who is left alone, what is left at the end."""

from __future__ import annotations

import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.config import LaunchConfig
from launcher.errors import LaunchConfigurationError
from launcher.job import JobSpec, JobState, Sidecar
from launcher.local import LocalJob, LocalLauncher
from launcher.sidecar import Sidecars, backoff, sidecar_environment
from tests.support.processes import Program, assert_no_process, wait_for

SECONDS = 60.0
REPOSITORY = Path(__file__).resolve().parents[2]

READY = ': > "$1/ready-$RANK"; while :; do sleep 0.02; done'
SAVES = f'trap "echo saved > \\"$1/saved-$RANK\\"; exit 75" TERM; {READY}'
UNTIL_TOLD = ': > "$1/ready-$RANK"; while [ ! -e "$1/finish" ]; do sleep 0.02; done'
SERVES = 'trap "echo asked; exit 0" TERM; echo up; while :; do sleep 0.02; done'
DEAF = 'trap "" TERM INT; echo up; while :; do sleep 0.02; done'

SUPERVISOR = """
import sys
from pathlib import Path
from launcher import JobSpec, LaunchConfig, LocalLauncher, Sidecar
folder, ranks, side = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
def shell(script):
    return ["sh", "-c", script, "sh", str(folder)]
spec = JobSpec(shell(ranks), folder / "logs", sidecars=[Sidecar("service", shell(side))])
launcher = LocalLauncher(LaunchConfig(), on_event=lambda kind, **fields: print(kind, flush=True))
sys.exit(launcher.run(spec).exit_code)
"""


class Started:
    """A job with one sidecar, `service`, and what it told."""

    def __init__(
        self, folder: Path, side: str, ranks: str, *, backoff_seconds: float = 0.01, world: int = 1, **options: object
    ) -> None:
        self.folder = folder
        self.told: list[tuple[str, dict[str, Any]]] = []

        def note(kind: str, /, **fields: object) -> None:
            self.told.append((kind, fields))

        config = LaunchConfig.model_validate({"restart_backoff_seconds": 0.0, **options})
        sidecar = Sidecar("service", self.shell(side), restart_backoff_seconds=backoff_seconds)
        spec = JobSpec(self.shell(ranks), folder / "logs", ranks=world, sidecars=[sidecar])
        self.job: LocalJob = LocalLauncher(config, on_event=note).submit(spec)

    def shell(self, script: str) -> list[str]:
        return ["sh", "-c", script, "sh", str(self.folder)]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.told if name == kind]

    def wait_for(self, kind: str, count: int = 1) -> dict[str, Any]:
        """The event of that number, counted from 1."""
        wait_for(lambda: len(self.events(kind)) >= count, deadline=SECONDS, what=f"{count} of {kind}")
        return self.events(kind)[count - 1]

    def up(self, count: int = 1) -> None:
        """Wait until the sidecar has written `up` that often."""
        log = self.folder / "logs" / "service.log"
        wait_for(
            lambda: log.exists() and log.read_text().count("up\n") == count, deadline=SECONDS, what="the sidecar is up"
        )

    def ranks_ready(self) -> None:
        ranks = self.job.spec.ranks
        wait_for(lambda: len(list(self.folder.glob("ready-*"))) == ranks, deadline=SECONDS, what="ranks are ready")
        self.wait_for("attempt_started")

    def finish(self) -> None:
        """Let ranks that run UNTIL_TOLD leave."""
        (self.folder / "finish").touch()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_sidecar_that_is_killed_comes_back_and_the_ranks_notice_nothing(tmp_path: Path, number: int) -> None:
    started = Started(tmp_path, "echo up; exec sleep 600", UNTIL_TOLD, world=2)
    started.ranks_ready()
    ranks = [psutil.Process(pid) for pid in started.job.attempts[0].pids]
    for turn in (1, 2):
        first = started.wait_for("sidecar_started", turn)
        assert first["starts"] == turn
        started.up(turn)
        os.kill(first["pid"], number)
    last = started.wait_for("sidecar_started", 3)
    started.up(3)
    assert all(rank.is_running() for rank in ranks)
    started.finish()
    assert started.job.wait(SECONDS) == 0
    assert [attempt.number for attempt in started.job.attempts] == [1]
    end = started.events("sidecar_exited")[0]
    seconds = end.pop("seconds")
    assert seconds > 0.0
    name = signal.Signals(number).name
    pid = started.events("sidecar_started")[0]["pid"]
    assert end == {"name": "service", "pid": pid, "exit_code": None, "signal": name}
    cause = {"name": "service", "cause": f"killed by {name}"}
    assert started.events("sidecar_restart") == [{**cause, "backoff_seconds": wait} for wait in (0.01, 0.02)]
    assert started.events("sidecar_exited")[-1]["pid"] == last["pid"], "the end of the job ended the last"
    assert_no_process(str(tmp_path))


@pytest.mark.parametrize("code", [0, 1, 75, 130])
def test_any_code_that_is_no_verdict_is_a_death(tmp_path: Path, code: int) -> None:
    started = Started(tmp_path, f"exit {code}", UNTIL_TOLD)
    started.wait_for("sidecar_started", 3)
    started.finish()
    assert started.job.wait(SECONDS) == 0
    assert started.events("sidecar_exited")[0]["exit_code"] == code


@pytest.mark.parametrize(("code", "meaning"), [(2, "called wrongly"), (78, "the configuration is wrong")])
def test_a_verdict_ends_the_job_and_says_whose_it_was(tmp_path: Path, code: int, meaning: str) -> None:
    waits = 'while [ ! -e "$1/ready-0" ]; do sleep 0.01; done'
    started = Started(tmp_path, f"{waits}; echo the reason; exit {code}", SAVES, world=2)
    assert started.job.wait(SECONDS) == code
    assert started.job.state is JobState.FAILED
    assert started.job.reason == f"service: exit code {code} ({meaning})"
    assert started.job.tail == ["the reason"]
    assert not list(tmp_path.glob("saved-*")), "the ranks were killed, not asked"
    assert {end["killed_by_launcher"] for end in started.events("rank_exited")} == {True}
    assert not started.events("sidecar_restart")
    assert len(started.job.attempts) == 1
    assert started.told[-1][0] == "finished"


def test_the_tail_is_the_ranks_where_they_were_the_cause(tmp_path: Path) -> None:
    started = Started(tmp_path, SERVES, "echo last words; exit 70")
    assert started.job.wait(SECONDS) == 70
    assert started.job.tail == ["last words"]


def test_ranks_that_are_saving_finish_although_a_sidecar_failed_for_good(tmp_path: Path) -> None:
    fails = 'while [ ! -e "$1/fail" ]; do sleep 0.02; done; echo no data; exit 78'
    saves = 'while [ ! -e "$1/finish" ]; do sleep 0.02; done; echo saved > "$1/saved"; exit 75'
    started = Started(tmp_path, fails, f"trap '{saves}' TERM; {READY}")
    started.ranks_ready()
    started.job.cancel()
    started.wait_for("stopping")
    (tmp_path / "fail").touch()
    started.wait_for("sidecar_exited")
    started.finish()
    assert started.job.wait(SECONDS) == 75
    assert (tmp_path / "saved").read_text() == "saved\n"
    assert (started.job.state, started.job.tail) == (JobState.SAVED, [])


def test_while_the_job_waits_between_two_attempts_a_sidecar_comes_back(tmp_path: Path) -> None:
    started = Started(tmp_path, "echo up; exec sleep 600", "exit 1", restart_backoff_seconds=3600.0)
    started.wait_for("restart")
    os.kill(started.wait_for("sidecar_started")["pid"], signal.SIGKILL)
    started.wait_for("sidecar_started", 2)
    assert (started.job.state, len(started.job.attempts)) == (JobState.PENDING, 1)
    started.job.cancel()
    assert started.job.wait(SECONDS) == 75
    assert_no_process(str(tmp_path))


def test_while_the_job_waits_between_two_attempts_a_verdict_ends_it(tmp_path: Path) -> None:
    fails = 'while [ ! -e "$1/fail" ]; do sleep 0.02; done; echo no data; exit 74'
    started = Started(tmp_path, fails, "exit 1", restart_backoff_seconds=3600.0)
    started.wait_for("restart")
    (tmp_path / "fail").touch()
    assert started.job.wait(SECONDS) == 74
    assert started.job.reason.startswith("service: exit code 74")
    assert started.job.tail == ["no data"]


def test_while_the_ranks_are_stopping_a_sidecar_comes_back(tmp_path: Path) -> None:
    needs = 'while [ ! -e "$1/second" ]; do sleep 0.02; done; exit 75'
    serves = '[ -e "$1/first" ] && : > "$1/second"; : > "$1/first"; exec sleep 600'
    started = Started(tmp_path, serves, f"trap '{needs}' TERM; {READY}")
    started.ranks_ready()
    started.job.cancel()
    started.wait_for("stopping")
    os.kill(started.events("sidecar_started")[0]["pid"], signal.SIGKILL)
    assert started.job.wait(SECONDS) == 75
    assert len(started.events("sidecar_started")) == 2


def test_it_lives_on_when_the_ranks_are_started_again(tmp_path: Path) -> None:
    started = Started(tmp_path, SERVES, 'if [ -e "$1/again" ]; then exit 0; fi; : > "$1/again"; exit 1')
    assert started.job.wait(SECONDS) == 0
    assert len(started.job.attempts) == 2
    assert len(started.events("sidecar_started")) == 1
    kinds = [kind for kind, _ in started.told]
    assert kinds.index("sidecar_started") < kinds.index("attempt_started")


@pytest.mark.parametrize(
    ("ranks", "code"), [(UNTIL_TOLD, 0), (f"{UNTIL_TOLD}; exit 70", 70), (f"{UNTIL_TOLD}; kill -9 $$", 137)]
)
def test_it_is_asked_to_leave_when_the_job_ends(tmp_path: Path, ranks: str, code: int) -> None:
    started = Started(tmp_path, SERVES, ranks, max_restarts=0)
    started.up()
    started.finish()
    assert started.job.wait(SECONDS) == code
    assert (tmp_path / "logs" / "service.log").read_text() == "up\nasked\n"
    assert started.events("sidecar_exited")[0]["exit_code"] == 0
    assert not started.events("sidecar_restart")
    assert_no_process(str(tmp_path))


def test_it_is_asked_after_the_ranks_have_saved(tmp_path: Path) -> None:
    started = Started(tmp_path, SERVES, SAVES)
    started.up()
    started.ranks_ready()
    started.job.cancel()
    assert started.job.wait(SECONDS) == 75
    kinds = [kind for kind, _ in started.told]
    assert kinds.index("rank_exited") < kinds.index("sidecar_exited") < kinds.index("finished")
    assert (tmp_path / "logs" / "service.log").read_text() == "up\nasked\n"


def test_cancelled_at_once_it_is_not_asked(tmp_path: Path) -> None:
    started = Started(tmp_path, SERVES, SAVES)
    started.up()
    started.ranks_ready()
    started.job.cancel(now=True)
    assert started.job.wait(SECONDS) == 130
    assert (tmp_path / "logs" / "service.log").read_text() == "up\n"
    assert started.events("sidecar_exited")[0]["signal"] == "SIGKILL"
    assert not started.events("sidecar_restart")
    assert_no_process(str(tmp_path))


def test_who_does_not_leave_is_killed_with_its_helpers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.local.SIDECAR_END_SECONDS", 0.3)
    helper = 'sh -c "trap : TERM; while :; do sleep 600; done" "$1" &'
    started = Started(tmp_path, f"{helper} {DEAF}", UNTIL_TOLD)
    started.up()
    started.finish()
    assert started.job.wait(SECONDS) == 0
    assert started.events("sidecar_exited")[0]["signal"] == "SIGKILL"
    assert_no_process(str(tmp_path))


def test_told_to_leave_at_once_while_it_is_being_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.local.SIDECAR_END_SECONDS", 3600.0)
    started = Started(tmp_path, DEAF, UNTIL_TOLD)
    started.up()
    started.finish()
    started.wait_for("rank_exited")
    wait_for(lambda: started.job.state is JobState.STOPPING, deadline=SECONDS, what="only the sidecar is left")
    assert (started.job.exit_code, started.job.reason) == (None, "")
    started.job.cancel(now=True)
    assert started.job.wait(SECONDS) == 0
    assert started.job.state is JobState.DONE


def test_what_a_dead_sidecar_left_behind_is_ended_before_the_next(tmp_path: Path) -> None:
    started = Started(tmp_path, 'sh -c "sleep 600; : left" "$1" & echo up; kill -9 $$', UNTIL_TOLD)
    started.wait_for("sidecar_started", 3)
    started.finish()
    started.job.wait(SECONDS)
    assert_no_process(str(tmp_path))


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux")
def test_nothing_is_left_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SUPERVISOR, tmp_path, UNTIL_TOLD, DEAF]
    with Program(command, log=tmp_path / "supervisor.log", cwd=REPOSITORY) as program:
        program.wait_for(lambda: (tmp_path / "ready-0").exists(), deadline=SECONDS, what="the rank is ready")
        program.wait_for(lambda: (tmp_path / "logs/service.log").read_text(), deadline=SECONDS, what="sidecar up")
        os.kill(program.pid, signal.SIGKILL)
        assert_no_process(str(tmp_path))


def test_a_second_interrupt_does_not_wait_for_a_sidecar(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SUPERVISOR, tmp_path, f'trap "" TERM; {READY}', DEAF]
    with Program(command, log=tmp_path / "supervisor.log", cwd=REPOSITORY) as program:
        program.wait_for(lambda: (tmp_path / "ready-0").exists(), deadline=SECONDS, what="the rank is ready")
        program.send(signal.SIGINT)
        program.wait_for(lambda: "stopping" in program.output(), deadline=SECONDS, what="the first is noticed")
        program.send(signal.SIGINT)
        assert program.wait(deadline=SECONDS) == 130, program.output()
        assert_no_process(str(tmp_path))


def test_its_environment_folder_and_log(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "service.log").write_text("earlier\n")
    lines = 'echo "$OF_JOB $OF_BOTH $OF_SIDECAR $PYTHONUNBUFFERED ${RANK-none} ${MASTER_PORT-none}"; basename "$PWD"'
    sidecar = Sidecar("service", ["sh", "-c", f"{lines} >&2; exit 78"], {"OF_BOTH": "sidecar", "OF_SIDECAR": "a 'b'"})
    spec = JobSpec(
        ["sleep", "600"],
        tmp_path / "logs",
        environment={"OF_JOB": "job", "OF_BOTH": "job"},
        working_directory=tmp_path / "work",
        sidecars=[sidecar],
    )
    assert LocalLauncher(LaunchConfig()).submit(spec).wait(SECONDS) == 78
    assert (tmp_path / "logs" / "service.log").read_text() == "earlier\njob sidecar a 'b' 1 none none\nwork\n"


def test_what_makes_a_rank_is_not_passed_on(tmp_path: Path) -> None:
    sidecar = Sidecar("service", ["true"], {"MASTER_ADDR": "chosen"})
    spec = JobSpec(["true"], tmp_path, environment={"A": "job"}, sidecars=[sidecar])
    inherited = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "x", "SOLOMONOV_HEARTBEAT": "/f", "A": "ours", "B": "b"}
    made = sidecar_environment(spec, sidecar, inherited)
    assert made == {"PYTHONUNBUFFERED": "1", "A": "job", "B": "b", "MASTER_ADDR": "chosen"}
    assert sidecar_environment(spec, sidecar, {"PYTHONUNBUFFERED": ""})["PYTHONUNBUFFERED"] == ""


def test_one_that_cannot_be_started_ends_the_job_before_any_rank(tmp_path: Path) -> None:
    sidecars = [Sidecar("good", ["sh", "-c", SERVES, str(tmp_path)]), Sidecar("bad", ["/no/such/program"])]
    job = LocalLauncher(LaunchConfig()).submit(
        JobSpec(["touch", str(tmp_path / "ran")], tmp_path / "logs", sidecars=sidecars)
    )
    with pytest.raises(LaunchConfigurationError, match="/no/such/program"):
        job.wait(SECONDS)
    assert (job.state, job.exit_code, job.tail) == (JobState.FAILED, None, [])
    assert not (tmp_path / "ran").exists()
    assert_no_process(str(tmp_path))


def test_one_that_cannot_be_started_again_is_tried_again(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho up\nexec sleep 600\n")
    program.chmod(0o755)
    told: list[tuple[str, dict[str, object]]] = []

    def note(kind: str, /, **fields: object) -> None:
        told.append((kind, fields))

    sidecar = Sidecar("service", [str(program)], restart_backoff_seconds=0.01)
    sidecars = Sidecars(JobSpec(["true"], tmp_path, sidecars=[sidecar]), note)
    try:
        sidecars.start()
        # The shell opens the script by its name, which must be there until then.
        wait_for((tmp_path / "service.log").read_text, deadline=SECONDS, what="the sidecar is up")
        program.rename(tmp_path / "away")
        pid = told[0][1]["pid"]
        assert isinstance(pid, int)
        os.kill(pid, signal.SIGKILL)

        def tended(count: int) -> bool:
            assert sidecars.tend() is None
            return len(told) >= count

        wait_for(lambda: tended(4), deadline=SECONDS, what="a start that fails")
        assert [kind for kind, _ in told[1:4]] == ["sidecar_exited", "sidecar_restart", "sidecar_restart"]
        assert "cannot be started" in str(told[3][1]["cause"])
        assert sidecars.next_start < math.inf
        (tmp_path / "away").rename(program)
        wait_for(lambda: tended(5) and told[-1][0] == "sidecar_started", deadline=SECONDS, what="the next start")
    finally:
        sidecars.close()
    assert (sidecars.exit_fds, sidecars.next_start) == ([], math.inf)


def test_an_event_that_cannot_be_noted_leaves_no_sidecar(tmp_path: Path) -> None:
    def full(kind: str, /, **fields: object) -> None:
        if kind != "sidecar_started":
            raise OSError(28, "No space left on device")

    sidecar = Sidecar("service", ["sh", "-c", SERVES, str(tmp_path)])
    launcher = LocalLauncher(LaunchConfig(), on_event=full)
    job = launcher.submit(JobSpec(["sleep", "600"], tmp_path / "logs", sidecars=[sidecar]))
    with pytest.raises(OSError, match="No space left"):
        job.wait(SECONDS)
    assert job.state is JobState.FAILED
    assert_no_process(str(tmp_path))


def test_the_wait_doubles_to_half_a_minute() -> None:
    assert [backoff(0.5, deaths) for deaths in (1, 2, 3, 7, 10_000)] == [0.5, 1.0, 2.0, 30.0, 30.0]
    assert backoff(45.0, 9) == 45.0


def test_who_lived_long_starts_the_count_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.sidecar.STEADY_SECONDS", 0.0)
    started = Started(tmp_path, "exit 1", UNTIL_TOLD)
    started.wait_for("sidecar_restart", 4)
    started.finish()
    started.job.wait(SECONDS)
    assert {event["backoff_seconds"] for event in started.events("sidecar_restart")} == {0.01}


@pytest.mark.parametrize(
    "fields",
    [
        {"name": ""},
        {"name": "Service"},
        {"name": "a/b"},
        {"name": "a" * 41},
        {"name": "service\n"},
        {"command": "one string"},
        {"command": []},
        {"command": ["a\0b"]},
        {"environment": {"A=B": "c"}},
        {"restart_backoff_seconds": 0.0},
        {"restart_backoff_seconds": math.nan},
    ],
)
def test_a_sidecar_that_no_system_can_start_is_a_programming_error(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Sidecar(**{"name": "service", "command": ["true"], **fields})  # type: ignore[arg-type]


def test_two_of_one_name_are_a_programming_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a name of its own"):
        JobSpec(["true"], tmp_path, sidecars=[Sidecar("a", ["true"]), Sidecar("a", ["false"])])
