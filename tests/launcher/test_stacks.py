"""Stacks against real dumps, and real ranks that hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from launcher.config import LaunchConfig
from launcher.hang import HangLimits
from launcher.job import JobSpec
from launcher.local import LocalJob, LocalLauncher
from launcher.stacks import culprit, innermost_call
from tests.support.processes import assert_no_process, wait_for

SECONDS = 60.0

# --- where it was --------------------------------------------------------------------------------------------

# Threads that wait, some of them started last; the main thread sits in a function of its own and is asked by a signal.
DUMPED = """
import faulthandler, signal, sys, threading, time
faulthandler.register(signal.SIGQUIT, all_threads=True)
def waits_elsewhere():
    time.sleep(600)
for _ in range(3):
    threading.Thread(target=waits_elsewhere, daemon=True).start()
def sits_here():
    print("ready", flush=True)
    time.sleep(600)
def calls_it():
    sits_here()
calls_it()
"""


def test_the_innermost_call_is_that_of_the_main_thread(tmp_path: Path) -> None:
    script = tmp_path / 'a folder in "quotes"' / "a file in here.py"
    script.parent.mkdir()
    script.write_text(DUMPED)
    log = tmp_path / "log"
    with log.open("wb") as output, subprocess.Popen([sys.executable, script], stdout=output, stderr=output) as child:
        try:
            wait_for(lambda: "ready" in log.read_text(), deadline=SECONDS, what="it sits")
            child.send_signal(signal.SIGQUIT)
            wait_for(lambda: log.read_text().endswith("in <module>\n"), deadline=SECONDS, what="a whole dump")
        finally:
            child.kill()
    dump = log.read_text()
    line = DUMPED.splitlines().index('    print("ready", flush=True)') + 2
    assert dump.count("waits_elsewhere") == 3
    assert innermost_call(dump) == f"sits_here ({script}:{line})"
    assert innermost_call(f"as it printed before\n{dump}and after\n") == f"sits_here ({script}:{line})"


def test_the_newest_dump_counts() -> None:
    dump = 'Current thread 0x1 (most recent call first):\n  File "/x.py", line 3 in {}\n'
    assert innermost_call(dump.format("before") + dump.format("after")) == "after (/x.py:3)"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no dump\n",
        "Current thread 0x1 (most recent call first):",
        "Current thread 0x1 (most recent call first):\n  <no Python frame>\n",
        'Current thread 0x1 (most recent call first):\n  File "/x.py", line ',
        'Current thread 0x1 (most recent call first):\n  File "/x.py", line 3',
    ],
)
def test_without_a_whole_dump_there_is_no_call(text: str) -> None:
    assert innermost_call(text) is None


REDUCES = "all_reduce (/env/torch/distributed/distributed_c10d.py:3252)"
WORKS = "backward (/env/torch/autograd/graph.py:979)"


@pytest.mark.parametrize(
    ("calls", "rank"),
    [
        ({3: WORKS}, 3),
        ({3: None}, 3),
        ({3: REDUCES, 0: WORKS, 1: REDUCES}, 0),
        ({3: REDUCES, 0: REDUCES, 1: None}, 1),  # frozen: it gave no stack
        ({3: REDUCES, 0: REDUCES}, 3),
        ({3: WORKS, 0: None}, 3),
        ({3: None, 0: WORKS}, 3),
    ],
)
def test_whoever_is_in_no_collective_is_waited_for(calls: dict[int, str | None], rank: int) -> None:
    assert culprit(calls) == rank


# --- real ranks ----------------------------------------------------------------------------------------------

# Some steps, then rank 1 stops at step 5 in its own way, while rank 0 waits for it one section further on.
RANK = """
import faulthandler, os, re, signal, struct, sys, threading, time, zlib
from pathlib import Path
faulthandler.register(signal.SIGQUIT, all_threads=True)
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
folder, how = Path(sys.argv[1]), sys.argv[2]
rank, attempt = int(os.environ["RANK"]), int(os.environ["SOLOMONOV_ATTEMPT"])
file = os.open(os.environ["SOLOMONOV_HEARTBEAT"], os.O_RDWR | os.O_CREAT)

def beat(step, number, name):
    body = struct.pack("<8sQqII24s", b"SOLOHB01", time.monotonic_ns(), step, number, os.getpid(), name)
    os.pwrite(file, body + struct.pack("<Q", zlib.crc32(body)), 0)

def sleeps_for_ever():
    (folder / "there").touch()
    time.sleep(600)

def holds_the_lock_of_the_interpreter():
    (folder / "there").touch()
    re.compile("(a+)+b").match("a" * 99)

def is_stopped_by_another():
    (folder / "there").touch()
    while True:
        time.sleep(0.01)

def waits_for_its_peer():
    while not (folder / "never").exists():
        time.sleep(0.01)

def stands_beside_a_collective():
    time.sleep(1.0)  # the one that waits has got there first
    (folder / "there").touch()
    time.sleep(600)

for step in range(5):
    beat(step, 1, b"data")
    beat(step, 2, b"forward")
    if how == "is_slow":
        time.sleep(0.4)
if attempt > 1 or how == "is_slow":
    sys.exit(0)
if rank == 0 and how == "stands_beside_a_collective":
    beat(5, 1, b"data")
    code = "import time\\ndef all_reduce(): time.sleep(600)"
    exec(compile(code, "/env/torch/distributed/distributed_c10d.py", "exec"))
    all_reduce()
if rank == 0:
    beat(5, 2, b"forward")
    waits_for_its_peer()
beat(5, 1, b"data")
globals()[how]()
"""


@dataclass
class Watched:
    """A job of two ranks under a watch."""

    folder: Path
    how: str
    limit_seconds: float
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    job: LocalJob = field(init=False)

    def __post_init__(self) -> None:
        (self.folder / "rank.py").write_text(RANK)
        limits = HangLimits(minimum_seconds=self.limit_seconds, start_seconds=self.limit_seconds)
        command = [sys.executable, str(self.folder / "rank.py"), str(self.folder), self.how]
        spec = JobSpec(command, self.folder / "logs", ranks=2, hang=limits)
        config = LaunchConfig(restart_backoff_seconds=0.0)
        self.job = LocalLauncher(config, on_event=self.note).submit(spec)

    def note(self, kind: str, /, **fields: object) -> None:
        self.events.append((kind, fields))

    def found(self, kind: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.events if name == kind]

    def there(self) -> int:
        """Wait until rank 1 has got to where it stops; its process id."""
        wait_for((self.folder / "there").exists, deadline=SECONDS, what=f"rank 1 {self.how}")
        return self.job.attempts[0].pids[1]

    def logs(self) -> list[str]:
        """What the ranks of the first attempt wrote."""
        return [path.read_text() for path in self.job.attempts[0].logs]


HANGS = (
    *("sleeps_for_ever", "is_stopped_by_another", "holds_the_lock_of_the_interpreter"),
    "stands_beside_a_collective",
)


@pytest.fixture(scope="module")
def hung(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Watched]]:
    """Jobs that hang, all at once, at their ends."""
    jobs = {how: Watched(tmp_path_factory.mktemp(how), how, limit_seconds=4.0) for how in HANGS}
    try:
        os.kill(jobs["is_stopped_by_another"].there(), signal.SIGSTOP)
        for watched in jobs.values():
            watched.job.wait(SECONDS)
        yield jobs
    finally:
        for watched in jobs.values():
            watched.job.cancel(now=True)
            with suppress(TimeoutError):
                watched.job.wait(SECONDS)


@pytest.mark.parametrize("how", HANGS)
def test_a_rank_that_hangs_is_found_and_the_job_goes_on(hung: dict[str, Watched], how: str) -> None:
    watched = hung[how]
    assert (watched.job.exit_code, len(watched.job.attempts)) == (0, 2)
    assert [kind for kind, _ in watched.events] == [
        *("attempt_started", "hang", "rank_exited", "rank_exited", "restart"),
        *("attempt_started", "rank_exited", "rank_exited", "finished"),
    ]
    hang = watched.found("hang")[0]
    assert {name: hang[name] for name in ("attempt", "rank", "step", "section", "limit_seconds")} == {
        "attempt": 1,
        "rank": 1,
        "step": 5,
        "section": "data",
        "limit_seconds": 4.0,
    }
    assert hang["seconds"] > 4.0
    assert watched.found("restart")[0]["cause"].startswith("rank 1 did not move for ")
    first = watched.job.attempts[0]
    assert {(end.rank, end.code, end.killed) for end in first.exits} == {(0, -9, True), (1, -9, True)}
    assert first.cause is not None
    assert first.cause.rank == 1, "not the one that waited for it"
    assert_no_process(str(watched.folder))


@pytest.mark.parametrize("how", ["sleeps_for_ever", "holds_the_lock_of_the_interpreter"])
def test_both_ranks_tell_where_they_were(hung: dict[str, Watched], how: str) -> None:
    for log, function in zip(hung[how].logs(), ("waits_for_its_peer", how), strict=True):
        assert log.count("Current thread") == 1
        assert f"in {function}\n" in log
    line = RANK.splitlines().index(f"def {how}():") + 3
    assert hung[how].found("hang")[0]["call"] == f"{how} ({hung[how].folder / 'rank.py'}:{line})"


def test_the_call_is_that_of_the_rank_that_the_others_wait_for(hung: dict[str, Watched]) -> None:
    call = hung["stands_beside_a_collective"].found("hang")[0]["call"]
    assert call is not None
    assert call.startswith("stands_beside_a_collective (")


def test_a_rank_that_is_stopped_tells_nothing_and_its_peer_does(hung: dict[str, Watched]) -> None:
    watched = hung["is_stopped_by_another"]
    waiting, stopped = watched.logs()
    assert "in waits_for_its_peer\n" in waiting
    assert stopped == ""
    assert watched.found("hang")[0]["call"] is None


def test_a_slow_gang_raises_no_alarm(tmp_path: Path) -> None:
    watched = Watched(tmp_path, "is_slow", limit_seconds=30.0)
    assert watched.job.wait(SECONDS) == 0
    assert [kind for kind, _ in watched.events] == ["attempt_started", "rank_exited", "rank_exited", "finished"]
    assert watched.logs() == ["", ""], "nobody asked for stacks"
