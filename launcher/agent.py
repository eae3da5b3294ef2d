"""Stands beside one rank on its machine, for a supervisor that is elsewhere: `python -m launcher agent ...`.

It starts the rank's command as a child, passes signals on, obeys orders that come as lines on its stdin (ORDERS), and
says on its stdout, in lines that begin with PREFIX, what the supervisor would see if the rank were a child of its own:
that it runs, its signs of life, and how it ended. It leaves with the rank's exit code. At the end of its stdin the
supervisor is gone: then the rank is ended.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

from launcher.exits import RankExit, shell_code
from launcher.gang import LocalGang
from launcher.hang import Beat
from launcher.job import JobSpec
from launcher.mailbox import Mailbox
from launcher.rank_env import RankEnvironment

PREFIX = "\x1esolomonov "
"""Begins each line of ours, so that what others print there is not taken for one."""
REPORT_SECONDS = 1.0
"""Between two reports of a sign of life."""
NODE_VARIABLE = "SOLOMONOV_NODE"
"""Environment variable that tells the rank what its machine is called."""
ORDERS = ("terminate", "stacks", "kill")
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


def main(arguments: list[str]) -> int:
    """`FOLDER ATTEMPT COMMAND ...`: run the command as the rank that the torchrun variables say, to its end."""
    folder, attempt, *command = arguments
    mailbox = Mailbox()
    signal.signal(signal.SIGQUIT, lambda number, frame: None)  # meant for the rank, which gets it as well
    for number in FORWARDED:
        signal.signal(number, _put_into(mailbox))
    place = RankEnvironment.from_environment()
    spec = JobSpec(command, Path(folder))
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    os.environ[NODE_VARIABLE] = host
    orders = Orders(sys.stdin.fileno())
    with LocalGang(
        spec, Path(folder), attempt=int(attempt), master_port=place.master_port, wake_fd=mailbox.fd, places=[place]
    ) as gang:
        _report("started", rank=place.rank, host=host, pid=gang.pids[0])
        end, said = None, None
        while end is None:
            for order in orders.take():
                obey(gang, order)
            if orders.closed:
                gang.kill()
            for end in gang.wait(REPORT_SECONDS, also=[] if orders.closed else [orders.fd]):
                _report("ended", **{**dataclasses.asdict(end), "host": host})
            if mailbox.take():
                gang.terminate()
            beat = gang.beats().get(place.rank)
            if beat is not None and beat != said:
                said = beat
                _report("beat", rank=place.rank, **of_beat(beat))
    return shell_code(end.code)


class Orders:
    """Lines from a descriptor, which is made not to block."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.closed = False
        """The other end is gone."""
        self._rest = b""
        os.set_blocking(fd, False)

    def take(self) -> list[str]:
        """All whole lines that have come since the last look."""
        while not self.closed:
            try:
                data = os.read(self.fd, 65536)
            except BlockingIOError:
                break
            except OSError:
                data = b""  # a connection that was reset
            self.closed = not data
            self._rest += data
        *lines, self._rest = self._rest.split(b"\n")
        return [line.decode("utf-8", errors="replace") for line in lines]


def obey(gang: LocalGang, order: str) -> None:
    """Do what one of ORDERS says; others are of a later release, or none of ours."""
    if order == "terminate":
        gang.terminate()
    elif order == "stacks":
        gang.dump_stacks()
    elif order == "kill":
        gang.kill()


def read_report(line: bytes) -> tuple[str, dict[str, object]] | None:
    """The kind and the fields of a report; None if the line is none."""
    prefix = PREFIX.encode()
    if not line.startswith(prefix):
        return None
    try:
        record = json.loads(line.removeprefix(prefix))
        return str(record.pop("kind")), record
    except (ValueError, KeyError, AttributeError, TypeError):
        return None  # torn, as its machine went down, or nothing of ours


def end_of(fields: Mapping[str, object]) -> RankExit:
    """The end that an `ended` report tells."""
    return RankExit(**fields)  # type: ignore[arg-type]


def beat_of(fields: Mapping[str, object], now: float) -> Beat:
    """The sign of life that a `beat` report tells, by the clock of the reader."""
    age, step, section_id = fields["age_seconds"], fields["step"], fields["section_id"]
    assert isinstance(age, float), "seconds"
    assert isinstance(step, int), "an update's number"
    assert isinstance(section_id, int), "its place in a step"
    return Beat(step, section_id, str(fields["section"]), now - age)


def of_beat(beat: Beat) -> dict[str, object]:
    """A sign of life, for `beat_of` on another machine."""
    age = max(0.0, time.monotonic() - beat.since)
    return {"step": beat.step, "section_id": beat.section_id, "section": beat.section, "age_seconds": age}


def _report(kind: str, **fields: object) -> None:
    """One line in one write. Nobody reads any more: the supervisor is gone, so the rank shall not go on."""
    os.write(sys.stdout.fileno(), f"{PREFIX}{json.dumps({'kind': kind, **fields})}\n".encode())


def _put_into(mailbox: Mailbox) -> Callable[[int, FrameType | None], None]:
    def handle(number: int, frame: FrameType | None) -> None:
        mailbox.put(signal.Signals(number).name, now=False)

    return handle
