"""Machines that ask each other for the time, over real sockets of this one."""

from __future__ import annotations

import dataclasses
import socket
import struct
import threading
import time
from types import SimpleNamespace

import pytest

from solomonov import reach
from solomonov.reach import Address, Answer, TimeServer, ask, ask_all


def test_a_machine_is_reached_and_its_clock_is_read() -> None:
    with TimeServer("127.0.0.1") as server:
        answer = ask(server.address)
    assert answer.problem is None
    assert 0.0 < answer.round_trip_seconds < 60.0
    # One clock, so what it seems to differ by is the method's error, half of the round trip at most.
    assert abs(answer.offset_seconds) <= answer.round_trip_seconds / 2 + 1e-4


def test_a_clock_that_is_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = time.time_ns
    ahead = 90 * 10**9
    answering = threading.local()

    def receive(peer: socket.socket, size: int) -> bytes:
        answering.yes = size == reach.KEY_BYTES  # the side that reads a key is the server
        return original(peer, size)

    original = reach._receive
    monkeypatch.setattr(reach, "_receive", receive)
    monkeypatch.setattr(time, "time_ns", lambda: clock() + (ahead if getattr(answering, "yes", False) else 0))
    with TimeServer("127.0.0.1") as server:
        answer = ask(server.address)
    assert abs(answer.offset_seconds - 90.0) <= answer.round_trip_seconds / 2 + 1e-3


def test_the_quickest_answer_counts_from_the_middle_of_its_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of ours, in seconds: asked at 50, the other says 70 after 4 of them, which was 52 here."""
    trips, said = [8.0, 4.0, 6.0, 9.0, 5.0], [99, 70, 99, 40, 99]
    now = iter([moment for trip in trips for moment in (0.0, trip)])
    answers = iter(said)
    monkeypatch.setattr(reach, "time", SimpleNamespace(time_ns=lambda: 50 * 10**9, monotonic=lambda: next(now)))
    monkeypatch.setattr(reach, "_receive", lambda peer, size: struct.pack("<q", next(answers) * 10**9))
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = ask(Address("127.0.0.1", server.getsockname()[1], "00" * reach.KEY_BYTES))
    assert found == Answer(None, 4.0, 18.0)


def test_an_answer_may_come_in_pieces() -> None:
    """Packets keep what was sent together from being read in one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            for piece in (b"ab", b"cdefgh", b"xy"):
                theirs.sendall(piece)
        assert reach._receive(ours, 8) == b"abcdefgh"
        assert reach._receive(ours, 8) == b"xy", "the other side ended"


def test_many_are_asked_at_once() -> None:
    servers = [TimeServer("127.0.0.1") for _ in range(5)]
    try:
        answers = ask_all({number: server.address for number, server in enumerate(servers)})
    finally:
        for server in servers:
            server.__exit__(None, None, None)
    assert sorted(answers) == [0, 1, 2, 3, 4]
    assert all(answer.problem is None for answer in answers.values())


def test_a_machine_that_is_away_for_a_moment_is_asked_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
    begun = threading.Event()
    real = reach.ask

    def late(address: Address) -> Answer:
        """Its port is closed until it was asked once."""
        answer = real(address if begun.is_set() else dataclasses.replace(address, port=port))
        begun.set()
        return answer

    with TimeServer("127.0.0.1") as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(reach, "ask", late)
        patch.setattr(reach, "PAUSE_SECONDS", 0.0)
        assert ask_all({7: server.address})[7].problem is None
        begun.clear()
        found = ask_all({7: server.address}, patience_seconds=0.0)[7].problem
    assert found is not None
    assert "refused" in found


def test_the_name_of_this_machine_may_be_on_the_loopback() -> None:
    """Where there is a way out, others are told the address on that way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((reach.ELSEWHERE, 9))
            expected = probe.getsockname()[0]
        except OSError:
            expected = "127.0.0.1"
    with TimeServer("127.0.0.1") as server:
        assert server.address.host == expected
        assert ask(server.address).problem is None


def test_a_closed_port_is_refused() -> None:
    with TimeServer("127.0.0.1") as server:
        address = server.address
    assert ask(address).problem == f"{address.host}:{address.port}: Connection refused"


def test_a_machine_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "REACH_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert ask(Address("127.0.0.1", port, "00" * reach.KEY_BYTES)).problem == f"127.0.0.1:{port}: no answer"


def test_another_program_on_the_port_is_told_from_ours() -> None:
    with TimeServer("127.0.0.1") as server:
        wrong = dataclasses.replace(server.address, key="00" * reach.KEY_BYTES)
        problem = ask(wrong).problem
    assert problem is not None
    assert problem.startswith(f"{wrong.host}:{wrong.port}"), problem


def test_a_server_says_nothing_to_those_who_do_not_know_its_key() -> None:
    with (
        TimeServer("127.0.0.1") as server,
        socket.create_connection(("127.0.0.1", server.address.port), timeout=10.0) as peer,
    ):
        peer.sendall(struct.pack("16s", b"x"))
        assert peer.recv(64) == b""
