"""A real Ray of several nodes on this machine, each node at a loopback address of its own.

    with RayCluster(cpus=(2, 2)) as ray:
        Program([...], env=program_environment(**ray.environment, ...))    # joins at ray.address
        ray.kill_node(0)

The nodes belong to a process of their own (`python -m tests.support.ray_cluster`), which dies with this one and
takes them along: the process of the test is never a driver, and nothing of Ray's global state stays in it. Whoever
joins does so at the head, which has no CPUs. Linux only, as 127.0.0.2 is nobody's address elsewhere.

Ray's own settings stand: it takes 14 s to know that a node is lost.

What it costs on two cores: a head and two nodes start in 7 s and end in 0.1 s; they hold 510 MiB (USS, 14
processes), one more node 1 s and 100 MiB, each worker about 60 MiB. A program joins in 1 s, its first task takes 1 s.
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from launcher.ports import free_port
from tests.support.processes import Program, processes_with, program_environment

START_SECONDS = 120.0
END_SECONDS = 30.0
OBJECT_STORE_BYTES = 100 << 20
PR_SET_CHILD_SUBREAPER = 36


class RayCluster:
    """A head without CPUs and one node for each entry of `cpus`; used in a `with` statement.

    Args:
        cpus: CPUs of each node.
        first_host: address of the head; the nodes have those that follow. Two clusters that live at the same time
            need addresses of their own.
        dashboard: the head serves it, and takes jobs.
    """

    def __init__(
        self, cpus: Sequence[float] = (2, 2), *, first_host: str = "127.0.0.2", dashboard: bool = False
    ) -> None:
        self._dashboard = dashboard
        self._cpus, self._hosts = tuple(cpus), [first_host]
        self._raylets: dict[int, int] = {}
        # Ray's sockets lie below it: 43 characters at most.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        token = self.folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.environment = {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "86400",
        }
        """What a program that joins needs in its environment."""
        self.address = ""
        """host:port of the head."""

    def __enter__(self) -> RayCluster:
        ours, theirs = socket.socketpair()
        # There, not in /tmp/ray, it is noted which cluster was started last, for those who look for any.
        (self.folder / "ray").mkdir()
        env = program_environment(**self.environment, RAY_TMPDIR=str(self.folder))
        with theirs:
            self._process = Program(
                [sys.executable, "-m", "tests.support.ray_cluster", str(theirs.fileno()), self.folder],
                log=self.folder / "log",
                env=env,
                pass_fds=[theirs.fileno()],
            )
        self._socket, self._replies = ours, ours.makefile("r")
        try:
            self.address = self._ask("head", self._hosts[0], self._dashboard)
            for each in self._cpus:
                self.add_node(each)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def hosts(self) -> list[str]:
        """Address of each node, in the order in which they were started; the head's is not among them."""
        return self._hosts[1:]

    def add_node(self, cpus: float) -> int:
        """Starts one more node; returns its index, the next one after all that there were."""
        host = str(ipaddress.ip_address(self._hosts[-1]) + 1)
        index = len(self._hosts) - 1
        self._raylets[index] = self._ask("add", host, cpus)
        self._hosts.append(host)
        return index

    def kill_node(self, index: int) -> None:
        """Ends all processes of a node by SIGKILL, as if its machine was lost; returns when they are gone."""
        self._ask("kill", index)
        del self._raylets[index]

    def drain_node(self, index: int) -> None:
        """Tells the cluster that a node is about to be preempted, as an autoscaler does."""
        self._ask("drain", index)

    def processes(self, index: int) -> list[psutil.Process]:
        """The processes of a node that lives: its raylet, then what that started, workers among it."""
        raylet = psutil.Process(self._raylets[index])
        return [raylet, *raylet.children(recursive=True)]

    def working(self, function: str, index: int | None = None) -> list[psutil.Process]:
        """The processes, of one node or of all that live, that run the task or the actor of this name now."""
        found = []
        for each in self._raylets if index is None else [index]:
            found += [process for process in self.processes(each) if _title(process) == f"ray::{function}"]
        return found

    def close(self) -> None:
        """Ends all processes and removes the folder; fails where a process outlives it."""
        left = psutil.Process(self._process.pid).children(recursive=True) if self._process.running else []
        try:
            if self._process.running:
                self._ask("close")
                self._process.wait(deadline=END_SECONDS)
            alive = [process for process in left if _runs(process)] + processes_with(str(self.folder))
            assert not alive, f"of the Ray in {self.folder} there are left: {alive}"
        finally:
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self._process.kill()
            self._replies.close()
            self._socket.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _ask(self, *words: Any) -> Any:
        """Has the other process do something; returns its answer."""
        self._socket.settimeout(START_SECONDS)
        try:
            self._socket.sendall(json.dumps(words).encode() + b"\n")
            reply = self._replies.readline()
        except OSError as error:
            raise AssertionError(f"Ray: no answer to {words}: {error}\n{self._process.output()}") from None
        assert reply, f"Ray: ended at {words}\n{self._process.output()}"
        return json.loads(reply)


def _runs(process: psutil.Process) -> bool:
    """It is there, and more than what is left of one that nobody has waited for."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.NoSuchProcess:
        return ""


# --- the process that owns the nodes -----------------------------------------------------------------------


class _Owner:
    """Starts and ends nodes as it is asked to. Orphans of the nodes become its children: it sees them all."""

    def __init__(self, folder: str) -> None:
        import ctypes

        from ray.cluster_utils import Cluster

        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._cluster = Cluster()
        self._raylets: list[int] = []
        self._ids: list[str] = []
        self._common = {"include_dashboard": False, "temp_dir": folder, "object_store_memory": OBJECT_STORE_BYTES}

    def head(self, host: str, dashboard: bool) -> str:
        settings = dict(self._common)
        if dashboard:
            # Ports of their own: two clusters on one machine would share the defaults.
            ports = {name: free_port() for name in ("dashboard_port", "dashboard_agent_listen_port")}
            settings |= {"include_dashboard": True, "dashboard_host": host, **ports}
        self._cluster.add_node(num_cpus=0, node_ip_address=host, **settings)
        return str(self._cluster.address)

    def add(self, host: str, cpus: float) -> int:
        node = self._cluster.add_node(num_cpus=cpus, node_ip_address=host, **self._common)
        [raylet] = node.all_processes["raylet"]
        self._raylets.append(raylet.process.pid)
        self._ids.append(node.node_id)
        return self._raylets[-1]

    def drain(self, index: int) -> None:
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = int((time.time() + 3600) * 1000)
        client = GcsClient(address=self._cluster.address)
        accepted, why = client.drain_node(self._ids[index], reason, "the test's", deadline_ms)
        assert accepted, why

    def kill(self, index: int) -> None:
        end([psutil.Process(self._raylets[index])])

    def close(self) -> None:
        end(psutil.Process().children())


def end(roots: list[psutil.Process]) -> None:
    """Ends processes and all below them by SIGKILL, and reaps them: each is a child of ours, or becomes one."""
    doomed: list[psutil.Process] = []
    waiting = list(roots)
    while waiting:
        # Stopped first: what holds still starts nothing more.
        process = waiting.pop()
        with suppress(psutil.NoSuchProcess):
            doomed.append(process)
            process.suspend()
            waiting += process.children()
    for process in doomed:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    # Parents before children: a child is ours to wait for once its parent is gone.
    for process in doomed:
        with suppress(ChildProcessError):
            os.waitpid(process.pid, 0)


def own(descriptor: int, folder: str) -> None:
    """Does what the test asks for, line by line, until it asks to close or is gone."""
    with socket.socket(fileno=descriptor) as asked, asked.makefile("rw") as lines:
        owner = _Owner(folder)
        for line in lines:
            name, *arguments = json.loads(line)
            answer = getattr(owner, name)(*arguments)
            print(json.dumps(answer), file=lines, flush=True)
            if name == "close":
                # Ray's own farewell would look for the nodes.
                os._exit(0)
    end(psutil.Process().children())
    os._exit(1)


if __name__ == "__main__":
    own(int(sys.argv[1]), sys.argv[2])
