"""Port checks against sockets that are really bound."""

from __future__ import annotations

import os
import socket

import pytest

from launcher.errors import LaunchConfigurationError
from launcher.ports import free_port, require_free


def test_a_free_port_can_be_bound() -> None:
    port = free_port()
    require_free(port)
    with socket.socket() as own:
        own.bind(("127.0.0.1", port))


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_someone_listens_on_is_refused_with_its_holder(address: str) -> None:
    with socket.socket() as holder:
        holder.bind((address, 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(LaunchConfigurationError) as caught:
            require_free(port)
    assert caught.value.exit_code == 78
    assert str(port) in caught.value.what
    assert f"held by process {os.getpid()} (" in caught.value.got
    assert "launch.master_port" in caught.value.remedy


def test_a_port_that_is_only_bound_is_refused_too() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        with pytest.raises(LaunchConfigurationError, match="cannot be used"):
            require_free(holder.getsockname()[1])


def test_lingering_connections_of_an_earlier_attempt_do_not_count() -> None:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            accepted, _ = server.accept()
            accepted.close()  # closes first, so its side stays in TIME_WAIT
    require_free(port)
