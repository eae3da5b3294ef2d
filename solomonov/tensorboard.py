"""TensorBoard event files, written by a thread of their own: a slow, full or vanished disk never touches a step."""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

QUEUE_LENGTH = 4096
"""Points that may wait for the disk; beyond it points are dropped and counted."""

FLUSH_SECONDS = 10.0
"""A watcher of the run sees points at most this late; after a failure, the time until writing is tried again."""

LAYOUT = {
    "Training": {
        "loss": ["Multiline", ["train/loss", "eval/loss", "eval/ema_loss"]],
        "gradient norm": ["Multiline", ["train/grad_norm"]],
        "learning rate": ["Multiline", ["train/lr"]],
    },
    "Step time": {
        "parts": [
            "Multiline",
            [
                "perf/data_wait_seconds",
                "perf/forward_backward_seconds",
                "perf/update_seconds",
                "perf/log_seconds",
            ],
        ],
        "tokens per second": ["Multiline", ["perf/tokens_per_second"]],
    },
}
"""The custom-scalars page."""

DIAGNOSTICS_LAYOUT = {
    "Depth": {
        "update to weight": ["Multiline", ["depth/update_to_weight/.*"]],
        "stream": ["Multiline", ["depth/growth/.*"]],
        "loss without an eighth": ["Multiline", ["depth/skip_eighth/.*"]],
    },
    "Attention": {
        "mean distance": ["Multiline", ["attention/distance/.*/mean"]],
        "mean entropy": ["Multiline", ["attention/entropy/.*/mean"]],
    },
}
"""What stands there too where diagnostics are on: a line an eighth of the layers."""


def serve(folders: Mapping[str, Path], port: int) -> bool:
    """TensorBoard's own server, in this process, so that what ends one ends the other; SIGTERM leaves with 0.

    Args:
        folders: of event files, by the names that they are shown under.
        port: 0: any free one.

    Returns:
        True after Ctrl-C, which TensorBoard takes for itself; False: it could not start, and has said why.
    """
    from tensorboard import default, program

    board = program.TensorBoard(plugins=default.get_plugins())
    spec = ",".join(f"{name}:{folder}" for name, folder in folders.items())
    board.configure(["tensorboard", "--logdir_spec", spec, "--port", str(port)])
    code: int = board.main()
    return code == 0


Draw = Callable[[], NDArray[np.uint8]]
"""Gives a picture: (height, width, 3), red, green, blue."""


@dataclass(frozen=True)
class _Point:
    """All that is written at once for a step: values by tag, texts by tag, or what draws pictures by tag."""

    step: int
    values: Mapping[str, float]
    texts: Mapping[str, str]
    pictures: Mapping[str, Draw]


class TensorBoardLog:
    """Scalars, text and pictures of one run.

    Points stay in memory until they were flushed, so that a disk that is full for a while costs none of them.

    Args:
        folder: where the event files go.
        purge_step: on resume, points from this step on in older files are superseded by the new ones.
        on_failure: called (from the writing thread) with a message when writing begins to fail, and when it works
            again or points were lost; never more than once for the same spell.
        layout: the custom-scalars page.
    """

    def __init__(
        self,
        folder: Path,
        *,
        purge_step: int,
        on_failure: Callable[[str], None],
        layout: Mapping[str, Mapping[str, list[Any]]] = LAYOUT,
    ) -> None:
        self._folder, self._purge_step, self._on_failure, self._layout = folder, purge_step, on_failure, layout
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(QUEUE_LENGTH)
        self._dropped = 0  # by the caller's thread; the rest belongs to the writing thread
        self._lost = 0
        self._told = 0
        self._failing = False
        self._writer: Any = None
        self._opened = False
        # Readers take files by name, which begins with the second: those of one second may come in any order.
        self._free_second = 0.0
        self._unsafe: deque[_Point] = deque()
        self._due = time.monotonic() + FLUSH_SECONDS
        self._thread = threading.Thread(target=self._work, name="tensorboard", daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Queue points; returns at once."""
        self._put(_Point(step, dict(values), {}, {}))

    def text(self, step: int, tag: str, body: str) -> None:
        """Queue a text (Markdown); returns at once."""
        self._put(_Point(step, {}, {tag: body}, {}))

    def picture(self, step: int, tag: str, draw: Draw) -> None:
        """Queue a picture, which the writing thread draws; returns at once."""
        self._put(_Point(step, {}, {}, {tag: draw}))

    def flush(self, timeout_seconds: float = 5.0) -> None:
        """Ask that all queued points reach the file, and wait for it, but not longer than the time-out."""
        done = threading.Event()
        with suppress(queue.Full):
            self._queue.put_nowait(("flush", done))
            done.wait(timeout_seconds)

    def close(self) -> None:
        """Flush and end the thread, waiting at most 10 s."""
        with suppress(queue.Full):
            self._queue.put(("close", None), timeout=5.0)
            self._thread.join(5.0)

    def _put(self, point: _Point) -> None:
        try:
            self._queue.put_nowait(("point", point))
        except queue.Full:
            self._dropped += 1

    def _work(self) -> None:
        while True:
            try:
                kind, payload = self._queue.get(timeout=FLUSH_SECONDS)
            except queue.Empty:
                kind, payload = "tick", None
            try:
                self._handle(kind, payload)
            except OSError as error:
                self._fail(error)
            finally:
                if kind == "flush":
                    payload.set()
            if kind == "close":
                return

    def _handle(self, kind: str, payload: Any) -> None:
        due = kind in ("flush", "close") or time.monotonic() >= self._due
        if kind == "point":
            self._keep(payload)
            if self._writer is not None:
                self._write(payload)
        if self._writer is None and self._unsafe and (due or not self._failing):
            if kind == "close":
                time.sleep(max(0.0, self._free_second - time.time()))  # the last chance
            if time.time() >= self._free_second:
                self._open()
        if self._writer is not None and (due or self._failing or len(self._unsafe) >= QUEUE_LENGTH):
            self._writer.flush()
            self._durable()
        if kind == "close" and self._writer is not None:
            self._writer.close()

    def _keep(self, point: _Point) -> None:
        if len(self._unsafe) >= QUEUE_LENGTH:
            self._unsafe.popleft()
            self._lost += self._failing
        self._unsafe.append(point)

    def _open(self) -> None:
        """A new event file, with all points that may not be in an older one."""
        from torch.utils.tensorboard import SummaryWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        self._free_second = math.floor(time.time()) + 1.0
        # After a failure, only what is written again supersedes older points: the rest of the attempt stays.
        purge_step = min(point.step for point in self._unsafe) if self._opened else self._purge_step
        # Flushing is ours alone: the writer's own timer would race with it, and could write points twice.
        self._writer = SummaryWriter(str(self._folder), purge_step=purge_step, flush_secs=10**6)
        self._writer.add_custom_scalars(self._layout)
        for point in self._unsafe:
            self._write(point)

    def _write(self, point: _Point) -> None:
        for tag, value in point.values.items():
            self._writer.add_scalar(tag, value, point.step)
        for tag, body in point.texts.items():
            self._writer.add_text(tag, body, point.step)
        for tag, draw in point.pictures.items():
            self._writer.add_image(tag, draw(), point.step, dataformats="HWC")

    def _durable(self) -> None:
        """All points are in the file. Those of the last step stay: a new file supersedes whole steps."""
        self._opened = True
        self._due = time.monotonic() + FLUSH_SECONDS
        last = self._unsafe[-1].step if self._unsafe else None
        self._unsafe = deque(point for point in self._unsafe if point.step == last)
        lost = self._dropped + self._lost - self._told
        if self._failing or lost:
            self._failing, self._told = False, self._told + lost
            self._on_failure(f"writing again; {lost} points were lost")

    def _fail(self, error: OSError) -> None:
        """The event file may hold half a record now: the next try opens a new one."""
        self._writer = None
        self._due = time.monotonic() + FLUSH_SECONDS
        with suppress(OSError):  # else each try on a full disk would leave an empty file
            for path in self._folder.glob(f"events.out.tfevents.*.{os.getpid()}.*"):
                if not path.stat().st_size:
                    path.unlink()
        if not self._failing:
            self._failing = True
            self._on_failure(f"{self._folder}: {error}")
