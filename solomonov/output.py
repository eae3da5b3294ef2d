"""A rank's own log must never end the rank: standard output and error that swallow a full or vanished disk."""

from __future__ import annotations

import io
import sys
from typing import TextIO


class Unfailing(io.TextIOBase):
    """A text stream that passes everything on to another one and ignores what the system refuses."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def writable(self) -> bool:
        """Always."""
        return True

    def fileno(self) -> int:
        """Descriptor of the stream behind, for faulthandler and child processes."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """Whether the stream behind is a terminal."""
        return self._stream.isatty()

    def write(self, text: str) -> int:
        """Write, or lose the text where the disk refuses it."""
        try:
            self._stream.write(text)
        except OSError:
            return len(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or leave it where the disk refuses it."""
        try:
            self._stream.flush()
        except OSError:
            return


def protect_output() -> None:
    """Make standard output and error of this process unfailing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, f"__{name}__")
        if stream is not None:
            setattr(sys, name, Unfailing(stream))
