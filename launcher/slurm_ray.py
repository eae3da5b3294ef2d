"""A private Ray over the nodes of a Slurm allocation: its head beside the supervisor, a node of it on each other."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from launcher.child import Child, ChildCommand, start_child
from launcher.errors import LaunchConfigurationError
from launcher.job import tail
from launcher.ray import HOST, PrivateRay
from launcher.slurm_commands import node_names
from launcher.slurm_step import Allocation

START_SECONDS = 120.0
"""What the nodes get to join; importing Ray from a shared file system takes a good part of it."""
END_SECONDS = 30.0
OBJECT_STORE_BYTES = 256 << 20
"""A node's, for what its data workers hand over: replies of a few MiB, a few in flight."""


def host_address(others: Sequence[str]) -> str | None:
    """The address that Slurm's name for this machine stands for, where that of each of the others is on the loopback
    too; else None: Ray looks by itself for the one by which others reach it.

    Many a machine has its own name, and only that, on the loopback (127.0.1.1).
    """
    found = [_address(name) for name in (os.environ.get("SLURMD_NODENAME") or socket.gethostname(), *others)]
    on_loopback = all(address is not None and ipaddress.ip_address(address).is_loopback for address in found)
    return found[0] if on_loopback else None


def _address(name: str) -> str | None:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return None


class SlurmRay:
    """A private Ray (see `launcher.ray.PrivateRay`) with a node on each machine of an allocation; a context manager.

    Args:
        allocation: the job that this process runs in, on its first node.
        cpus: what the workers of each node may reserve together.
        log: gets what the nodes say.
    """

    def __init__(self, allocation: Allocation, cpus: int, log: Path) -> None:
        self._allocation, self._cpus, self._log = allocation, cpus, log
        self._stack = ExitStack()
        self.address = ""
        self.environment: dict[str, str] = {}
        """For processes that join, on any of the machines."""

    def __enter__(self) -> SlurmRay:
        """Start it.

        Raises:
            LaunchConfigurationError: the head, or a node, does not come up.
        """
        with ExitStack() as stack:
            several = self._allocation.nodes > 1
            host = host_address(node_names(self._allocation.node_list)) if several else HOST
            ray = stack.enter_context(PrivateRay(self._cpus, OBJECT_STORE_BYTES, host=host))
            if several:
                self._add_nodes(stack, ray)
            self.address, self.environment = ray.address, ray.environment
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _add_nodes(self, stack: ExitStack, ray: PrivateRay) -> None:
        others = self._allocation.nodes - 1
        token = Path(ray.environment["RAY_AUTH_TOKEN_PATH"])
        words = [ray.address, str(token.parent), str(self._cpus), str(OBJECT_STORE_BYTES)]
        options = ["--overlap", f"--nodes={others}", f"--ntasks={others}", "--ntasks-per-node=1", "--mpi=none"]
        options += ["--kill-on-bad-exit=0", "--wait=0", f"--exclude={os.environ['SLURMD_NODENAME']}"]
        command = ["srun", *options, sys.executable, "-m", "launcher", "ray-node", *words]
        output, writer = os.pipe()
        reader, orders = os.pipe()  # srun gives its stdin to every task
        stack.callback(os.close, output)
        orders_file = stack.enter_context(os.fdopen(orders, "wb", buffering=0))
        try:
            srun = start_child(ChildCommand(command, dict(os.environ), self._log, output_fd=writer, input_fd=reader))
        finally:
            os.close(writer)
            os.close(reader)
        stack.callback(_end, srun, orders_file)
        with contextlib.suppress(BrokenPipeError):  # srun has ended, which its output will tell
            orders_file.write(token.read_bytes() + b"\n")
        self._wait_until_ready(output, others)

    def _wait_until_ready(self, output: int, others: int) -> None:
        deadline, said = time.monotonic() + START_SECONDS, b""
        while said.split().count(b"ready") < others:
            left = deadline - time.monotonic()
            data = b""
            if left > 0 and select.select([output], [], [], left)[0]:
                data = os.read(output, 65536)
            if not data:
                came = said.split().count(b"ready")
                raise LaunchConfigurationError(
                    "the private Ray of this job does not get its nodes",
                    got="\n".join([f"{came} of {others} came within {START_SECONDS:g} s", *tail(self._log)]),
                    rule="Ray starts on each node of the allocation, and reaches its head on the first one",
                    remedy=f"see {self._log}, or set data.workers.backend: inline (the same rows)",
                )
            said += data


def _end(srun: Child, orders: BinaryIO) -> None:
    """The nodes leave at the end of their stdin."""
    orders.close()
    if not select.select([srun.exit_fd], [], [], END_SECONDS)[0]:
        srun.send_signal(signal.SIGTERM)
        select.select([srun.exit_fd], [], [], END_SECONDS)
    srun.reap()
