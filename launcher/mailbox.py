"""Requests to leave, from signal handlers and other threads to the thread that supervises a job."""

from __future__ import annotations

import os
import selectors
import threading
from collections import deque
from collections.abc import Sequence


class Mailbox:
    """Requests from signal handlers and other threads to the supervising one, which sleeps on `fd`."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._requests: deque[tuple[str, bool]] = deque()
        self._lock = threading.RLock()  # a signal handler may come while its own thread holds it
        self._open = True

    @property
    def fd(self) -> int:
        """Readable while there may be requests."""
        return self._reader

    @property
    def wake_fd(self) -> int:
        """A byte written here wakes the sleeper (`signal.set_wakeup_fd`)."""
        return self._writer

    def put(self, source: str, *, now: bool) -> bool:
        """Leave a request; False if nobody reads any more."""
        with self._lock:
            if not self._open:
                return False
            self._requests.append((source, now))
            try:
                os.write(self._writer, b"!")
            except BlockingIOError:
                pass  # a full pipe wakes the sleeper as well
            return True

    def take(self) -> list[tuple[str, bool]]:
        """All requests so far, oldest first."""
        try:
            while os.read(self._reader, 4096):
                pass
        except BlockingIOError:
            pass
        taken = []
        while self._requests:
            taken.append(self._requests.popleft())
        return taken

    def wait(self, timeout: float, also: Sequence[int] = ()) -> None:
        """Sleep until there is a request, a descriptor of `also` is readable, or `timeout` seconds are over."""
        with selectors.DefaultSelector() as selector:
            for fd in (self._reader, *also):
                selector.register(fd, selectors.EVENT_READ)
            selector.select(timeout)

    def close(self) -> None:
        """Take no more requests."""
        with self._lock:
            self._open = False
            os.close(self._reader)
            os.close(self._writer)
