"""The TCP port at which the ranks of an attempt meet."""

from __future__ import annotations

import socket

import psutil

from launcher.errors import LaunchConfigurationError


def free_port() -> int:
    """A TCP port that is free on every address now (the rendezvous store listens on all of them).

    Another process may take it before rank 0 does; that attempt then crashes, and the next has another port.
    """
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def require_free(port: int) -> None:
    """Check that a port that the user chose can be bound.

    Raises:
        LaunchConfigurationError: it is taken (by whom, where the system says so) or not ours to bind.
    """
    with socket.socket() as probe:
        # As the rendezvous store does: connections of an earlier attempt that only linger do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise LaunchConfigurationError(
                f"port {port}, at which the ranks should meet, cannot be used",
                got=f"{error.strerror}; {_holder(port)}",
                rule="launch.master_port is a free TCP port of this machine",
                remedy="end the process that holds it, name another port, or set launch.master_port: null",
            ) from error


def _holder(port: int) -> str:
    """Who listens on a port, in words."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except (psutil.Error, OSError):
        return "this system does not tell who holds it"
    for connection in connections:
        if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
            if connection.pid is None:
                return "held by a process of another user"
            try:
                return f"held by process {connection.pid} ({psutil.Process(connection.pid).name()})"
            except psutil.Error:
                return f"held by process {connection.pid}"
    return "no listening process is known for it"
