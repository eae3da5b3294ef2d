"""A rank's sign of life: one fixed 64-byte record in a file, rewritten in place, never synced.

Layout (little-endian): magic `SOLOHB01`, u64 monotonic nanoseconds, i64 step, u32 section id, u32 pid,
24 bytes of the section's name, u64 with the CRC-32 of the 56 bytes before. The launcher reads the same layout.
"""

from __future__ import annotations

import os
import struct
import time
import zlib

SECTIONS = ("start", "data", "forward_backward", "update", "log", "evaluate", "diagnose", "save", "leave")
"""What a rank can be busy with, in the order of a step."""

EVERY_STEP = ("data", "forward_backward", "update", "log")
"""Those of them that each step has."""

_LAYOUT = struct.Struct("<8sQqII24s")


class Heartbeat:
    """Writes the record to the file that SOLOMONOV_HEARTBEAT names; without a file it does nothing."""

    def __init__(self, path: str | None) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644) if path else None
        self.step = -1

    def beat(self, section: str, step: int | None = None) -> None:
        """Record that this rank enters `section` (one of SECTIONS) of update number `step`. One pwrite, about 2 us."""
        if step is not None:
            self.step = step
        if self._fd is None:
            return
        head = _LAYOUT.pack(
            b"SOLOHB01",
            time.monotonic_ns(),
            self.step,
            SECTIONS.index(section),
            os.getpid(),
            section.encode(),
        )
        try:
            os.pwrite(self._fd, head + struct.pack("<Q", zlib.crc32(head)), 0)
        except OSError:
            return  # a full disk refuses the file's first block: a sign of life must not end the life

    def close(self) -> None:
        """Close the file; the last record stays."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
