"""Ends the process with SIGKILL at the n-th system call that changes a file system.

Points are counted over `os.write`, `fsync`, `rename`, `replace`, `mkdir`, `unlink`, `rmdir` and the opening of new
files; the process ends just before the call, and for a write also after half of its bytes.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

CALLS = ("write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "open")


class KillPoints:
    """Counts the points from `install` on, and ends the process at the given one.

    Args:
        end_at: number of the point, from 0; None only counts.
        end: what ends the process.
    """

    def __init__(self, end_at: int | None, end: Callable[[], Any] | None = None) -> None:
        self.end_at, self.seen, self.names = end_at, 0, list[str]()
        self._end = end or (lambda: os.kill(os.getpid(), signal.SIGKILL))
        self._real = {name: getattr(os, name) for name in CALLS}

    def install(self) -> None:
        """Put the counters in the place of the functions of `os`."""
        for name in CALLS:
            setattr(os, name, self._counted(name, self._real[name]))

    def remove(self) -> None:
        """Put the functions back."""
        for name, function in self._real.items():
            setattr(os, name, function)

    def _point(self, name: str) -> None:
        at, self.seen = self.seen, self.seen + 1
        self.names.append(name)
        if self.end_at is not None and at == self.end_at:
            self._end()

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            changes = name != "open" or bool(args[1] & os.O_CREAT)
            if changes:
                self._point(name)
            if name == "write":
                # The second point of a write: half of it is on its way.
                half = memoryview(args[1]).cast("B")[: memoryview(args[1]).nbytes // 2]
                if self.end_at == self.seen:
                    function(args[0], half)
                self._point("half write")
            return function(*args, **kwargs)

        return call
