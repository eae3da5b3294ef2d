"""Rows from simulated data workers that die, freeze, dawdle, refuse and come back: always the rows of the stream.

The clock and the workers are simulated, so that a minute of faults takes a millisecond; what the workers answer is
what real ones would (the stream's own rows). tests/e2e/test_data_workers.py does it with real processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_pipeline.batches import BatchRows
from data_pipeline.cluster import Worker, WorkerFailed, WorkerLost
from data_pipeline.config import WorkersConfig
from data_pipeline.dataset import Dataset
from data_pipeline.errors import DamagedDataError
from data_pipeline.remote import (
    MAX_REPLY_BYTES,
    PING_SECONDS,
    PROBE_SECONDS,
    SHUNNED_SECONDS,
    SLOW_SECONDS,
    START_SECONDS,
    TURN_SECONDS,
    Cancelled,
    RemoteRows,
)
from data_pipeline.rows import RowBatch
from data_pipeline.stream import Stream
from data_pipeline.worker import Reply
from tests.support.datasets import make_documents, write_dataset

PATIENCE = 60.0
DAMAGE = {"what": "A block is damaged.", "got": "a", "rule": "b", "remedy": "c", "damaged": True}


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Stream:
    folder = tmp_path_factory.mktemp("remote") / "dataset"
    documents = {"one": make_documents(1, 200, 30.0), "two": make_documents(2, 100, 60.0)}
    write_dataset(folder, documents, sequence_tokens=32, packing="best_fit", lanes=8)
    return Stream(Dataset.open(folder), sequence_tokens=32, packing="best_fit", seed=3)


@dataclass(frozen=True)
class Fault:
    """What befalls one worker from a moment on."""

    at: float
    worker: int
    kind: str  # dies, freezes, hangs (pings are answered, requests are not), dawdles, refuses, fails
    seconds: float  # until it is back, or as it should be


class Simulation:
    """Workers and clock; a call is a number."""

    def __init__(self, stream: Stream, workers: int, faults: Sequence[Fault]) -> None:
        self.stream, self.time = stream, 0.0
        self.faults = faults
        self.lives = dict.fromkeys(range(workers), 0)
        self.numbers = count()
        self.open: dict[int, tuple[Worker, NDArray[np.int64] | None, float]] = {}
        self.largest = 0
        self.sent: list[tuple[float, Worker, NDArray[np.int64]]] = []
        self.losses: list[tuple[Worker, bool]] = []
        self.singly = False  # one answer a look, the oldest first, as from a worker that builds one after the other
        self.closed = False

    def struck(self, number: int, kind: str) -> bool:
        return any(f.worker == number and f.kind == kind and f.at <= self.time < f.at + f.seconds for f in self.faults)

    def incarnation(self, number: int) -> int:
        """One more for each death that is over or under way."""
        return sum(f.worker == number and f.kind == "dies" and f.at <= self.time for f in self.faults)

    def living(self) -> Mapping[int, Worker]:
        alive = [number for number in self.lives if not self.struck(number, "dies")]
        # A dead worker stays listed until somebody says that it is lost, as in the real directory.
        return {n: Worker(n, self.incarnation(n)) for n in alive if self.incarnation(n) >= self.lives[n]}

    def lose(self, worker: Worker, *, gone: bool) -> None:
        self.losses.append((worker, gone))
        if gone:
            self.lives[worker.number] = max(self.lives[worker.number], worker.incarnation + 1)

    def send(self, worker: Worker, numbers: NDArray[np.int64]) -> int:
        if self.dead(worker):
            raise WorkerLost("known to be gone")
        self.largest = max(self.largest, len(numbers))
        self.sent.append((self.time, worker, numbers))
        return self.call(worker, numbers, 3.0 if self.struck(worker.number, "dawdles") else 0.01)

    def ping(self, worker: Worker) -> int:
        return self.call(worker, None, 0.001)

    def call(self, worker: Worker, numbers: NDArray[np.int64] | None, seconds: float) -> int:
        call = next(self.numbers)
        self.open[call] = (worker, numbers, self.time + seconds)
        return call

    def dead(self, worker: Worker) -> bool:
        return self.incarnation(worker.number) != worker.incarnation or self.struck(worker.number, "dies")

    def wait(self, calls: Sequence[Any], timeout: float) -> Sequence[int]:
        assert timeout == TURN_SECONDS
        self.time += timeout

        def over(call: int) -> bool:
            worker, rows, due = self.open[call]
            stuck = self.struck(worker.number, "freezes") or (rows is not None and self.struck(worker.number, "hangs"))
            return self.dead(worker) or (due <= self.time and not stuck)

        ended = [call for call in calls if over(call)]
        return ended[:1] if self.singly else ended

    def result(self, call: int) -> Reply | None:
        worker, numbers, _ = self.open.pop(call)
        if self.dead(worker):
            raise WorkerLost("it died")
        if numbers is None:
            return None
        if self.struck(worker.number, "fails"):
            raise WorkerFailed("MemoryError")
        if self.struck(worker.number, "refuses"):
            return Reply(worker.number + 1, error=DAMAGE)
        rows = self.stream.rows(numbers)
        return Reply(worker.number + 1, arrays=(rows.input_ids, rows.labels, rows.document_ids))

    def now(self) -> float:
        return self.time

    def close(self) -> None:
        self.closed = True


def remote(
    stream: Stream,
    simulation: Simulation,
    *,
    workers: int,
    batch: int | BatchRows,
    end: int,
    window: int,
    first: int = 0,
) -> tuple[RemoteRows, list[tuple[str, dict[str, Any]]]]:
    events: list[tuple[str, dict[str, Any]]] = []
    batches = BatchRows(batch) if isinstance(batch, int) else batch
    rows = RemoteRows(
        simulation,
        stream,
        WorkersConfig(backend="ray", count=workers, window_bytes=window, patience_seconds=PATIENCE),
        rows_of=lambda step: np.array(batches.rows(step), dtype=np.int64),
        steps=range(first, end),
        on_event=lambda kind, **fields: events.append((kind, fields)),
    )
    return rows, events


def same(a: RowBatch, b: RowBatch) -> bool:
    return all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for name in ("row_ids", "input_ids", "labels", "document_ids")
    )


faults = st.lists(
    st.builds(
        Fault,
        at=st.floats(0, 20),
        worker=st.integers(0, 3),
        kind=st.sampled_from(["dies", "freezes", "hangs", "dawdles", "refuses", "fails"]),
        seconds=st.floats(0.05, 100),
    ),
    max_size=8,
)


@settings(max_examples=60)
@given(
    workers=st.integers(1, 4),
    batch=st.integers(1, 40),
    first=st.integers(0, 50),
    steps=st.integers(1, 40),
    window=st.sampled_from([1, 1 << 10, 1 << 14, 1 << 20]),
    faults=faults,
)
def test_whatever_befalls_the_workers_the_rows_are_the_streams(
    stream: Stream, workers: int, batch: int, first: int, steps: int, window: int, faults: list[Fault]
) -> None:
    simulation = Simulation(stream, workers, faults)
    rows, events = remote(
        stream, simulation, workers=workers, batch=batch, first=first, end=first + steps, window=window
    )
    for step in range(first, first + steps):
        numbers = np.arange(step * batch, (step + 1) * batch, dtype=np.int64)
        got = rows.rows(numbers)
        assert same(got, stream.rows(numbers)), f"step {step}"
        got.input_ids[:] = 0  # the caller's own: nobody else's rows change
        simulation.time += 0.05
        # Bounded: what is asked for ahead stays within the window, but for one chunk.
        assert rows._window <= max(window, 0) + max(window // 2, batch * 384) or rows._planned == first + steps
    rows.close()
    assert simulation.closed
    assert sum(rows.served.values()) == steps * batch, "each row was taken once"
    assert simulation.largest * 384 <= MAX_REPLY_BYTES
    assert sum(fields["requests"] for kind, fields in events if kind == "data_reissued") == rows.reissued
    if not faults:
        assert [kind for kind, _ in events] == ["data_served"]


@settings(max_examples=30)
@given(refusing=st.sets(st.integers(0, 2), max_size=2), batch=st.integers(8, 40))
def test_rows_that_one_worker_cannot_build_come_from_another(stream: Stream, refusing: set[int], batch: int) -> None:
    simulation = Simulation(stream, 3, [Fault(0.0, number, "refuses", 1e9) for number in refusing])
    rows, events = remote(stream, simulation, workers=3, batch=batch, end=12, window=1 << 14)
    for step in range(12):
        numbers = np.arange(step * batch, (step + 1) * batch, dtype=np.int64)
        assert same(rows.rows(numbers), stream.rows(numbers))
    told = {fields["worker"] for kind, fields in events if kind == "data_refused"}
    assert told == refusing or (told < refusing and batch < 24)


def test_rows_that_no_worker_can_build_are_built_here(stream: Stream) -> None:
    simulation = Simulation(stream, 2, [Fault(0.0, number, "refuses", 1e9) for number in range(2)])
    rows, events = remote(stream, simulation, workers=2, batch=16, end=3, window=1 << 14)
    for step in range(3):
        numbers = np.arange(step * 16, (step + 1) * 16, dtype=np.int64)
        assert same(rows.rows(numbers), stream.rows(numbers))
    assert [kind for kind, _ in events].count("fallback") == 1, "once, not once a step"
    assert {kind for kind, _ in events} == {"data_refused", "data_reissued", "fallback"}
    assert rows.served == {0: 48}
    assert simulation.time < PATIENCE, "there is nobody to wait for"


def test_damage_that_is_seen_here_too_is_raised_as_such(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", {"one": make_documents(1, 200, 30.0)}, sequence_tokens=32, packing="concat")
    for shard in (tmp_path / "data" / "shards").glob("*.tar"):
        data = bytearray(shard.read_bytes())
        data[512:] = bytes(byte ^ 1 for byte in data[512:])
        shard.write_bytes(data)
    damaged = Stream(Dataset.open(tmp_path / "data"), sequence_tokens=32, packing="concat", seed=3)
    simulation = Simulation(damaged, 2, [Fault(0.0, number, "refuses", 1e9) for number in range(2)])
    rows, _ = remote(damaged, simulation, workers=2, batch=16, end=3, window=1 << 14)
    with pytest.raises(DamagedDataError, match="damaged"):
        rows.rows(np.arange(16, dtype=np.int64))


def test_without_faults_each_worker_builds_the_rows_of_its_lanes(stream: Stream) -> None:
    simulation = Simulation(stream, 3, [])
    rows, _ = remote(stream, simulation, workers=3, batch=30, end=12, window=1 << 14)
    for step in range(12):
        rows.rows(np.arange(step * 30, (step + 1) * 30, dtype=np.int64))
    assert {worker.number for _, worker, _ in simulation.sent} == {0, 1, 2}
    for _, worker, numbers in simulation.sent:
        assert set(stream.lanes_of(numbers) % 3) == {worker.number}, "else each block is read by several workers"


@pytest.mark.parametrize("window", [1 << 10, 1 << 14, 1 << 20])
def test_batches_that_grow_are_those_of_the_stream(window: int, stream: Stream) -> None:
    """In windows that hold less than a batch, some of them, and all."""
    batches = BatchRows(30, first=5, over=60)
    assert [len(batches.rows(step)) for step in (0, 3, 11)] == [5, 10, 30]
    rows, _ = remote(stream, Simulation(stream, 3, []), workers=3, batch=batches, end=12, window=window)
    for step in range(12):
        numbers = np.array(batches.rows(step), dtype=np.int64)
        assert rows.rows(numbers).digest() == stream.rows(numbers).digest()


def test_a_step_that_no_reply_holds_comes_in_several(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.remote.MAX_REPLY_BYTES", 3 * 384)
    simulation = Simulation(stream, 2, [])
    rows, _ = remote(stream, simulation, workers=2, batch=16, end=6, window=1 << 14)
    for step in range(6):
        numbers = np.arange(step * 16, (step + 1) * 16, dtype=np.int64)
        assert same(rows.rows(numbers), stream.rows(numbers))
    assert simulation.largest == 3


def test_the_next_step_is_asked_for_when_one_is_handed_over(stream: Stream) -> None:
    simulation = Simulation(stream, 2, [])
    rows, _ = remote(stream, simulation, workers=2, batch=16, end=10, window=1)
    for step in range(10):
        rows.rows(np.arange(step * 16, (step + 1) * 16, dtype=np.int64))
        assert sum(len(numbers) for _, _, numbers in simulation.sent) == 16 * min(step + 2, 10)


@pytest.mark.parametrize("absent", [2.0, 1e9])
def test_at_the_start_rows_wait_a_while_for_their_own_worker(stream: Stream, absent: float) -> None:
    simulation = Simulation(stream, 2, [Fault(0.0, 1, "dies", absent)])
    rows, events = remote(stream, simulation, workers=2, batch=16, end=1, window=1 << 14)
    assert same(rows.rows(np.arange(16, dtype=np.int64)), stream.rows(range(16)))
    assert not events
    if absent < START_SECONDS:
        assert all(set(stream.lanes_of(numbers) % 2) == {worker.number} for _, worker, numbers in simulation.sent)
    else:
        assert {worker.number for _, worker, _ in simulation.sent} == {0}
        assert START_SECONDS <= simulation.time <= START_SECONDS + 1.0, "then the other one builds them"


def test_what_a_dead_worker_owed_is_asked_of_another_at_once(stream: Stream) -> None:
    simulation = Simulation(stream, 2, [Fault(0.05, 1, "dies", 1e9)])
    rows, events = remote(stream, simulation, workers=2, batch=16, end=3, window=1)
    for step in range(3):
        numbers = np.arange(step * 16, (step + 1) * 16, dtype=np.int64)
        assert same(rows.rows(numbers), stream.rows(numbers))
    [(kind, fields)] = events
    assert (kind, fields["worker"], fields["cause"], fields["reason"]) == ("data_reissued", 1, "died", "it died")
    assert simulation.time < PROBE_SECONDS, "its death needs no probe"
    assert simulation.losses == [(Worker(1, 0), True)], "its next life is looked for"
    assert (rows.lost, rows.reissued) == (1, fields["requests"])


def test_late_answers_of_a_worker_that_thaws_are_not_those_of_its_next_requests(stream: Stream) -> None:
    simulation = Simulation(stream, 2, [Fault(0.0, 1, "freezes", 10.0)])
    simulation.singly = True
    rows, events = remote(stream, simulation, workers=2, batch=16, end=40, window=1 << 14)
    for step in range(40):
        numbers = np.arange(step * 16, (step + 1) * 16, dtype=np.int64)
        assert same(rows.rows(numbers), stream.rows(numbers)), f"step {step}"
        simulation.time += 0.5
    assert {fields["cause"] for kind, fields in events if kind == "data_reissued"} == {"frozen"}
    assert sum(rows.served.values()) == 40 * 16


@pytest.mark.parametrize(("kind", "seconds"), [("refuses", 1.0), ("fails", 1.0), ("freezes", 10.0), ("hangs", 40.0)])
def test_a_worker_that_is_well_again_is_asked_again(stream: Stream, kind: str, seconds: float) -> None:
    simulation = Simulation(stream, 2, [Fault(0.0, 0, kind, seconds)])
    rows, _ = remote(stream, simulation, workers=2, batch=16, end=40, window=1)
    for step in range(40):
        numbers = np.arange(step * 16, (step + 1) * 16, dtype=np.int64)
        assert same(rows.rows(numbers), stream.rows(numbers))
        simulation.time += 3.0
    late = {worker.number for time, worker, _ in simulation.sent if time > seconds + 2 * SHUNNED_SECONDS}
    assert late == {0, 1}


def test_a_worker_that_answers_after_a_refusal_is_asked_again_at_once(stream: Stream) -> None:
    """The one fault has passed: nobody needs to build rows alone for half a minute."""
    simulation = Simulation(stream, 1, [Fault(0.0, 0, "refuses", 0.15)])
    simulation.singly = True
    rows, events = remote(stream, simulation, workers=1, batch=16, end=12, window=1 << 14)
    for step in range(12):
        numbers = np.arange(step * 16, (step + 1) * 16, dtype=np.int64)
        assert same(rows.rows(numbers), stream.rows(numbers))
    assert simulation.time < SHUNNED_SECONDS
    assert [kind for kind, _ in events] == ["data_refused", "data_reissued", "fallback", "data_workers_back"]
    assert rows.served[1] > rows.served[0]


def test_a_frozen_worker_costs_its_probe_and_its_ping(stream: Stream) -> None:
    simulation = Simulation(stream, 2, [Fault(0.0, 1, "freezes", 1e9)])
    rows, events = remote(stream, simulation, workers=2, batch=16, end=3, window=1 << 14)
    for step in range(3):
        numbers = np.arange(step * 16, (step + 1) * 16, dtype=np.int64)
        assert same(rows.rows(numbers), stream.rows(numbers))
    [reissued] = [fields for kind, fields in events if kind == "data_reissued"]
    assert reissued["cause"] == "frozen"
    assert PROBE_SECONDS + PING_SECONDS <= reissued["waited_seconds"] <= 3.0, "in the simulation's seconds"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_answers_pings_and_gives_no_rows(stream: Stream, workers: int) -> None:
    """Its disk hangs. Another one is asked after 30 s; where there is none, the rank helps itself in the end."""
    simulation = Simulation(stream, workers, [Fault(0.0, 0, "hangs", 1e9)])
    rows, events = remote(stream, simulation, workers=workers, batch=16, end=3, window=1 << 14)
    pings = 0
    ping = simulation.ping

    def counted(worker: Worker) -> int:
        nonlocal pings
        pings += 1
        return ping(worker)

    simulation.ping = counted  # type: ignore[method-assign]
    assert same(rows.rows(np.arange(16, dtype=np.int64)), stream.rows(range(16)))
    assert pings <= simulation.time / PROBE_SECONDS + 2, "a busy worker is not asked without pause how it does"
    kinds = [kind for kind, _ in events]
    if workers == 1:
        assert kinds == ["fallback"]
        assert PATIENCE + SLOW_SECONDS <= simulation.time <= PATIENCE + SLOW_SECONDS + 1.0
    else:
        assert [fields["cause"] for _, fields in events] == ["slow"]
        assert SLOW_SECONDS <= simulation.time <= SLOW_SECONDS + 1.0


def test_a_refusing_worker_and_a_dead_one_leave_the_rank_to_itself(stream: Stream) -> None:
    faults = [Fault(0.0, 0, "refuses", 1e9), Fault(0.3, 1, "dies", 1e9)]
    simulation = Simulation(stream, 2, faults)
    rows, events = remote(stream, simulation, workers=2, batch=16, end=40, window=1)
    for step in range(40):
        numbers = np.arange(step * 16, (step + 1) * 16, dtype=np.int64)
        assert same(rows.rows(numbers), stream.rows(numbers))
        simulation.time += 0.1
    assert [kind for kind, _ in events].count("fallback") == 1
    assert [kind for kind, _ in events].count("data_refused") <= simulation.time / 30 + 2, "once a shunning, not a step"


def test_a_rank_that_is_to_leave_does_not_wait(stream: Stream) -> None:
    simulation = Simulation(stream, 1, [Fault(0.0, 0, "dies", 1e9)])
    rows, events = remote(stream, simulation, workers=1, batch=16, end=3, window=1 << 14)
    rows._hurry = lambda: simulation.time > 5.0
    assert same(rows.rows(np.arange(16, dtype=np.int64)), stream.rows(range(16)))
    assert 5.0 < simulation.time < 7.0
    assert [kind for kind, _ in events] == ["fallback"]


def test_a_worker_that_is_busy_is_not_called_frozen(stream: Stream) -> None:
    simulation = Simulation(stream, 2, [Fault(0.0, 0, "dawdles", 1e9), Fault(0.0, 1, "dawdles", 1e9)])
    rows, events = remote(stream, simulation, workers=2, batch=16, end=3, window=1 << 14)
    for step in range(3):
        rows.rows(np.arange(step * 16, (step + 1) * 16, dtype=np.int64))
    assert not events


def test_without_any_worker_the_rank_waits_then_helps_itself_and_goes_back(stream: Stream) -> None:
    faults = [Fault(5.0, number, "dies", 100.0) for number in range(2)]
    simulation = Simulation(stream, 2, faults)
    rows, events = remote(stream, simulation, workers=2, batch=16, end=60, window=1)
    for step in range(60):
        numbers = np.arange(step * 16, (step + 1) * 16, dtype=np.int64)
        before = simulation.time
        assert same(rows.rows(numbers), stream.rows(numbers))
        if simulation.time - before > 1.0:
            assert 5.0 + PATIENCE <= simulation.time <= 5.0 + PATIENCE + 5.0, "the one wait"
        simulation.time += 3.0
    kinds = [kind for kind, _ in events if kind in ("fallback", "data_workers_back")]
    assert kinds == ["fallback", "data_workers_back"], "once a spell, not once a step"
    assert rows.served[0] > 0
    assert rows.served.keys() > {0}


def test_a_wait_for_rows_that_nobody_wants_any_more_ends(stream: Stream) -> None:
    simulation = Simulation(stream, 1, [Fault(0.0, 0, "dies", 1e9)])
    rows, events = remote(stream, simulation, workers=1, batch=16, end=3, window=1 << 14)
    wait = simulation.wait

    def wait_a_while(calls: Sequence[Any], timeout: float) -> Sequence[int]:
        if simulation.time > 5.0:
            rows.cancel()
        return wait(calls, timeout)

    simulation.wait = wait_a_while  # type: ignore[method-assign]
    with pytest.raises(Cancelled):
        rows.rows(np.arange(16, dtype=np.int64))
    assert not events
