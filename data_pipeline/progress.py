"""What `prepare` shows while it works: one bar a phase on a terminal, one plain line a phase elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


class Phase:
    """Counts the finished tasks of one phase; made by `Progress.phase`, used as a context manager."""

    def __init__(self, progress: Progress, name: str, total: int) -> None:
        self._progress, self.name, self.total = progress, name, total
        self.done = 0
        self._bar: TaskID | None = None
        self._start = time.perf_counter()

    def __enter__(self) -> Phase:
        self._start = time.perf_counter()
        if self._progress.bars is not None:
            self._bar = self._progress.bars.add_task(self.name, total=self.total)
        return self

    def advance(self) -> None:
        """One more task is finished."""
        self.done += 1
        if self._progress.bars is not None and self._bar is not None:
            self._progress.bars.advance(self._bar)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.perf_counter() - self._start
        self._progress.seconds[self.name] = self._progress.seconds.get(self.name, 0.0) + seconds
        if kind is None and self._progress.bars is None:
            self._progress.line(f"{self.name}: {self.done} of {self.total}, {seconds:.1f} s")


class Progress:
    """Shows phases on `stream`: bars on a terminal, lines elsewhere, nothing where `show` is false."""

    def __init__(self, *, show: bool, stream: TextIO | None = None) -> None:
        self._show = show
        self._stream = stream if stream is not None else sys.stderr
        self.bars: RichProgress | None = None
        self.seconds: dict[str, float] = {}
        """Wall time of each phase, for the report."""

    def __enter__(self) -> Progress:
        if self._show and self._stream.isatty():
            # rich takes 0.1 s to import; only a terminal needs it.
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as RichProgress

            self.bars = RichProgress(
                TextColumn("{task.description:<22}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=Console(file=self._stream),
            )
            self.bars.start()
        return self

    def phase(self, name: str, total: int) -> Phase:
        """A phase of `total` tasks."""
        return Phase(self, name, total)

    def line(self, text: str) -> None:
        """Says one thing on a line of its own."""
        if not self._show:
            return
        if self.bars is not None:
            self.bars.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=self._stream, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars is not None:
            self.bars.stop()
