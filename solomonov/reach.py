"""Whether machines reach each other over TCP, how long that takes, and what their clocks say.

Each machine listens on a port of its own; each asks all the others for the time. Clock offsets are those of Cristian's
algorithm (Distributed Computing 3, 1989): what the other says, less the middle of asking and hearing; right to within
half of the round trip.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

REACH_SECONDS = 5.0
"""Within which a machine of the same job answers; a filtered port never does."""
PATIENCE_SECONDS = 20.0
"""For which those that did not answer are asked again: no run ends because a network was away for a moment."""
PAUSE_SECONDS = 1.0
ASKED_TIMES = 5
"""The quickest answer counts: the others waited for a busy processor."""
THREADS = 16
KEY_BYTES = 16
ELSEWHERE = "192.0.2.1"
"""An address that is nobody's (RFC 5737)."""
_TIME = struct.Struct("<q")


@dataclass(frozen=True)
class Address:
    """Where a machine listens."""

    host: str
    port: int
    key: str
    """Hexadecimal; the question that it answers."""


@dataclass(frozen=True)
class Answer:
    """What asking one machine gave."""

    problem: str | None
    """Why it could not be reached; None: it was."""
    round_trip_seconds: float = 0.0
    offset_seconds: float = 0.0
    """How far its clock is ahead of ours."""


class TimeServer:
    """Answers those who know its key with this machine's time; a context manager.

    Args:
        towards: address of a machine of the job: we listen where we would call it from.
    """

    def __init__(self, towards: str) -> None:
        key = secrets.token_bytes(KEY_BYTES)
        self._key = key
        self._socket = socket.create_server(("", 0), family=_family(towards), backlog=1024)
        self.address = Address(_own_address(towards), self._socket.getsockname()[1], key.hex())
        self._thread = threading.Thread(target=self._serve, name="preflight time", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            while True:
                try:
                    peer, _ = self._socket.accept()
                except OSError:  # closed
                    return
                pool.submit(self._answer, peer)

    def _answer(self, peer: socket.socket) -> None:
        with peer, contextlib.suppress(OSError):
            peer.settimeout(REACH_SECONDS)
            while _receive(peer, KEY_BYTES) == self._key:
                peer.sendall(_TIME.pack(time.time_ns()))

    def __enter__(self) -> TimeServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        self._socket.close()
        self._thread.join()


def ask_all(addresses: Mapping[int, Address], patience_seconds: float = PATIENCE_SECONDS) -> dict[int, Answer]:
    """Ask machines for their time, many at once, and those that do not answer again for a while."""
    end = time.monotonic() + patience_seconds
    answers: dict[int, Answer] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        while silent := [node for node in addresses if node not in answers or answers[node].problem is not None]:
            answers |= zip(silent, pool.map(ask, (addresses[node] for node in silent)), strict=True)
            if all(answers[node].problem is None for node in silent) or time.monotonic() > end:
                break
            time.sleep(PAUSE_SECONDS)
    return {node: answers[node] for node in addresses}


def ask(address: Address) -> Answer:
    """Ask one machine for its time."""
    found: list[tuple[float, float]] = []
    try:
        with socket.create_connection((address.host, address.port), REACH_SECONDS) as peer:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(ASKED_TIMES):
                asked, started = time.time_ns(), time.monotonic()
                peer.sendall(bytes.fromhex(address.key))
                said = _receive(peer, _TIME.size)
                trip = time.monotonic() - started
                if len(said) < _TIME.size:
                    return Answer(f"{address.host}:{address.port} is answered by something else")
                found.append((trip, (_TIME.unpack(said)[0] - asked) / 1e9 - trip / 2))
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else os.strerror(error.errno or 0)
        return Answer(f"{address.host}:{address.port}: {reason}")
    return Answer(None, *min(found))


def _receive(peer: socket.socket, size: int) -> bytes:
    """So many bytes; fewer where the other side ended."""
    data = b""
    while len(data) < size and (more := peer.recv(size - len(data))):
        data += more
    return data


def _family(towards: str) -> socket.AddressFamily:
    return socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0][0]


def _own_address(towards: str) -> str:
    """This machine's address on the way to another; nothing is sent."""
    family, _, _, _, target = socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM)[0]
    found = _address_towards(family, target)
    if family == socket.AF_INET and ipaddress.ip_address(found).is_loopback:
        # The machine's own name, which many systems have on the loopback: what others see is where packets leave.
        with contextlib.suppress(OSError):  # no way out: all are on this machine
            found = _address_towards(family, (ELSEWHERE, 9))
    return found


def _address_towards(family: socket.AddressFamily, target: tuple[object, ...]) -> str:
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])
