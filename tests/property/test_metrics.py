"""metrics.jsonl under any order of appends, crashes with a cut line, and resumes at earlier steps, against a list:
each step stands exactly once, in order, with its newest line; and every line that was taken back is kept."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from solomonov.metrics import MetricsLog

Line = dict[str, Any]


def refuse(message: str) -> None:
    raise AssertionError(f"the disk did not refuse anything: {message}")


def lines_of(path: Path) -> list[Line]:
    """What any reader of JSON lines finds; a cut line is none."""
    found = []
    for text in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


class MetricsOfARun(RuleBasedStateMachine):
    """`lines` is what the run stands at; `taken_back` is every line that a resume superseded, in order."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "metrics.jsonl"
        self.lines: list[Line] = []
        self.taken_back: list[Line] = []
        self.attempt = 1
        self.log: MetricsLog | None = MetricsLog(self.path, refuse)
        assert self.log.resume(0) == {}

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            if self.log is not None:
                self.log.close()
            shutil.rmtree(self.folder)

    def _next(self, loss: float) -> Line:
        step = len(self.lines) + 1
        return {"step": step, "loss": loss, "written_by": self.attempt, "text": "ü\n"}

    def _writer(self, step: int) -> int:
        """Which attempt wrote a line, as the journal would tell."""
        return int(self.lines_before[step - 1]["written_by"])

    def _told(self, lines: list[Line]) -> list[Line]:
        """Lines as they are kept when they are taken back: with the attempt that wrote them."""
        self.lines_before = list(self.lines)
        return [{**line, "attempt": line["written_by"]} for line in lines]

    @precondition(lambda self: self.log is not None)
    @rule(loss=st.floats(allow_nan=False, allow_infinity=False), sync=st.booleans())
    def append(self, loss: float, sync: bool) -> None:
        assert self.log is not None
        line = self._next(loss)
        self.log.append(line)
        self.lines.append(line)
        if sync:
            self.log.sync()

    @precondition(lambda self: self.log is not None)
    @rule(share=st.floats(0.0, 1.0, exclude_max=True))
    def crash(self, share: float) -> None:
        """The process ends inside its next write: some bytes of the line are there."""
        assert self.log is not None
        whole = json.dumps(self._next(0.5)).encode() + b"\n"
        with self.path.open("ab") as file:
            file.write(whole[: int(share * (len(whole) - 1))])
        self.log.close()
        self.log = None

    @precondition(lambda self: self.log is not None)
    @rule()
    def stop(self) -> None:
        assert self.log is not None
        self.log.close()
        self.log = None

    @precondition(lambda self: self.log is None)
    @rule(data=st.data())
    def resume(self, data: Any) -> None:
        """At any step up to the newest; the lines that are to be reproduced come back, the newest of each step."""
        step = data.draw(st.integers(0, len(self.lines)))
        self.taken_back += self._told(self.lines[step:])
        del self.lines[step:]
        self.attempt += 1
        self.log = MetricsLog(self.path, refuse)
        newest = {line["step"]: line for line in self.taken_back if line["step"] > step}
        assert self.log.resume(step, self._writer) == newest

    @precondition(lambda self: self.log is None)
    @rule(point=st.integers(0, 3), data=st.data())
    def crash_while_resuming(self, point: int, data: Any) -> None:
        """The process ends inside `resume`: a line is in both files at the worst, and the next resume mends it."""
        step = data.draw(st.integers(0, len(self.lines)))
        superseded = self.path.with_suffix(".superseded.jsonl")
        moved = b"".join(json.dumps(line).encode() + b"\n" for line in self._told(self.lines[step:]))
        if point:
            with superseded.open("ab") as file:
                file.write(moved)
            self.taken_back += self._told(self.lines[step:])
        if point > 1:
            self.path.with_suffix(".tmp").write_bytes(b'{"step": 1, "lo')

    @invariant()
    def each_step_stands_once_in_order(self) -> None:
        if hasattr(self, "folder"):
            assert lines_of(self.path) == self.lines
            assert [line["step"] for line in self.lines] == list(range(1, len(self.lines) + 1))
            assert lines_of(self.path.with_suffix(".superseded.jsonl")) == self.taken_back


MetricsOfARun.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestMetricsOfARun = MetricsOfARun.TestCase
