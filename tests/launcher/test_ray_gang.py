"""The agent of a rank on Ray, as a real process, against a supervisor's end of its connection; and what a run asks for.

The gang on a real Ray is in tests/e2e/test_job_contract.py and tests/e2e/test_ray_jobs.py.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launcher.agent import end_of
from launcher.job import JobSpec
from launcher.ray_gang import RayRoom, no_room
from tests.support.processes import Program, assert_no_process, program_environment

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
