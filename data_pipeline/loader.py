"""The inline loader: one thread of the rank builds the rows of the coming steps while training computes.

A thread, not processes: handing rows over from another process costs more than building them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from threading import Condition, Thread, current_thread
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.batches import BatchRows
from data_pipeline.rows import RowBatch


class RowSource(Protocol):
    """Anything that gives rows by number."""

    def rows(self, indices: NDArray[np.int64], /) -> RowBatch:
        """Rows (B,) by number."""
        ...


class Loader:
    """Iterates over steps; an item is the list of this rank's micro-batches of one step.

    Step s (from 0) has the rows `batches.rows(s)`; rank r takes those with i mod dp_size = r, in increasing
    order, so the ranks share out any batch, evenly or not. A rank's rows are cut into micro-batches of
    `micro_batch_rows`, the last one smaller where they do not divide; a rank
    without rows in a step gets an empty list.

    Args:
        stream: where rows come from.
        batches: rows of each step on all ranks together.
        dp_rank, dp_size: which data-parallel rank this is, of how many.
        micro_batch_rows: rows of a micro-batch.
        first_step: step of the first item.
        end_step: there is no item from this step on, and nothing is built for it; None: without end.
        prefetch_steps: steps that are built ahead, by one daemon thread; 0 builds each when it is asked for,
            without a thread.

    An error in the thread is raised, as itself, where the step that it spoilt is asked for. `close()`, or
    leaving the context, ends the thread; iteration then stops.
    """

    def __init__(
        self,
        stream: RowSource,
        *,
        batches: BatchRows,
        dp_rank: int = 0,
        dp_size: int = 1,
        micro_batch_rows: int,
        first_step: int = 0,
        end_step: int | None = None,
        prefetch_steps: int = 2,
    ) -> None:
        if min(micro_batch_rows, dp_size) < 1 or min(first_step, prefetch_steps) < 0:
            raise ValueError(
                f"micro_batch_rows {micro_batch_rows}, dp_size {dp_size} must be "
                f"at least 1, first_step {first_step}, prefetch_steps {prefetch_steps} at least 0"
            )
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank {dp_rank} is not in [0, {dp_size})")
        self._stream = stream
        self._batches, self._micro_batch_rows = batches, micro_batch_rows
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._prefetch_steps, self._end_step = prefetch_steps, end_step
        self.next_step = first_step
        """Step of the next item."""
        self._ready: deque[list[RowBatch]] = deque()
        self._changed = Condition()
        self._closed = False
        self._error: BaseException | None = None
        self._thread: Thread | None = None

    def row_numbers(self, step: int) -> NDArray[np.int64]:
        """Numbers of this rank's rows of a step, increasing."""
        rows = self._batches.rows(step)
        mine = rows.start + (self._dp_rank - rows.start) % self._dp_size
        return np.arange(mine, rows.stop, self._dp_size, dtype=np.int64)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[list[RowBatch]]:
        return self

    def __next__(self) -> list[RowBatch]:
        """The micro-batches of step `next_step`."""
        if self.next_step == self._end_step:
            raise StopIteration
        if self._prefetch_steps == 0:
            if self._closed:
                raise StopIteration
            item = self._build(self.next_step)
        else:
            item = self._take()
        self.next_step += 1
        return item

    def close(self) -> None:
        """Ends the thread (after the rows that it is reading) and drops what was built ahead."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread is not None and self._thread is not current_thread():
            self._thread.join()

    def _build(self, step: int) -> list[RowBatch]:
        numbers = self.row_numbers(step)
        if not len(numbers):
            return []
        rows, size = self._stream.rows(numbers), self._micro_batch_rows
        return [rows.part(first, first + size) for first in range(0, len(rows), size)]

    def _take(self) -> list[RowBatch]:
        with self._changed:
            if self._thread is None and not self._closed:
                self._thread = Thread(target=self._work, name="rows", args=(self.next_step,), daemon=True)
                self._thread.start()
            self._changed.wait_for(lambda: self._ready or self._error or self._closed)
            if self._closed:
                raise StopIteration
            if self._ready:
                item = self._ready.popleft()
                self._changed.notify_all()
                return item
            assert self._error is not None, "woken without a step, an error or the end"
            raise self._error

    def _work(self, step: int) -> None:
        with _Handover(self):
            while step != self._end_step:
                item = self._build(step)
                with self._changed:
                    self._ready.append(item)
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: len(self._ready) < self._prefetch_steps or self._closed)
                    if self._closed:
                        return
                step += 1

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()


class _Handover:
    """Hands whatever ends the thread's work to the consumer, who raises it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is not None:
            self._loader._fail(error)
        return True
