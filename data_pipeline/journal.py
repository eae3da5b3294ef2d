"""journal.jsonl: one line for every event in a run's life. Append-only, several writers, each line one write.

`schema_version` stands in every line, so that a line can be read alone.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1


class Journal:
    """Appends events to a run's journal and reads them back.

    A line is appended by a single write in append mode under a lock, so lines of the supervisor and of rank 0 do not
    mix. A line that a crash cut short is closed off by the next writer and skipped by readers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: str, **fields: Any) -> None:
        """Append one event with the wall-clock time and this process's id, durably.

        Raises:
            OSError: the file cannot be written (a full disk, say); callers on the training path use `try_write`.
        """
        record = {"schema_version": SCHEMA_VERSION, "time": round(time.time(), 3), "event": event}
        line = json.dumps({**record, "pid": os.getpid(), **fields}, ensure_ascii=False).encode() + b"\n"
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            # The lock keeps the look at the last byte from meeting another writer's line half-way: a line that crosses
            # a page grows in two steps. It is held for some microseconds and ends with its holder.
            fcntl.flock(fd, fcntl.LOCK_EX)
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                line = b"\n" + line
            written = os.write(fd, line)
            fcntl.flock(fd, fcntl.LOCK_UN)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            os.fsync(fd)
        finally:
            os.close(fd)

    def try_write(self, event: str, **fields: Any) -> bool:
        """Like `write`, but a disk that is full or gone does not end the training step; returns whether it worked."""
        try:
            self.write(event, **fields)
        except OSError:
            return False
        return True

    def events(self, *kinds: str) -> Iterator[dict[str, Any]]:
        """All events in order, or those of the named kinds; a line that a crash cut short is skipped."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict) and (not kinds or record.get("event") in kinds):
                    yield record

    def last(self, *kinds: str) -> dict[str, Any] | None:
        """The newest event of the named kinds, if any."""
        found = None
        for record in self.events(*kinds):
            found = record
        return found

    def resumes(self) -> list[tuple[int, int]]:
        """(attempt, step it went on from) of every attempt that began to train: what fences old checkpoints off."""
        return [(int(event["attempt"]), int(event["step"])) for event in self.events("resumed")]

    def next_attempt(self) -> int:
        """Number of the attempt that would start now: one more than the highest in the journal, from 1."""
        return 1 + max((int(e["attempt"]) for e in self.events("attempt_started")), default=0)
