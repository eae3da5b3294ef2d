"""metrics.jsonl: one line a step, each step exactly once; and the check of what is replayed after a resume."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

LOSS_BOUND = {"fp32": 1e-5, "bf16": 5e-3, "bf16_autocast": 5e-3}
"""Largest relative difference of loss and gradient norm between two layouts, by precision."""


class MetricsLog:
    """Appends step lines (on rank 0) and takes back those that a resume supersedes.

    A line that cannot be written (full disk) waits in memory and is written, in order, with the next one that can.
    """

    def __init__(self, path: Path, on_failure: Callable[[str], None]) -> None:
        self.path = path
        self._on_failure = on_failure
        self._pending: list[bytes] = []
        self._failing = False
        self._size = 0
        self._fd: int | None = None

    def resume(self, step: int, writer: Callable[[int], int] = lambda step: 0) -> dict[int, dict[str, Any]]:
        """Move lines of later steps to metrics.superseded.jsonl and open the log for appending.

        Args:
            step: updates done; the lines up to it stay.
            writer: tells which attempt wrote a line, by its step; it is added to the moved lines.

        Returns:
            step -> line, for every later step that some earlier attempt had logged: what the replay must reproduce.
        """
        superseded = self.path.with_suffix(".superseded.jsonl")
        kept: list[dict[str, Any]] = []
        moved: list[dict[str, Any]] = []
        for line in _complete_lines(self.path):
            (kept if line["step"] <= step else moved).append(line)
        if moved:
            with superseded.open("ab+") as file:
                if file.tell() and not _ends_with_newline(file):
                    file.write(b"\n")  # close off a line that a crash cut short
                file.writelines(_encode({**line, "attempt": writer(line["step"])}) for line in moved)
                file.flush()
                os.fsync(file.fileno())
        if self.path.exists() and (moved or not _is_whole(self.path)):
            aside = self.path.with_suffix(".tmp")
            with aside.open("wb") as file:
                file.writelines(_encode(line) for line in kept)
                file.flush()
                os.fsync(file.fileno())
            aside.rename(self.path)
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._size = os.fstat(self._fd).st_size
        return {line["step"]: line for line in _complete_lines(superseded) if line["step"] > step}

    def append(self, line: Mapping[str, Any]) -> None:
        """Append one step's line; never raises for the disk's sake."""
        assert self._fd is not None, "MetricsLog.resume opens the file and comes first"
        self._pending.append(_encode(line))
        data = b"".join(self._pending)
        try:
            written = os.write(self._fd, data)
            if written != len(data):
                raise OSError(28, "the disk took only a part of the line")
        except OSError as error:
            os.ftruncate(self._fd, self._size)
            if not self._failing:
                self._failing = True
                self._on_failure(f"{self.path}: {error}")
            return
        self._size += len(data)
        self._pending.clear()
        self._failing = False

    def sync(self) -> None:
        """Make the lines durable: called before a checkpoint is, so that no durable step lacks its line."""
        if self._fd is not None and not self._failing:
            try:
                os.fsync(self._fd)
            except OSError as error:
                self._on_failure(f"{self.path}: {error}")

    def close(self) -> None:
        """Close the file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _ends_with_newline(file: IO[bytes]) -> bool:
    """Whether a file that is not empty ends with a whole line; leaves the position at its end."""
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _is_whole(path: Path) -> bool:
    with path.open("rb") as file:
        return file.seek(0, os.SEEK_END) == 0 or _ends_with_newline(file)


def _encode(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"


def _complete_lines(path: Path) -> Iterable[dict[str, Any]]:
    """The lines of a log that are whole; one that a crash cut short is left out."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for raw in file:
            try:
                line = json.loads(raw)
            except ValueError:
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                yield line


def replay_differences(
    before: Mapping[str, Any], now: Mapping[str, Any], *, same_layout: bool, precision: str
) -> list[str]:
    """What a replayed step did otherwise than the first time, in words; empty where all is as promised.

    `data_digest` and `tokens` must be equal; `loss` and `grad_norm` equal to the bit at the same layout and within
    LOSS_BOUND at another.
    """
    differences = [
        f"{key}: {before.get(key)} before, {now.get(key)} now"
        for key in ("data_digest", "tokens")
        if before.get(key) != now.get(key)
    ]
    bound = 0.0 if same_layout else LOSS_BOUND[precision]
    for key in ("loss", "grad_norm"):
        old, new = before.get(key), now.get(key)
        if old == new or (old is not None and new is not None and math.isnan(old) and math.isnan(new)):
            continue
        if old is None or new is None or not abs(old - new) <= bound * max(abs(old), abs(new)):
            differences.append(f"{key}: {old!r} before, {new!r} now, bound {bound}")
    return differences
