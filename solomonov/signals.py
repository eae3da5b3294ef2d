"""Was this rank asked to stop? TERM, USR1, USR2 and the first INT mean: save, then leave; a second INT: leave now."""

from __future__ import annotations

import os
import signal
from types import FrameType

from solomonov.exits import INTERRUPTED

SAVE_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class StopRequest:
    """Remembers a signal until the end of the step, where all ranks agree on it.

    Further save signals while one is remembered change nothing: they never break the save that is under way.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._interrupts = 0

    def install(self) -> StopRequest:
        """Take over the signals of this process (main thread only)."""
        for number in SAVE_SIGNALS:
            signal.signal(number, self._remember)
        return self

    @property
    def requested(self) -> bool:
        """True from the first signal on."""
        return self.received is not None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                os._exit(INTERRUPTED)
        if self.received is None:
            self.received = signal.Signals(number).name
