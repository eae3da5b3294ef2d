"""Reads the record in which a rank says that it lives.

A rank rewrites one fixed record of 64 bytes with a single `pwrite` at offset 0, without fsync. All numbers
are little-endian, without padding; the exact struct format is `<8sQqII24sQ`:

    offset  size  field
         0     8  magic, b"SOLOHB01"
         8     8  u64  CLOCK_MONOTONIC in nanoseconds (one clock for all processes of a machine)
        16     8  i64  step
        24     4  u32  section id
        28     4  u32  pid
        32    24  section name, UTF-8, zero padded
        56     8  u64  zlib.crc32 of the 56 bytes before
"""

from __future__ import annotations

import struct
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

FORMAT = "<8sQqII24sQ"
RECORD_BYTES = struct.calcsize(FORMAT)
MAGIC = b"SOLOHB01"
VARIABLE = "SOLOMONOV_HEARTBEAT"
"""Environment variable that names the file to a rank."""


@dataclass(frozen=True)
class Heartbeat:
    """The last that a rank said about itself."""

    monotonic_ns: int
    step: int
    section_id: int
    pid: int
    section: str

    def age_seconds(self) -> float:
        """Seconds since it was written, by the clock that both processes share."""
        return max(0.0, (time.monotonic_ns() - self.monotonic_ns) / 1e9)


def decode(record: bytes) -> Heartbeat | None:
    """The heartbeat in a record; None if it is torn, foreign or of the wrong length."""
    if len(record) != RECORD_BYTES:
        return None
    magic, monotonic_ns, step, section_id, pid, name, checksum = struct.unpack(FORMAT, record)
    if magic != MAGIC or checksum != zlib.crc32(record[: RECORD_BYTES - 8]):
        return None
    return Heartbeat(monotonic_ns, step, section_id, pid, name.rstrip(b"\0").decode("utf-8", errors="replace"))


def read_heartbeat(path: Path) -> Heartbeat | None:
    """The heartbeat in a file; None if there is none (yet) or it cannot be read."""
    try:
        with path.open("rb") as file:
            return decode(file.read(RECORD_BYTES + 1))
    except OSError:
        return None
