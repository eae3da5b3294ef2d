"""The ranks of an attempt as the workers of a Ray Train run, each of which is the agent of one rank process.

Three kinds of processes:

    supervisor   RayGang: starts the holder, listens for the agents, is the launcher's gang
    holder       `python -m launcher hold`: imports Ray, joins the cluster, holds the workers by Ray Train (placement,
                 start, death of a worker or a node), and tells how many ranks there is room for and who is draining
    agents       one in each worker: start the rank's command on that machine, pass requests on, tell how it fares

Agents speak to the supervisor over TCP, a JSON object a line, after a secret of the attempt. Whoever loses the
connection ends: a rank does not outlive its supervisor, wherever it runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from launcher.agent import NODE_VARIABLE, Orders, beat_of, end_of, obey, of_beat
from launcher.child import Child, ChildCommand, start_child
from launcher.errors import LaunchConfigurationError
from launcher.exits import RankExit, order_of_death
from launcher.gang import LocalGang
from launcher.hang import Beat
from launcher.job import JobSpec
from launcher.mailbox import Mailbox
from launcher.ports import free_port
from launcher.rank_env import RankEnvironment

REPORT_SECONDS = 1.0
"""Between two reports of an agent, and two looks of the holder at the cluster."""
HOLDER_END_SECONDS = 20.0
"""What Ray Train gets to take a gang down whose ranks have ended."""
SILENCE_SECONDS = 30.0
"""An agent that says nothing for so long is lost, with its machine: it reports every second."""


@dataclass(frozen=True)
class RayRoom:
    """What a rank needs of a cluster, and how many of them may be started.

    Raises:
        ValueError: no world size.
    """

    address: str
    """host:port of the head."""
    worlds: Sequence[int]
    """Numbers of ranks that the job may have, ascending; an attempt takes the largest that there is room for."""
    cpus: float = 1.0
    gpus: float = 0.0
    environment: Mapping[str, str] = field(default_factory=dict)
    """What a process needs to join."""
    start_seconds: float = 60.0
    """How long an attempt waits for room for its smallest world, and then for its workers to start."""

    def __post_init__(self) -> None:
        if not self.worlds or list(self.worlds) != sorted(set(self.worlds)) or self.worlds[0] < 1:
            raise ValueError(f"world sizes are positive and ascending, not {list(self.worlds)}")


class RayGang:
    """Ranks under the agents of a Ray Train run; see `launcher.gang.Gang` and `StartGang`.

    Args:
        room: what is asked of the cluster.
        holder: the command that holds the workers, which is given the plan as its last word.
    """

    def __init__(
        self,
        spec: JobSpec,
        folder: Path,
        *,
        attempt: int,
        master_port: int,
        wake_fd: int,
        room: RayRoom,
        holder: Sequence[str] = (sys.executable, "-m", "launcher", "hold"),
    ) -> None:
        self.resize_reason: str | None = None
        """See `Gang.resize_reason`: there is room for more ranks, or a node is about to leave."""
        self._ends: list[RankExit] = []
        self._connections: dict[int, _Connection] = {}
        """By file descriptor."""
        self._ranks: dict[int, _Connection] = {}
        self._beats: dict[int, Beat] = {}
        self._world: int | None = None
        self._living: set[int] = set()
        self._killed = self._stopping = self._started = self._over = False
        self._started_at = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._selector.register(wake_fd, selectors.EVENT_READ)
        self._server = socket.create_server(("", 0), backlog=1024)
        self._server.setblocking(False)
        self._selector.register(self._server, selectors.EVENT_READ)
        self._secret = secrets.token_hex(32)
        plan = {
            "spec": spec.to_json(),
            "folder": str(folder),
            "attempt": attempt,
            "room": {**dataclasses.asdict(dataclasses.replace(room, environment={})), "worlds": list(room.worlds)},
            "port": self._server.getsockname()[1],
        }
        reader, writer = os.pipe()
        environment = {**os.environ, **spec.environment, **room.environment, SECRET: self._secret}
        command = [*holder, json.dumps(plan)]
        try:
            self._holder: Child = start_child(
                ChildCommand(command, environment, folder / "holder.log", spec.working_directory, output_fd=writer)
            )
        except BaseException:
            os.close(reader)
            self._server.close()
            raise
        finally:
            os.close(writer)
        self._output = _Lines(reader)
        self._selector.register(reader, selectors.EVENT_READ)
        self._selector.register(self._holder.exit_fd, selectors.EVENT_READ)

    @property
    def pids(self) -> list[int]:
        """Empty: they are other machines' numbers."""
        return []

    @property
    def world_size(self) -> int | None:
        """Ranks of this attempt; None until the holder has found room."""
        return self._world

    @property
    def alive(self) -> bool:
        """See `Gang.alive`."""
        return not self._over

    def wait(self, timeout: float | None, also: Sequence[int] = ()) -> list[RankExit]:
        """See `Gang.wait`."""
        for fd in also:
            self._selector.register(fd, selectors.EVENT_READ)
        limit = SILENCE_SECONDS if timeout is None else min(timeout, SILENCE_SECONDS)
        ready = self._selector.select(limit)
        for fd in also:
            self._selector.unregister(fd)
        for key, _ in ready:
            if key.fileobj is self._server:
                self._accept()
            elif key.fd == self._output.fd:
                self._hear_holder()
            elif key.fd in self._connections:
                self._hear(self._connections[key.fd])
        now = time.monotonic()
        for connection in list(self._connections.values()):
            # Who has said hello waits for the others without a word.
            waits = connection.rank is not None and not self._started
            if not waits and now - connection.heard > SILENCE_SECONDS:
                self._lost(connection)
        if self._holder.exit_code() is not None and not self._over:
            self._holder_ended()
        ends, self._ends = self._ends, []
        return order_of_death(ends)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            found, _ = self._server.accept()
            found.setblocking(False)
            self._connections[found.fileno()] = _Connection(found)
            self._selector.register(found, selectors.EVENT_READ)

    def _hear(self, connection: _Connection) -> None:
        for message in connection.lines.messages():
            connection.heard = time.monotonic()
            if connection.rank is None:
                self._hello(connection, message)
                continue
            rank = connection.rank
            if message["kind"] == "beat":
                self._beats[rank] = beat_of(message, time.monotonic())
            elif message["kind"] == "ended":
                message.pop("kind")
                self._ended(end_of(message))
        if connection.lines.closed:
            self._lost(connection)

    def _hello(self, connection: _Connection, message: dict[str, Any]) -> None:
        """The first line of an agent; who does not know the secret is not listened to."""
        if not hmac.compare_digest(str(message.get("secret")), self._secret) or self._world is None:
            self._close(connection)
            return
        connection.rank, connection.host, connection.port = message["rank"], message["host"], message["port"]
        connection.pid = message["pid"]
        self._ranks[message["rank"]] = connection
        if len(self._ranks) == self._world:
            self._started = True
            first = self._ranks[0]
            for each in self._ranks.values():
                each.heard = time.monotonic()
                each.say({"kind": "start", "master_addr": first.host, "master_port": first.port})
            if self._stopping:
                self.terminate()

    def _hear_holder(self) -> None:
        for message in self._output.messages():
            if message["kind"] == "world":
                self._world = message["world"]
                self._living = set(range(message["world"]))
            elif message["kind"] == "resize":
                self.resize_reason = message["reason"]

    def _ended(self, end: RankExit) -> None:
        if end.rank in self._living:
            self._living.discard(end.rank)
            self._beats.pop(end.rank, None)
            self._ends.append(end)
        if not self._living:
            self._over = True

    def _lost(self, connection: _Connection) -> None:
        """An agent is gone; with it goes its rank."""
        self._close(connection)
        rank = connection.rank
        if rank is not None and rank in self._living:
            beat = self._beats.get(rank)
            self._ended(
                RankExit(
                    rank,
                    connection.pid,
                    -signal.SIGKILL,
                    killed=self._killed,
                    lost=not self._killed,
                    seconds=time.monotonic() - self._started_at,
                    step=beat.step if beat is not None else None,
                    section=beat.section if beat is not None else None,
                    host=connection.host,
                )
            )

    def _holder_ended(self) -> None:
        """Ray Train has given up, or never got to a world: no rank lives any more."""
        code = self._holder.exit_code()
        for connection in list(self._ranks.values()):
            self._lost(connection)
        if not self._over:
            # A verdict (78) passes through; else it is as if the first rank had crashed.
            self._over = True
            missing = sorted(self._living) or [0]
            self._living.clear()
            shown = code if code else 1
            self._ends += [RankExit(rank, self._holder.pid, shown, killed=self._killed) for rank in missing]

    def _close(self, connection: _Connection) -> None:
        fd = connection.socket.fileno()
        if fd in self._connections:
            self._selector.unregister(connection.socket)
            del self._connections[fd]
        connection.socket.close()

    def beats(self) -> dict[int, Beat]:
        """See `Gang.beats`: as the agents told."""
        return dict(self._beats)

    def terminate(self) -> None:
        """Ask every rank to save and leave."""
        self._stopping = True
        if self._world is None:
            self._holder.kill()  # there is no rank yet that could save
        self._say_all("terminate")

    def dump_stacks(self) -> None:
        """Ask every rank for its stacks."""
        self._say_all("stacks")

    def kill(self) -> None:
        """End every rank at once; Ray ends the workers of a driver that is gone."""
        self._killed = True
        self._say_all("kill")
        self._holder.kill()

    def _say_all(self, kind: str) -> None:
        """An order to all agents; before they have their start there is no rank to obey it."""
        if not self._started:
            return
        for rank in self._living & self._ranks.keys():
            self._ranks[rank].say({"kind": kind})

    def close(self) -> None:
        """End whatever is left."""
        if self._living or self._world is None:
            self.kill()
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._holder.exit_fd, selectors.EVENT_READ)
                selector.select(HOLDER_END_SECONDS)
        finally:
            for connection in list(self._connections.values()):
                self._close(connection)
            self._holder.reap()
            self._selector.close()
            self._server.close()
            os.close(self._output.fd)

    def __enter__(self) -> RayGang:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


SECRET = "SOLOMONOV_GANG_SECRET"
"""Environment variable that tells the holder the secret of the attempt."""


class _Lines(Orders):
    """JSON objects, one a line."""

    def messages(self) -> list[dict[str, Any]]:
        """All whole ones that have come; what is none is dropped."""
        found = []
        for line in self.take():
            with contextlib.suppress(ValueError):
                message = json.loads(line)
                if isinstance(message, dict) and "kind" in message:
                    found.append(message)
        return found


class _Connection:
    """One agent, seen from the supervisor."""

    def __init__(self, found: socket.socket) -> None:
        self.socket = found
        self.lines = _Lines(found.fileno())
        self.rank: int | None = None
        self.host = ""
        self.port = self.pid = 0
        self.heard = time.monotonic()

    def say(self, message: Mapping[str, Any]) -> None:
        """Send a line; who cannot take some bytes is gone or as good as gone, which its silence will tell."""
        with contextlib.suppress(OSError):
            self.socket.send(json.dumps(message).encode() + b"\n")


# --- in a worker of Ray Train ----------------------------------------------------------------------------------------


def run_agent(place: RankEnvironment, plan: Mapping[str, Any], host: str, secret: str, supervisor: str) -> int:
    """Stand beside one rank until it has ended; returns its exit code, -n for signal n.

    Args:
        place: of the rank; where the ranks meet is told by the supervisor.
        plan: what the holder was given.
        host: address of this machine.
        secret: of the attempt.
        supervisor: its host.
    """
    spec = JobSpec.from_json(plan["spec"])
    folder = Path(plan["folder"])
    os.environ[NODE_VARIABLE] = host
    with socket.create_connection((supervisor, plan["port"]), timeout=SILENCE_SECONDS) as connection:
        connection.settimeout(None)

        def say(kind: str, **fields: object) -> None:
            # Reading does not block, and so a write does not either: a report that finds no room is one too many.
            with contextlib.suppress(BlockingIOError):
                connection.send(json.dumps({"kind": kind, **fields}).encode() + b"\n")

        say("hello", secret=secret, rank=place.rank, host=host, port=free_port(), pid=os.getpid())
        orders = _Lines(connection.fileno())
        start, *early = _first(orders)
        place = dataclasses.replace(place, master_addr=start["master_addr"], master_port=start["master_port"])
        attempt, port = plan["attempt"], place.master_port
        mailbox = Mailbox()
        with (
            contextlib.closing(mailbox),
            LocalGang(spec, folder, attempt=attempt, master_port=port, wake_fd=mailbox.fd, places=[place]) as gang,
        ):
            for order in early:
                obey(gang, order["kind"])
            said: Beat | None = None
            while True:
                for end in gang.wait(REPORT_SECONDS, also=[orders.fd]):
                    say("ended", **{**dataclasses.asdict(end), "host": host})
                    return end.code
                for order in orders.messages():
                    obey(gang, order["kind"])
                if orders.closed:
                    return -signal.SIGKILL  # the supervisor is gone; leaving the gang kills the rank
                beat = gang.beats().get(place.rank)
                if beat is None or beat == said:
                    say("alive")
                else:
                    said = beat
                    say("beat", **of_beat(beat))


def _first(orders: _Lines) -> list[dict[str, Any]]:
    """The first order, which comes when all agents are there, and those that came with it."""
    with selectors.DefaultSelector() as selector:
        selector.register(orders.fd, selectors.EVENT_READ)
        while True:
            selector.select()
            if found := orders.messages():
                return found
            if orders.closed:
                raise ConnectionError("the supervisor is gone, or does not know the secret")


def no_room(room: RayRoom, found: int) -> LaunchConfigurationError:
    """The refusal of a cluster that cannot hold the smallest world."""
    return LaunchConfigurationError(
        "the Ray cluster has no room for the run",
        got=f"room for {found} ranks of {room.cpus:g} CPUs and {room.gpus:g} GPUs within {room.start_seconds:g} s",
        rule=f"room for at least {room.worlds[0]}",
        remedy="add nodes, wait for other work to end, or lower launch.nodes or launch.ranks_per_node",
    )
