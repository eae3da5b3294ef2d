"""TensorBoard event files, written by a thread of their own: a slow, full or vanished disk never touches a step."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

QUEUE_LENGTH = 4096
"""Points that may wait for the disk; beyond it points are dropped and counted."""

LAYOUT = {
    "Training": {
        "loss": ["Multiline", ["train/loss", "eval/loss"]],
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


class TensorBoardLog:
    """Scalars and text of one run.

    Args:
        folder: where the event files go.
        purge_step: on resume, points from this step on in older files are superseded by the new ones.
        on_failure: called (from the writing thread) with a message when writing begins to fail, and when points were
            lost; never more than once for the same spell.
    """

    def __init__(self, folder: Path, *, purge_step: int, on_failure: Callable[[str], None]) -> None:
        self._folder, self._purge_step, self._on_failure = folder, purge_step, on_failure
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(QUEUE_LENGTH)
        self._dropped = 0
        self._failing = False
        self._writer: Any = None
        self._thread = threading.Thread(target=self._work, name="tensorboard", daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Queue points; returns at once."""
        self._put("scalars", (step, dict(values)))

    def text(self, step: int, tag: str, body: str) -> None:
        """Queue a text (Markdown); returns at once."""
        self._put("text", (step, tag, body))

    def flush(self, timeout_seconds: float = 5.0) -> None:
        """Ask that all queued points reach the file, and wait for it, but not longer than the time-out."""
        done = threading.Event()
        self._put("flush", done)
        done.wait(timeout_seconds)

    def close(self) -> None:
        """Flush and end the thread, waiting at most 5 s."""
        self._put("close", None)
        self._thread.join(5.0)

    def _put(self, kind: str, payload: Any) -> None:
        try:
            self._queue.put_nowait((kind, payload))
        except queue.Full:
            self._dropped += 1

    def _work(self) -> None:
        while True:
            kind, payload = self._queue.get()
            try:
                self._handle(kind, payload)
                if self._failing or self._dropped:
                    self._on_failure(f"writing again; {self._dropped} points were lost")
                    self._failing, self._dropped = False, 0
            except OSError as error:
                # The event file may hold half a record now: the next point opens a new file.
                self._writer = None
                self._dropped += kind in ("scalars", "text")
                if not self._failing:
                    self._failing = True
                    self._on_failure(f"{self._folder}: {error}")
            finally:
                if kind == "flush":
                    payload.set()
            if kind == "close":
                return

    def _handle(self, kind: str, payload: Any) -> None:
        if self._writer is None:
            if kind in ("flush", "close"):
                return
            self._open()
        if kind == "scalars":
            step, values = payload
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)
        elif kind == "text":
            step, tag, body = payload
            self._writer.add_text(tag, body, step)
        elif kind == "flush":
            self._writer.flush()
        else:
            self._writer.close()

    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        # flush_secs: a watcher of the run sees points at most 10 s late.
        self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step, flush_secs=10)
        self._writer.add_custom_scalars(LAYOUT)
