"""Stands beside one rank on its machine, for a supervisor that is elsewhere: `python -m launcher agent ...`.

It starts the rank's command as a child, passes signals on, and says on its stdout, in lines that begin with PREFIX,
what the supervisor would see if the rank were a child of its own: that it runs, its signs of life, and how it ended. It
leaves with the rank's exit code.
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
    with LocalGang(
        spec, Path(folder), attempt=int(attempt), master_port=place.master_port, wake_fd=mailbox.fd, places=[place]
    ) as gang:
        _report("started", rank=place.rank, host=host, pid=gang.pids[0], step_id=os.environ.get("SLURM_STEP_ID"))
        end, said = None, None
        while end is None:
            for end in gang.wait(REPORT_SECONDS):
                _report("ended", **{**dataclasses.asdict(end), "host": host})
            if mailbox.take():
                gang.terminate()
            beat = gang.beats().get(place.rank)
            if beat is not None and beat != said:
                said = beat
                _report("beat", rank=place.rank, **_of_beat(beat))
    return shell_code(end.code)


def read_report(line: bytes) -> tuple[str, dict[str, object]] | None:
    """The kind and the fields of a report; None if the line is none."""
    prefix = PREFIX.encode()
    if not line.startswith(prefix):
        return None
    try:
        record = json.loads(line.removeprefix(prefix))
        return str(record.pop("kind")), record
    except (ValueError, KeyError, AttributeError):
        return None  # torn, as its machine went down


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


def _of_beat(beat: Beat) -> dict[str, object]:
    age = max(0.0, time.monotonic() - beat.since)
    return {"step": beat.step, "section_id": beat.section_id, "section": beat.section, "age_seconds": age}


def _report(kind: str, **fields: object) -> None:
    """One line in one write. Nobody reads any more: the supervisor is gone, so the rank shall not go on."""
    os.write(sys.stdout.fileno(), f"{PREFIX}{json.dumps({'kind': kind, **fields})}\n".encode())


def _put_into(mailbox: Mailbox) -> Callable[[int, FrameType | None], None]:
    def handle(number: int, frame: FrameType | None) -> None:
        mailbox.put(signal.Signals(number).name, now=False)

    return handle
