"""The local launcher as its own process under real signals, and its events against what really happened."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

from launcher.config import LaunchConfig
from launcher.errors import LaunchConfigurationError
from launcher.job import JobSpec, JobState
from launcher.local import LocalLauncher
from launcher.mailbox import Mailbox
from tests.support.processes import Program, assert_no_process, processes_with, wait_for

SECONDS = 60.0
REPOSITORY = Path(__file__).resolve().parents[2]

# A supervisor as the command line makes one: run in the main thread, events to a file, exit code out.
SUPERVISOR = """
import json, os, signal, sys
from pathlib import Path
from launcher import JobSpec, LaunchConfig, LocalLauncher
folder, ranks, options, script = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
if os.environ.get("IGNORE"):
    signal.signal(signal.Signals[os.environ["IGNORE"]], signal.SIG_IGN)
def note(kind, **fields):
    with open(folder / "events.jsonl", "a") as file:
        file.write(json.dumps({"kind": kind, **fields}) + chr(10))
spec = JobSpec(command=["sh", "-c", script, "sh", str(folder)], log_folder=folder / "logs", ranks=ranks)
before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
job = LocalLauncher(LaunchConfig(**options), on_event=note).run(spec)
assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)], "put back"
assert job.wait() == job.exit_code
sys.exit(job.exit_code)
"""

READY = ': > "$1/ready-$RANK"; while :; do sleep 0.02; done'
SAVES = f'trap "echo saved >> \\"$1/saved-$RANK\\"; exit 75" TERM; {READY}'
DEAF = f'trap "" TERM INT; {READY}'


class Supervised(Program):
    """A supervisor process with its events."""

    def __init__(self, folder: Path, script: str, *, ranks: int = 2, ignore: str = "", **options: object) -> None:
        self.folder = folder
        settings = json.dumps({"restart_backoff_seconds": 0.0, **options})
        super().__init__(
            [sys.executable, "-c", SUPERVISOR, folder, str(ranks), settings, script],
            log=folder / "supervisor.log",
            cwd=REPOSITORY,
            env={**os.environ, "IGNORE": ignore},
        )

    def __enter__(self) -> Supervised:
        return self

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind so far."""
        path = self.folder / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if event["kind"] == kind]

    def ready(self, ranks: int = 2) -> None:
        """Wait until the start was noted and the ranks have installed their traps."""

        def met() -> bool:
            return bool(self.events("attempt_started")) and len(list(self.folder.glob("ready-*"))) == ranks

        self.wait_for(met, deadline=SECONDS, what="ranks are ready")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"])
def test_a_signal_saves_all_ranks_and_leaves_with_75(tmp_path: Path, name: str) -> None:
    with Supervised(tmp_path, SAVES) as supervisor:
        supervisor.ready()
        supervisor.send(signal.Signals[name])
        assert supervisor.wait(deadline=SECONDS) == 75, supervisor.output()
    assert [path.read_text() for path in sorted(tmp_path.glob("saved-*"))] == ["saved\n", "saved\n"]
    assert [event["signal"] for event in supervisor.events("stopping")] == [name]
    assert supervisor.events("finished")[0]["exit_code"] == 75
    assert_no_process(str(tmp_path))


def test_a_second_interrupt_kills_and_leaves_with_130(tmp_path: Path) -> None:
    with Supervised(tmp_path, DEAF) as supervisor:
        supervisor.ready()
        supervisor.send(signal.SIGINT)
        supervisor.wait_for(lambda: supervisor.events("stopping"), deadline=SECONDS, what="the first is noticed")
        supervisor.send(signal.SIGINT)
        assert supervisor.wait(deadline=SECONDS) == 130, supervisor.output()
    assert [event["now"] for event in supervisor.events("stopping")] == [False, True]
    assert {event["signal"] for event in supervisor.events("rank_exited")} == {"SIGKILL"}
    assert_no_process(str(tmp_path))


def test_a_second_preemption_signal_does_not_break_the_save(tmp_path: Path) -> None:
    slow = f'trap "sleep 0.5; echo saved > \\"$1/saved-$RANK\\"; exit 75" TERM; {READY}'
    with Supervised(tmp_path, slow) as supervisor:
        supervisor.ready()
        for _ in range(2):
            supervisor.send(signal.SIGTERM)
            supervisor.wait_for(lambda: supervisor.events("stopping"), deadline=SECONDS, what="stopping")
        supervisor.send(signal.SIGUSR1)
        assert supervisor.wait(deadline=SECONDS) == 75
    assert len(supervisor.events("stopping")) == 1
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_who_outstays_the_grace_is_killed_and_that_is_no_75(tmp_path: Path) -> None:
    half = f"if [ $RANK = 0 ]; then {SAVES}; else {DEAF}; fi"
    with Supervised(tmp_path, half, grace_seconds=1.5) as supervisor:
        supervisor.ready()
        supervisor.send(signal.SIGTERM)
        assert supervisor.wait(deadline=SECONDS) == 137
    ends = {event["rank"]: event for event in supervisor.events("rank_exited")}
    assert (ends[0]["exit_code"], ends[0]["killed_by_launcher"]) == (75, False)
    assert (ends[1]["signal"], ends[1]["killed_by_launcher"]) == ("SIGKILL", True)
    assert len(supervisor.events("attempt_started")) == 1
    assert_no_process(str(tmp_path))


def test_stopping_before_a_rank_has_a_handler_is_75(tmp_path: Path) -> None:
    with Supervised(tmp_path, READY) as supervisor:
        supervisor.ready()
        supervisor.send(signal.SIGTERM)
        assert supervisor.wait(deadline=SECONDS) == 75
    assert {event["signal"] for event in supervisor.events("rank_exited")} == {"SIGTERM"}


def test_a_signal_between_two_attempts_ends_the_wait(tmp_path: Path) -> None:
    with Supervised(tmp_path, "exit 1", restart_backoff_seconds=3600) as supervisor:
        supervisor.wait_for(lambda: supervisor.events("restart"), deadline=SECONDS, what="it backs off")
        supervisor.send(signal.SIGTERM)
        assert supervisor.wait(deadline=SECONDS) == 75
    assert len(supervisor.events("attempt_started")) == 1


def test_an_interrupt_counts_in_a_background_job_too(tmp_path: Path) -> None:
    with Supervised(tmp_path, SAVES, ignore="SIGINT") as supervisor:
        supervisor.ready()
        supervisor.send(signal.SIGINT)
        assert supervisor.wait(deadline=SECONDS) == 75


def test_nohup_is_respected(tmp_path: Path) -> None:
    with Supervised(tmp_path, SAVES, ignore="SIGHUP") as supervisor:
        supervisor.ready()
        supervisor.send(signal.SIGHUP)
        supervisor.send(signal.SIGUSR1)
        assert supervisor.wait(deadline=SECONDS) == 75
    assert [event["signal"] for event in supervisor.events("stopping")] == ["SIGUSR1"]


def test_exit_codes_are_true_even_where_sigchld_was_ignored(tmp_path: Path) -> None:
    with Supervised(tmp_path, "exit 78", ignore="SIGCHLD") as supervisor:
        assert supervisor.wait(deadline=SECONDS) == 78, supervisor.output()


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux")
def test_nothing_is_left_when_the_supervisor_is_killed(tmp_path: Path) -> None:
    with Supervised(tmp_path, DEAF, ranks=3) as supervisor:
        supervisor.ready(3)
        ranks = supervisor.events("attempt_started")[0]["pids"]
        assert {os.getpgid(pid) for pid in ranks} == set(ranks), "not in the supervisor's group"
        os.kill(supervisor.pid, signal.SIGKILL)
        assert_no_process(str(tmp_path), deadline=5.0)


def test_a_rank_that_dies_takes_its_group_and_its_peers_with_it(tmp_path: Path) -> None:
    script = f'sh -c "trap : TERM; while :; do sleep 600; done" "$1" & {DEAF}'
    with Supervised(tmp_path, script, max_restarts=0) as supervisor:
        supervisor.ready()
        pids = supervisor.events("attempt_started")[0]["pids"]
        assert isinstance(pids, list)
        os.kill(pids[1], signal.SIGSEGV)
        assert supervisor.wait(deadline=SECONDS) == 139
    first, second = supervisor.events("rank_exited")
    assert (first["rank"], first["signal"], first["killed_by_launcher"]) == (1, "SIGSEGV", False)
    assert (second["rank"], second["signal"], second["killed_by_launcher"]) == (0, "SIGKILL", True)
    assert_no_process(str(tmp_path))


def test_peers_may_say_why_before_they_are_killed(tmp_path: Path) -> None:
    # Rank 1 loses its connection and crashes at once; rank 0, which knows the reason, takes a little longer.
    script = """
        if [ $RANK = 1 ]; then while [ ! -e "$1/knows" ]; do sleep 0.01; done; exit 1; fi
        : > "$1/knows"; sleep 0.3; echo the reason; exit 78
    """
    with Supervised(tmp_path, script) as supervisor:
        assert supervisor.wait(deadline=SECONDS) == 78
    assert [event["exit_code"] for event in supervisor.events("rank_exited")] == [1, 78]


def test_events_tell_what_happened(tmp_path: Path) -> None:
    body = struct.pack("<8sQqII24s", b"SOLOHB01", time.monotonic_ns(), 41, 2, 1, b"backward")
    (tmp_path / "beat").write_bytes(body + struct.pack("<Q", zlib.crc32(body)))
    script = """
        cp "$1/beat" "$SOLOMONOV_HEARTBEAT"
        [ -e "$1/second" ] && exit 0
        : > "$1/second"; echo last words; kill -9 $$
    """
    events: list[tuple[str, dict[str, object]]] = []

    def note(kind: str, /, **fields: object) -> None:
        events.append((kind, fields))

    launcher = LocalLauncher(LaunchConfig(restart_backoff_seconds=0.25), on_event=note)
    job = launcher.submit(JobSpec(["sh", "-c", script, "sh", str(tmp_path)], tmp_path / "logs", first_attempt=5))
    assert job.wait(SECONDS) == 0
    kinds = ["attempt_started", "rank_exited", "restart", "attempt_started", "rank_exited", "finished"]
    assert [kind for kind, _ in events] == kinds
    first, second = job.attempts
    assert (first.number, second.number, first.tail, first.step) == (5, 6, ["last words"], 41)
    assert events[0][1] == {"attempt": 5, "ranks": 1, "pids": first.pids, "master_port": first.master_port}
    end = events[1][1]
    age, seconds = end.pop("heartbeat_age_seconds"), end.pop("seconds")
    assert isinstance(age, float)
    assert isinstance(seconds, float)
    assert min(age, seconds) > 0.0
    assert end == {
        "attempt": 5,
        "rank": 0,
        "host": None,
        "pid": first.pids[0],
        "exit_code": None,
        "signal": "SIGKILL",
        "killed_by_launcher": False,
        "lost": False,
        "step": 41,
        "section": "backward",
    }
    assert events[2][1] == {"attempt": 6, "cause": "rank 0: killed by SIGKILL", "rank": 0, "backoff_seconds": 0.25}
    assert events[5][1] == {"exit_code": 0, "attempts": 2, "reason": "done", "rank": 0}


def test_durable_steps_are_the_progress_where_they_are_told(tmp_path: Path) -> None:
    durable = iter([10, 20, 30, 30, 30])  # before the first attempt, and after each
    launcher = LocalLauncher(
        LaunchConfig(restart_backoff_seconds=0.0, max_no_progress=2), durable_step=lambda: next(durable)
    )
    job = launcher.submit(JobSpec(["sh", "-c", "exit 1"], tmp_path / "logs"))
    assert job.wait(SECONDS) == 1
    assert len(job.attempts) == 4
    assert "without progress past step 30" in job.reason


def test_a_port_that_is_taken_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        config = LaunchConfig(master_port=holder.getsockname()[1])
        with pytest.raises(LaunchConfigurationError, match=str(config.master_port)) as caught:
            LocalLauncher(config).run(JobSpec(["touch", str(tmp_path / "ran")], tmp_path / "logs"))
    assert caught.value.exit_code == 78
    assert f"process {os.getpid()}" in caught.value.got
    assert not (tmp_path / "ran").exists()


def test_a_port_that_was_given_is_the_one_that_is_used(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    job = LocalLauncher(LaunchConfig(master_port=port)).run(
        JobSpec(["sh", "-c", "echo $MASTER_PORT"], tmp_path / "logs")
    )
    assert job.logs()[0].read_text() == f"{port}\n"
    assert job.attempts[0].master_port == port


@pytest.mark.parametrize("obstacle", ["a file in the way", "no folder can be made", "no file can be made"])
def test_logs_that_cannot_be_written_are_refused(tmp_path: Path, obstacle: str) -> None:
    (tmp_path / "file").touch()
    folder = {
        "a file in the way": tmp_path / "file" / "logs",
        "no folder can be made": Path("/proc/self/fdinfo/logs"),  # refuses root too
        "no file can be made": Path("/proc/self/fdinfo"),
    }[obstacle]
    with pytest.raises(LaunchConfigurationError, match="logs cannot be written") as caught:
        LocalLauncher(LaunchConfig()).submit(JobSpec(["true"], folder))
    assert (caught.value.exit_code, str(folder) in caught.value.got) == (78, True)


def test_an_event_that_cannot_be_noted_ends_the_job_and_its_ranks(tmp_path: Path) -> None:
    def full(kind: str, /, **fields: object) -> None:
        raise OSError(28, "No space left on device")

    job = LocalLauncher(LaunchConfig(), on_event=full).submit(
        JobSpec(["sh", "-c", DEAF, "sh", str(tmp_path)], tmp_path / "logs")
    )
    with pytest.raises(OSError, match="No space left"):
        job.wait(SECONDS)
    assert job.state is JobState.FAILED
    assert_no_process(str(tmp_path))


def test_a_job_outlives_the_thread_that_submitted_it(tmp_path: Path) -> None:
    jobs = []
    launcher = LocalLauncher(LaunchConfig())
    spec = JobSpec(["sh", "-c", SAVES, "sh", str(tmp_path)], tmp_path / "logs")
    thread = threading.Thread(target=lambda: jobs.append(launcher.submit(spec)))
    thread.start()
    thread.join()
    wait_for(lambda: (tmp_path / "ready-0").exists(), deadline=SECONDS, what="the rank is ready")
    assert processes_with(str(tmp_path))
    wait_for(lambda: jobs[0].state is JobState.RUNNING, deadline=SECONDS, what="it is known to run")
    assert jobs[0].cancel()
    assert jobs[0].wait(SECONDS) == 75


def test_more_nodes_are_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(LaunchConfigurationError, match="other machines") as caught:
        LocalLauncher(LaunchConfig()).submit(JobSpec(["true"], tmp_path / "logs", nodes=2))
    assert "solomonov submit" in caught.value.remedy
    assert not (tmp_path / "logs").exists()


def test_nothing_is_started_for_a_job_that_another_has_taken_over(tmp_path: Path) -> None:
    """Not at first, and not after a crash."""
    asked = []

    def still_ours() -> bool:
        asked.append(len(asked))
        return len(asked) == 1

    launcher = LocalLauncher(LaunchConfig(restart_backoff_seconds=0.01), still_ours=still_ours)
    job = launcher.submit(JobSpec(["sh", "-c", "exit 1"], tmp_path / "logs"))
    assert (job.wait(SECONDS), job.state, len(job.attempts)) == (75, JobState.SAVED, 1)
    assert "taken over" in job.reason


def test_run_belongs_to_the_main_thread(tmp_path: Path) -> None:
    caught: list[BaseException] = []

    def run() -> None:
        try:
            LocalLauncher(LaunchConfig()).run(JobSpec(["touch", str(tmp_path / "ran")], tmp_path / "logs"))
        except ValueError as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(caught) == 1
    assert not (tmp_path / "ran").exists()


def test_a_mailbox_wakes_its_sleeper_and_takes_nothing_when_closed() -> None:
    mailbox = Mailbox()
    threading.Thread(target=lambda: mailbox.put("cancel", now=True)).start()
    mailbox.wait(SECONDS)
    assert mailbox.take() == [("cancel", True)]
    assert mailbox.take() == []
    for _ in range(70_000):  # more than a pipe holds
        assert mailbox.put("cancel", now=False)
    assert len(mailbox.take()) == 70_000
    mailbox.close()
    assert not mailbox.put("cancel", now=True)
