"""A gang on Ray without Ray: its agents against a supervisor's end of their connection, and the supervisor's side
against real agents, which a holder of ours has started on this machine.

The whole on a real Ray is in tests/e2e/test_job_contract.py and tests/e2e/test_ray_jobs.py.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from launcher.agent import end_of
from launcher.config import LaunchConfig
from launcher.job import JobSpec
from launcher.local import LocalJob, LocalLauncher
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
