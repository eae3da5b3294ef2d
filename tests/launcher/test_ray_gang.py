"""A gang on Ray without Ray: its agents against a supervisor's end of their connection, and the supervisor's side
against real agents, which a holder of ours has started on this machine.

The whole on a real Ray is in tests/e2e/test_job_contract.py and tests/e2e/test_ray_jobs.py.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from launcher.agent import end_of, of_beat
from launcher.config import LaunchConfig
from launcher.exits import RankExit
from launcher.hang import Beat
from launcher.heartbeat import FORMAT, MAGIC
from launcher.job import JobSpec, heartbeat_path
from launcher.local import LocalJob, LocalLauncher
from launcher.mailbox import Mailbox
from launcher.ray_gang import RayGang, RayRoom, no_room
from tests.support.processes import Program, assert_no_process, program_environment, wait_for

SECONDS = 60.0
READY = "echo ready; while :; do sleep 0.02; done"
AGENT = """
import json, sys
from launcher.rank_env import RankEnvironment
from launcher.ray_gang import run_agent

place = RankEnvironment(1, 2, 0, 1, 1, "", 0)
sys.exit(run_agent(place, json.loads(sys.argv[1]), "node-b", "secret", "127.0.0.1") % 256)
"""


class Supervisor:
    """The supervisor's end: hears reports and gives orders."""

    def __init__(self, folder: Path, script: str) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.settimeout(SECONDS)
        spec = JobSpec(["sh", "-c", script, "sh", str(folder)], folder, environment={"EXTRA": "x"})
        plan = {"spec": spec.to_json(), "folder": str(folder), "attempt": 4, "port": self.server.getsockname()[1]}
        command = [sys.executable, "-c", AGENT, json.dumps(plan)]
        self.agent = Program(command, log=folder / "agent.log", env=program_environment())
        self.log = folder / "rank-1.log"

    def accept(self) -> dict[str, Any]:
        """The first report."""
        self.connection, _ = self.server.accept()
        self.connection.settimeout(SECONDS)
        self.lines = self.connection.makefile("r")
        return self.hear("hello")

    def hear(self, kind: str) -> dict[str, Any]:
        """The next report of a kind."""
        for line in self.lines:
            message: dict[str, Any] = json.loads(line)
            if message.pop("kind") == kind:
                return message
        raise AssertionError(f"no {kind}: {self.agent.output()}")

    def say(self, kind: str, **fields: object) -> None:
        self.connection.sendall(json.dumps({"kind": kind, **fields}).encode() + b"\n")

    def start(self) -> None:
        self.say("start", master_addr="node-a", master_port=1234)

    def ready(self) -> None:
        self.agent.wait_for(
            lambda: self.log.exists() and "ready" in self.log.read_text(), deadline=SECONDS, what="the rank is ready"
        )


@contextmanager
def supervised(folder: Path, script: str) -> Iterator[Supervisor]:
    supervisor = Supervisor(folder, script)
    with supervisor.server, supervisor.agent:
        yield supervisor
    assert_no_process(str(folder))


def test_a_rank_is_started_when_all_are_there_and_its_end_is_told(tmp_path: Path) -> None:
    script = 'echo "$RANK $WORLD_SIZE $GROUP_RANK $MASTER_ADDR $MASTER_PORT $SOLOMONOV_ATTEMPT $EXTRA"; exit 7'
    with supervised(tmp_path, script) as supervisor:
        hello = supervisor.accept()
        assert {name: hello[name] for name in ("secret", "rank", "host")} == {
            "secret": "secret",
            "rank": 1,
            "host": "node-b",
        }
        assert not supervisor.log.exists(), "it waits for the others"
        supervisor.start()
        end = end_of(supervisor.hear("ended"))
        assert (end.rank, end.code, end.host, end.killed) == (1, 7, "node-b", False)
        assert supervisor.agent.wait(deadline=SECONDS) == 7
    assert supervisor.log.read_text() == "1 2 1 node-a 1234 4 x\n"


def test_orders_reach_the_rank(tmp_path: Path) -> None:
    script = f"trap 'echo asked' TERM; trap 'echo stacks' QUIT; {READY}"
    with supervised(tmp_path, script) as supervisor:
        supervisor.accept()
        supervisor.start()
        supervisor.ready()
        for order, answer in (("terminate", "asked"), ("dance", "ready"), ("stacks", "stacks")):
            supervisor.say(order)
            supervisor.agent.wait_for(
                lambda answer=answer: answer in supervisor.log.read_text(), deadline=SECONDS, what=order
            )  # type: ignore[misc]
        supervisor.hear("alive")
        supervisor.say("kill")
        end = end_of(supervisor.hear("ended"))
        assert (end.code, end.killed) == (-signal.SIGKILL, True)


def test_an_order_that_comes_with_the_start_is_obeyed(tmp_path: Path) -> None:
    with supervised(tmp_path, READY) as supervisor:
        supervisor.accept()
        orders = [{"kind": "start", "master_addr": "node-a", "master_port": 1234}, {"kind": "kill"}]
        supervisor.connection.sendall("".join(f"{json.dumps(order)}\n" for order in orders).encode())
        end = end_of(supervisor.hear("ended"))
        assert (end.code, end.killed) == (-signal.SIGKILL, True)


def test_signs_of_life_reach_the_supervisor(tmp_path: Path) -> None:
    """The rank's record, written here in its place."""
    with supervised(tmp_path, READY) as supervisor:
        supervisor.accept()
        supervisor.start()
        supervisor.ready()
        record = struct.pack(FORMAT[:-1], MAGIC, time.monotonic_ns(), 7, 3, 1, b"forward")
        heartbeat_path(tmp_path, 1).write_bytes(record + struct.pack("<Q", zlib.crc32(record)))
        beat = supervisor.hear("beat")
        assert (beat["step"], beat["section_id"], beat["section"]) == (7, 3, "forward")
        assert beat["age_seconds"] >= 0.0
        supervisor.say("kill")
        assert end_of(supervisor.hear("ended")).step == 7


def test_a_rank_does_not_outlive_its_supervisor(tmp_path: Path) -> None:
    with supervised(tmp_path, READY) as supervisor:
        supervisor.accept()
        supervisor.start()
        supervisor.ready()
        supervisor.lines.close()
        supervisor.connection.close()
        assert supervisor.agent.wait(deadline=SECONDS) != 0


def test_an_agent_that_is_sent_away_starts_nothing(tmp_path: Path) -> None:
    """As one is that does not know the secret of the attempt."""
    with supervised(tmp_path, READY) as supervisor:
        supervisor.accept()
        supervisor.lines.close()
        supervisor.connection.close()
        assert supervisor.agent.wait(deadline=SECONDS) != 0
        assert "does not know the secret" in supervisor.agent.output()
    assert not supervisor.log.exists()


@pytest.mark.parametrize("worlds", [[], [0], [2, 1], [1, 1]])
def test_world_sizes_ascend(worlds: list[int]) -> None:
    with pytest.raises(ValueError, match="positive and ascending"):
        RayRoom("host:1", worlds)


def test_a_cluster_without_room_is_refused_with_the_way_out() -> None:
    error = no_room(RayRoom("host:1", [4, 8], cpus=2.0, gpus=1.0), 3)
    assert error.got == "room for 3 ranks of 2 CPUs and 1 GPUs within 60 s"
    assert error.rule == "room for at least 4"
    assert "launch.nodes" in error.remedy


# --- the supervisor's side ---------------------------------------------------------------------------------------

HOLDER = """
import json, os, subprocess, sys

plan, mode = json.loads(sys.argv[2]), sys.argv[1]
if mode == "full":
    sys.exit(78)
tell = lambda **message: os.write(1, json.dumps(message).encode() + b"\\n")
tell(kind="world", world=2)
secret = "wrong" if mode == "stranger" else os.environ["SOLOMONOV_GANG_SECRET"]
agent = '''
import json, sys
from launcher.rank_env import RankEnvironment
from launcher.ray_gang import run_agent
rank = int(sys.argv[2])
run_agent(RankEnvironment(rank, 2, 0, 1, rank, "", 0), json.loads(sys.argv[1]), "127.0.0.1", sys.argv[3], "127.0.0.1")
'''
agents = [subprocess.Popen([sys.executable, "-c", agent, sys.argv[2], str(rank), secret]) for rank in range(2)]
if mode == "leaving":
    tell(kind="resize", reason="a node is about to leave")
for each in agents:
    each.wait()
"""


def job(folder: Path, script: str, mode: str = "", **options: object) -> LocalJob:
    """A job of two ranks under such a holder."""
    (folder / "holder.py").write_text(HOLDER, encoding="utf-8")
    room = RayRoom("127.0.0.1:1", [2], environment=program_environment())
    start = partial(RayGang, room=room, holder=(sys.executable, str(folder / "holder.py"), mode))
    config = LaunchConfig.model_validate({"restart_backoff_seconds": 0.0, "grace_seconds": 30.0, **options})
    spec = JobSpec(["sh", "-c", script, "sh", str(folder)], folder / "logs", nodes=2)
    return LocalLauncher(config, start_gang=start).submit(spec)


def wait_ready(folder: Path) -> None:
    wait_for(lambda: len(list(folder.glob("ready-*"))) == 2, deadline=SECONDS, what="both ranks are ready")


TRAP = f"trap 'exit 75' TERM; : > \"$1/ready-$RANK\"; {READY}"


def test_a_gang_meets_and_ends(tmp_path: Path) -> None:
    found = job(tmp_path, 'echo "$RANK $WORLD_SIZE $MASTER_ADDR"')
    assert found.wait(SECONDS) == 0
    assert [path.read_text() for path in found.logs()] == ["0 2 127.0.0.1\n", "1 2 127.0.0.1\n"]
    assert {end.host for end in found.attempts[0].exits} == {"127.0.0.1"}
    assert_no_process(str(tmp_path))


def test_a_gang_saves_or_ends_at_once(tmp_path: Path) -> None:
    found = job(tmp_path, TRAP)
    wait_ready(tmp_path)
    found.cancel()
    assert found.wait(SECONDS) == 75
    for path in tmp_path.glob("ready-*"):
        path.unlink()
    found = job(tmp_path, TRAP)
    wait_ready(tmp_path)
    found.cancel(now=True)
    assert found.wait(SECONDS) == 130
    assert_no_process(str(tmp_path))


def test_a_node_that_leaves_is_left_after_a_save(tmp_path: Path) -> None:
    """The next attempt begins at once; here its holder says the same again, so somebody has to end it."""
    found = job(tmp_path, TRAP, "leaving")
    wait_for(lambda: len(found.attempts) >= 2, deadline=SECONDS, what="it has been started again")
    found.cancel(now=True)
    assert found.wait(SECONDS) == 130
    # Asked before they could set their traps, they die of it: that is no crash either.
    assert {end.code for end in found.attempts[0].exits} <= {75, -signal.SIGTERM}


def test_a_lost_agent_is_a_killed_rank_and_a_full_cluster_a_verdict(tmp_path: Path) -> None:
    found = job(tmp_path, "[ $RANK = 1 ] && kill -9 $PPID; exec sleep 600", max_restarts=0)
    assert found.wait(SECONDS) == 137
    cause = found.attempts[0].cause
    assert cause is not None
    assert (cause.rank, cause.host, cause.killed) == (1, "127.0.0.1", False)
    found = job(tmp_path, "exit 0", "full")
    assert found.wait(SECONDS) == 78


def test_who_does_not_know_the_secret_is_not_listened_to(tmp_path: Path) -> None:
    found = job(tmp_path, ": > $1/ran", "stranger", max_restarts=0)
    assert found.wait(SECONDS) != 0
    assert not (tmp_path / "ran").exists()


# --- the supervisor's side, word by word -----------------------------------------------------------------------------

QUIET_HOLDER = r"""
import json, os, signal, sys
from pathlib import Path

world, code, plan = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
found = Path(plan["folder"], "found")
found.write_text(json.dumps({"port": plan["port"], "secret": os.environ["SOLOMONOV_GANG_SECRET"]}))
found.rename(found.with_name("plan"))
if world:
    os.write(1, json.dumps({"kind": "world", "world": world}).encode() + b"\n")
if code:
    sys.exit(int(code))
signal.pause()
"""


class Agent:
    """An agent's end of the connection, after its hello."""

    def __init__(self, folder: Path, rank: int) -> None:
        plan = json.loads((folder / "plan").read_text())
        self.connection = socket.create_connection(("127.0.0.1", plan["port"]), timeout=SECONDS)
        self.lines = self.connection.makefile("r")
        place = {"rank": rank, "host": f"node{rank}", "port": 1000 + rank, "pid": 100 + rank}
        self.connection.sendall(b"no line of ours\n[]\n")
        self.say("hello", secret=plan["secret"], **place)

    def say(self, kind: str, **fields: object) -> None:
        self.connection.sendall(json.dumps({"kind": kind, **fields}).encode() + b"\n")

    def hear(self) -> dict[str, Any]:
        """The next order."""
        message: dict[str, Any] = json.loads(self.lines.readline())
        return message

    def close(self) -> None:
        self.lines.close()
        self.connection.close()


class Watched:
    """A gang of two under a holder that starts no agents, and all that it has told."""

    def __init__(self, folder: Path, gang: RayGang) -> None:
        self.folder, self.gang = folder, gang
        self.ends: list[RankExit] = []
        self.agents: list[Agent] = []

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Let the gang work until something is so."""

        def look() -> bool:
            self.ends += self.gang.wait(0.02)
            return condition()

        wait_for(look, deadline=SECONDS, what=what)

    def join(self, rank: int) -> Agent:
        """An agent that has been heard."""
        self.until(lambda: self.gang.world_size == 2, "there is room")
        agent = Agent(self.folder, rank)
        self.agents.append(agent)
        self.until(lambda: rank in self.gang._ranks, f"rank {rank} is there")
        return agent

    def all_silent(self) -> None:
        """As if nobody had said anything for an hour."""
        for each in self.gang._connections.values():
            each.heard -= 3600.0
        self.ends += self.gang.wait(0.0)


@contextmanager
def watched(folder: Path, *, world: int = 2, code: str = "") -> Iterator[Watched]:
    """`code`: what the holder ends with, at once."""
    spec = JobSpec(["true"], folder, nodes=2)
    room = RayRoom("host:1", [2], environment=program_environment())
    holder = (sys.executable, "-c", QUIET_HOLDER, str(world), code)
    mailbox = Mailbox()
    with (
        contextlib.closing(mailbox),
        RayGang(spec, folder, attempt=1, master_port=1, wake_fd=mailbox.fd, room=room, holder=holder) as gang,
    ):
        found = Watched(folder, gang)
        try:
            yield found
        finally:
            gang.kill()  # the holder does not end with its agents
            for agent in found.agents:
                agent.close()
    assert_no_process(str(folder))


START = {"kind": "start", "master_addr": "node0", "master_port": 1000}


@pytest.mark.parametrize("ranks", [(0, 1), (1, 0)])
def test_ranks_start_together_and_meet_at_the_first(ranks: tuple[int, int], tmp_path: Path) -> None:
    with watched(tmp_path) as found:
        agents = [found.join(rank) for rank in ranks]
        found.gang.dump_stacks()
        for agent in agents:
            assert [agent.hear(), agent.hear()] == [START, {"kind": "stacks"}], "one start, when all are there"


def test_ranks_that_come_after_a_request_to_leave_are_asked_as_well(tmp_path: Path) -> None:
    with watched(tmp_path) as found:
        found.until(lambda: found.gang.world_size == 2, "there is room")
        found.gang.terminate()
        for agent in [found.join(rank) for rank in (0, 1)]:
            assert [agent.hear(), agent.hear()] == [START, {"kind": "terminate"}]


def test_an_order_waits_for_the_start(tmp_path: Path) -> None:
    """The first thing that an agent hears is where the ranks meet: it takes anything else for that."""
    with watched(tmp_path) as found:
        first = found.join(0)
        found.gang.terminate()
        found.gang.dump_stacks()
        second = found.join(1)
        for agent in (first, second):
            assert [agent.hear(), agent.hear()] == [START, {"kind": "terminate"}]


def test_a_request_to_leave_ends_a_gang_that_waits_for_room(tmp_path: Path) -> None:
    with watched(tmp_path, world=0) as found:
        found.until(lambda: (tmp_path / "plan").exists(), "the holder is there")
        found.gang.terminate()
        found.until(lambda: not found.gang.alive, "it is over")
        assert [(end.rank, end.code, end.killed) for end in found.ends] == [(0, -signal.SIGKILL, False)]


def test_a_holder_that_ends_ends_all_ranks(tmp_path: Path) -> None:
    with watched(tmp_path, code="78") as found:
        found.until(lambda: not found.gang.alive, "it is over")
        assert [(end.rank, end.code) for end in found.ends] == [(0, 78), (1, 78)]


def test_who_falls_silent_is_lost_but_not_who_waits_for_the_others(tmp_path: Path) -> None:
    with watched(tmp_path) as found:
        first = found.join(0)
        found.all_silent()
        assert (found.ends, found.gang.alive) == ([], True)
        assert [agent.hear() for agent in (found.join(1), first)] == [START, START]
        found.all_silent()
        assert [(end.rank, end.code, end.killed) for end in found.ends] == [
            (0, -signal.SIGKILL, False),
            (1, -signal.SIGKILL, False),
        ]
        assert not found.gang.alive


def test_a_lost_rank_is_told_with_the_last_that_was_heard_of_it(tmp_path: Path) -> None:
    with watched(tmp_path) as found:
        agents = [found.join(rank) for rank in (0, 1)]
        agents[1].say("beat", **of_beat(Beat(7, 3, "forward", time.monotonic())))
        found.until(lambda: bool(found.gang.beats()), "a sign of life")
        (beat,) = found.gang.beats().values()
        assert (beat.step, beat.section_id, beat.section) == (7, 3, "forward")
        agents[1].close()
        found.until(lambda: bool(found.ends), "it is lost")
        (end,) = found.ends
        told = (end.rank, end.pid, end.code, end.killed, end.step, end.section, end.host)
        assert told == (1, 101, -signal.SIGKILL, False, 7, "forward", "node1")
        assert found.gang.beats() == {}, "those of living ranks"
        found.gang.kill()
        assert [agents[0].hear(), agents[0].hear()] == [START, {"kind": "kill"}]
        agents[0].close()
        found.until(lambda: not found.gang.alive, "it is over")
        assert [(end.rank, end.killed) for end in found.ends[1:]] == [(0, True)], "by us"


def test_what_joins_the_cluster_is_in_no_command_line(tmp_path: Path) -> None:
    """The room's environment may hold a token, and others see the words of a process."""
    with watched(tmp_path) as found:
        found.until(lambda: found.gang.world_size == 2, "there is room")
        words = Path(f"/proc/{found.gang._holder.pid}/cmdline").read_bytes().decode().split("\0")
        assert json.loads(words[-2])["room"]["environment"] == {}
