"""The agent as a real process beside a rank: what it says, what it passes on, and that the rank does not outlive it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from launcher.agent import PREFIX, beat_of, end_of, read_report
from launcher.exits import RankExit
from launcher.hang import Beat
from tests.support.processes import Program, assert_no_process, program_environment

SECONDS = 60.0
PLACE = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29501",
    "SLURMD_NODENAME": "node2",
}
READY = "echo ready; while :; do sleep 0.02; done"

# Two signs of life, then a death without a word. Requests to save are noted, and nothing more.
BEATS = """
import os, signal, struct, sys, time, zlib
from pathlib import Path
asked = []
def note(number, frame):
    asked.append(number)
    Path(sys.argv[1], f"asked-{len(asked)}").touch()
signal.signal(signal.SIGTERM, note)
def beat(step, number, name):
    body = struct.pack("<8sQqII24s", b"SOLOHB01", time.monotonic_ns() - 5 * 10**9, step, number, os.getpid(), name)
    Path(os.environ["SOLOMONOV_HEARTBEAT"]).write_bytes(body + struct.pack("<Q", zlib.crc32(body)))
for step, name in ((1, b"data"), (2, b"forward")):
    beat(step, step, name)
    while not Path(sys.argv[1], f"seen-{step}").exists():
        time.sleep(0.01)
os.kill(os.getpid(), 9)
"""


class Agent(Program):
    """An agent with its rank; its reports."""

    def __init__(self, folder: Path, *command: str, attempt: int = 2, **environment: str) -> None:
        self.folder = folder
        agent = [sys.executable, "-m", "launcher", "agent", str(folder), str(attempt), *command]
        super().__init__(
            agent, log=folder / "agent.log", env=program_environment(**PLACE, **environment), stdin=subprocess.PIPE
        )

    def order(self, *orders: str) -> None:
        """Say it on the agent's stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write("".join(f"{order}\n" for order in orders).encode())
        self.process.stdin.flush()

    def __enter__(self) -> Agent:
        return self

    @property
    def rank_log(self) -> str:
        path = self.folder / "rank-3.log"
        return path.read_text() if path.exists() else ""

    def reports(self, kind: str) -> list[dict[str, Any]]:
        """What it has said so far, as the supervisor reads it."""
        found = map(read_report, self.log.read_bytes().split(b"\n"))
        return [report[1] for report in found if report is not None and report[0] == kind]

    def ready(self) -> int:
        """Wait until the rank is; its process id."""
        self.wait_for(lambda: "ready" in self.rank_log, deadline=SECONDS, what="the rank is ready")
        self.wait_for(lambda: self.reports("started"), deadline=SECONDS, what="it says so")
        return int(self.reports("started")[0]["pid"])


def test_a_rank_is_started_at_its_place_and_its_code_is_passed_on(tmp_path: Path) -> None:
    script = 'echo "$RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $GROUP_RANK $MASTER_ADDR:$MASTER_PORT"'
    script += ' "$SOLOMONOV_ATTEMPT" "$1"; echo "$SOLOMONOV_HEARTBEAT"; exit 75'
    with Agent(tmp_path, "sh", "-c", script, "sh", "a  'b' $c") as agent:
        assert agent.wait(deadline=SECONDS) == 75
        (started,), (ended,) = agent.reports("started"), agent.reports("ended")
    assert agent.rank_log == f"3/4 1/2 1 node1:29501 2 a  'b' $c\n{tmp_path}/heartbeat-3\n"
    assert {name: started[name] for name in ("rank", "host")} == {"rank": 3, "host": "node2"}
    end = end_of(ended)
    assert end == RankExit(3, started["pid"], 75, host="node2", seconds=end.seconds)
    assert agent.output().count("\n") == 2, "nothing else is printed there"


@pytest.mark.parametrize(("script", "code", "told"), [("exit 0", 0, 0), ("exit 9", 9, 9), ("kill -9 $$", 137, -9)])
def test_every_end_is_told_and_passed_on(script: str, code: int, told: int, tmp_path: Path) -> None:
    with Agent(tmp_path, "sh", "-c", script) as agent:
        assert agent.wait(deadline=SECONDS) == code
    (end,) = map(end_of, agent.reports("ended"))
    assert (end.code, end.killed) == (told, False)


def test_signs_of_life_are_told_once_each_and_with_their_age(tmp_path: Path) -> None:
    with Agent(tmp_path, sys.executable, "-c", BEATS, str(tmp_path)) as agent:
        for step in (1, 2):
            agent.wait_for(lambda step=step: len(agent.reports("beat")) >= step, deadline=SECONDS, what="a beat")
            for number in (2 * step - 1, 2 * step):  # the second one tells that a whole round is over
                agent.send(signal.SIGUSR1)
                asked = tmp_path / f"asked-{number}"
                agent.wait_for(asked.exists, deadline=SECONDS, what="it goes round")
            (tmp_path / f"seen-{step}").touch()
        assert agent.wait(deadline=SECONDS) == 137
        reports = agent.reports("beat")
    assert [(report["rank"], report["step"], report["section"]) for report in reports] == [
        (3, 1, "data"),
        (3, 2, "forward"),
    ]
    now = time.monotonic()
    beats = [beat_of(report, now) for report in reports]
    assert [(beat.step, beat.section_id, beat.section) for beat in beats] == [(1, 1, "data"), (2, 2, "forward")]
    assert all(beat.since == now - report["age_seconds"] for beat, report in zip(beats, reports, strict=True))
    assert all(report["age_seconds"] >= 5.0 for report in reports), "how long before the report it was"
    (end,) = map(end_of, agent.reports("ended"))
    assert (end.step, end.section) == (2, "forward")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"])
def test_every_request_reaches_the_rank_as_one_to_save(name: str, tmp_path: Path) -> None:
    script = f'trap "echo saved; exit 75" TERM; {READY}'
    with Agent(tmp_path, "sh", "-c", script) as agent:
        agent.ready()
        agent.send(signal.Signals[name])
        assert agent.wait(deadline=SECONDS) == 75
    assert agent.rank_log == "ready\nsaved\n"


def test_the_agent_lives_on_where_stacks_are_asked_for(tmp_path: Path) -> None:
    script = f'trap "echo saved; exit 75" TERM; {READY}'
    with Agent(tmp_path, "sh", "-c", script) as agent:
        agent.ready()
        agent.send(signal.SIGQUIT)
        agent.send(signal.SIGTERM)
        assert agent.wait(deadline=SECONDS) == 75


def test_a_rank_does_not_outlive_its_agent(tmp_path: Path) -> None:
    with Agent(tmp_path, "sh", "-c", f'trap "" TERM INT; {READY}', f"token-{tmp_path}") as agent:
        agent.ready()
        os.kill(agent.pid, signal.SIGKILL)
        assert agent.wait(deadline=SECONDS) == -signal.SIGKILL
        assert_no_process(f"token-{tmp_path}")


def test_a_rank_does_not_outlive_the_reader_of_its_reports(tmp_path: Path) -> None:
    """srun is gone, and with it the supervisor: the next sign of life cannot be told. Its stdin stays open, or the rank
    would be ended for that before."""
    token = f"token-{tmp_path}"
    wait = BEATS.replace("os.kill(os.getpid(), 9)", "time.sleep(600)")
    command = [sys.executable, "-m", "launcher", "agent", str(tmp_path), "1", sys.executable, "-c", wait]
    reader, writer = os.pipe()
    with (
        (tmp_path / "errors").open("wb") as errors,
        subprocess.Popen(
            [*command, str(tmp_path), token],
            stdin=subprocess.PIPE,
            stdout=writer,
            stderr=errors,
            env=program_environment(**PLACE),
        ) as agent,
    ):
        try:
            os.close(writer)
            assert b"started" in os.read(reader, 4096)
            os.close(reader)
            for step in (1, 2):
                (tmp_path / f"seen-{step}").touch()
            assert agent.wait(timeout=SECONDS) != 0
        finally:
            agent.kill()
    assert b"BrokenPipeError" in (tmp_path / "errors").read_bytes()
    assert_no_process(token)


def test_an_agent_without_its_place_says_what_is_missing(tmp_path: Path) -> None:
    environment = program_environment(**{name: value for name, value in PLACE.items() if name != "RANK"})
    environment.pop("RANK", None)
    command = [sys.executable, "-m", "launcher", "agent", str(tmp_path), "1", "true"]
    with Program(command, log=tmp_path / "log", env=environment) as agent:
        assert agent.wait(deadline=SECONDS) == 78
        assert "the environment variable RANK is not set" in agent.output()


# --- lines ---------------------------------------------------------------------------------------------------


def line(**fields: object) -> bytes:
    return f"{PREFIX}{json.dumps(fields)}".encode()


@pytest.fixture
def reported() -> bytes:
    return line(kind="beat", rank=1, step=2, section_id=3, section="vorwärts", age_seconds=0.5)


def test_a_whole_line_is_read(reported: bytes) -> None:
    assert read_report(reported) == (
        "beat",
        {"rank": 1, "step": 2, "section_id": 3, "section": "vorwärts", "age_seconds": 0.5},
    )
    assert beat_of({"step": 2, "section_id": 3, "section": "x", "age_seconds": 0.5}, 10.0) == Beat(2, 3, "x", 9.5)


def test_a_line_that_was_cut_anywhere_is_ignored(reported: bytes) -> None:
    for end in range(len(reported)):
        assert read_report(reported[:end]) is None


@given(st.binary(max_size=40), st.booleans())
@example(b"[1]", True)
@example(b'"text"', True)
@example(b"7", True)
@example(b"{}", True)
@example(b"\xff", True)
@example(b'{"kind": "ended"}', False)
def test_what_others_print_is_no_report(text: bytes, with_prefix: bool) -> None:
    assert read_report(PREFIX.encode() * with_prefix + text) is None


@given(
    st.builds(
        RankExit,
        rank=st.integers(0, 10**6),
        pid=st.integers(0, 2**31),
        code=st.integers(-64, 255),
        killed=st.booleans(),
        seconds=st.floats(0, 1e9),
        step=st.none() | st.integers(-1, 2**62),
        section=st.none() | st.text(),
        heartbeat_age_seconds=st.none() | st.floats(0, 1e9),
        host=st.none() | st.text(),
    )
)
def test_an_end_is_read_as_it_was_told(end: RankExit) -> None:
    report = read_report(line(kind="ended", **asdict(end)))
    assert report is not None
    assert end_of(report[1]) == end


def test_orders_are_obeyed_and_strange_ones_are_not(tmp_path: Path) -> None:
    script = f"trap 'echo asked' TERM; trap 'echo stacks' QUIT; {READY}"
    with Agent(tmp_path, "sh", "-c", script) as agent:
        agent.ready()
        agent.order("dance", "terminate")
        agent.wait_for(lambda: "asked" in agent.rank_log, deadline=SECONDS, what="the rank was asked")
        agent.order("stacks")
        agent.wait_for(lambda: "stacks" in agent.rank_log, deadline=SECONDS, what="the rank was asked for its stacks")
        agent.order("kill")
        assert agent.wait(deadline=SECONDS) == 137
        [end] = agent.reports("ended")
        assert (end["code"], end["killed"]) == (-signal.SIGKILL, True)


def test_a_rank_does_not_outlive_the_one_who_gives_the_orders(tmp_path: Path) -> None:
    with Agent(tmp_path, "sh", "-c", READY) as agent:
        agent.ready()
        assert agent.process.stdin is not None
        agent.process.stdin.close()
        assert agent.wait(deadline=SECONDS) == 137
    assert_no_process(str(tmp_path))
