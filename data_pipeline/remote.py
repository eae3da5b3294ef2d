"""Rows from data workers: a rank's requests, several in flight, asked again elsewhere when one gets no answer.

Whatever happens to workers changes when rows arrive, never which: a request names row numbers, and any worker
answers any request with the same bytes.

    request -> sent to the worker that owns the rows' lanes
            -> answered: the rows are copied to their places
            -> its worker died, or holds still: sent to another, or unsent until there is one
            -> none can be asked for `patience_seconds`: this process builds the rows of the step by itself
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.cluster import Worker, WorkerFailed, WorkerLost
from data_pipeline.config import WorkersConfig
from data_pipeline.rows import RowBatch
from data_pipeline.stream import Stream, empty_batch
from data_pipeline.worker import Reply, error_of

REPLY_BYTES: Final = 2 << 20
"""Size of a reply that is aimed at: at 1-4 MiB a call costs a few per cent of its rows (measured: 0.08 ms a MiB)."""
MAX_REPLY_BYTES: Final = 4 << 20

PROBE_SECONDS: Final = 1.5
"""A worker that owes an answer and was not heard for so long is pinged: it may be busy, or hold still."""
PING_SECONDS: Final = 1.0
"""A worker that does not answer a ping for so long holds still: its requests go to others. Together under 3 s."""
SLOW_SECONDS: Final = 30.0
"""A worker that answers pings but owes rows for so long (a disk that hangs): another one is asked as well."""
SHUNNED_SECONDS: Final = 30.0
"""A worker that could not build rows, or was slow, is asked again after so long."""
HURRY_SECONDS: Final = 1.0
TURN_SECONDS: Final = 0.1
START_SECONDS: Final = 3.0
"""At the start a worker's rows wait so long for it after the first worker is there: they begin at about one time."""

OnEvent = Callable[..., None]


class Workers(Protocol):
    """The data workers as a rank sees them; `cluster.WorkerDirectory` in production."""

    def living(self) -> Mapping[int, Worker]:
        """The living worker of each number."""

    def lose(self, worker: Worker, *, gone: bool) -> None:
        """That worker is not heard any more: look for its next life, or for the same one where it is not gone."""

    def send(self, worker: Worker, numbers: NDArray[np.int64]) -> Any:
        """Call for rows; WorkerLost where it is known to be gone."""

    def ping(self, worker: Worker) -> Any:
        """Call that a living worker answers at once."""

    def wait(self, calls: Sequence[Any], timeout: float) -> Sequence[Any]:
        """Calls that have ended, after at most `timeout` seconds."""

    def result(self, call: Any) -> Reply | None:
        """What an ended call gave; WorkerLost where nothing will come, WorkerFailed where the worker failed."""

    def now(self) -> float:
        """Monotonic seconds."""

    def close(self) -> None:
        """No more calls."""


class Cancelled(Exception):
    """Nobody wants the rows any more."""


@dataclass(eq=False)
class _Step:
    """The rows of one step, as they arrive."""

    batch: RowBatch
    missing: int
    """Requests that have rows of it and are not answered."""


@dataclass(eq=False)
class _Request:
    """Rows of one or several steps that one worker builds."""

    numbers: NDArray[np.int64]
    places: list[tuple[_Step, NDArray[np.int64], slice]]
    """Step, positions in it, and where these rows lie in the request."""
    owner: int
    worker: Worker | None = None
    sent: float = 0.0


class RemoteRows:
    """The rows of consecutive steps, from data workers; a source for `Loader`.

    Args:
        workers: the workers.
        stream: the same stream here: tells who owns which row, and builds rows where no worker is left.
        config: how many workers there should be, how much is asked for ahead, and how long a step waits while no
            worker can be asked.
        rows_of: numbers of this rank's rows of a step.
        steps: the steps that will be asked for, in order.
        hurry: where it says so, a step waits no longer than HURRY_SECONDS: the rank was asked to leave.
        on_event: told of `data_reissued`, `data_refused`, `fallback` and `data_workers_back`.
    """

    def __init__(
        self,
        workers: Workers,
        stream: Stream,
        config: WorkersConfig,
        *,
        rows_of: Callable[[int], NDArray[np.int64]],
        steps: range,
        on_event: OnEvent,
        hurry: Callable[[], bool] = lambda: False,
    ) -> None:
        self._workers, self._stream, self._count = workers, stream, config.count
        self._rows_of, self._on_event, self._patience = rows_of, on_event, config.patience_seconds
        self._row_bytes = 12 * stream.sequence_tokens
        self._steps: dict[int, _Step] = {}
        self._requests: list[_Request] = []
        self._calls: dict[Any, tuple[Worker, _Request | None]] = {}
        self._probes: dict[Worker, float] = {}
        self._shunned: dict[Worker, float] = {}
        """Workers that get no requests, and until when; a frozen one until it is heard."""
        self._heard: dict[Worker, float] = {}
        self._planned, self._end = steps.start, steps.stop
        self._chunk_steps = 1
        self._window, self._window_bytes = 0, config.window_bytes
        self._met: set[int] = set()
        self._first_met: float | None = None
        self._waiting_since = 0.0
        self._hurry = hurry
        self._alone = False
        self._cancelled = Event()
        self.reissued = 0
        """Requests that were sent again."""
        self.lost = 0
        """Workers that were lost."""
        self.served: dict[int, int] = {}
        """Rows by the process that built them; 0 stands for this one."""
        self._asked = steps.start

    def rows(self, numbers: NDArray[np.int64], /) -> RowBatch:
        """The rows of the next step; waits for them.

        Raises:
            DataError: neither a worker nor this process can build them.
        """
        step = self._asked
        self._plan(step)
        wanted = self._steps[step]
        assert np.array_equal(wanted.batch.row_ids, numbers), f"step {step} was announced with other rows"
        self._waiting_since = self._workers.now()
        while wanted.missing:
            if self._cancelled.is_set():
                raise Cancelled(f"the rows of step {step} are not wanted any more")
            self._turn(wanted)
        del self._steps[step]
        self._window -= len(numbers) * self._row_bytes
        self._asked += 1
        self._plan(self._asked)
        self._dispatch()
        return wanted.batch

    def cancel(self) -> None:
        """Ends the wait for rows, if there is one, in whatever thread: it raises Cancelled."""
        self._cancelled.set()

    def close(self) -> None:
        """Says who served what, and ends the search for workers."""
        rows = {str(pid): count for pid, count in sorted(self.served.items()) if pid}
        self._on_event("data_served", rows_by_pid=rows, rows_inline=self.served.get(0, 0), reissued=self.reissued)
        self._workers.close()

    # --- requests ------------------------------------------------------------------------------------------

    def _plan(self, needed: int) -> None:
        """Turns the coming steps into requests: whole chunks while they fit the window, and what is needed now."""
        while self._planned < self._end and (self._planned <= needed or self._window < self._window_bytes):
            steps = range(self._planned, min(self._planned + self._chunk_steps, self._end))
            rows = 0
            pending: list[tuple[int, _Step, NDArray[np.int64]]] = []
            for number in steps:
                row_ids = self._rows_of(number)
                step = self._steps[number] = _Step(empty_batch(row_ids, self._stream.sequence_tokens), 0)
                owners = self._owners(row_ids)
                pending += [(int(k), step, np.flatnonzero(owners == k)) for k in np.unique(owners)]
                rows += len(row_ids)
            self._planned = steps.stop
            self._window += rows * self._row_bytes
            for owner in sorted({owner for owner, _, _ in pending}):
                self._requests += self._pack(owner, [(step, at) for k, step, at in pending if k == owner])
            # The first rows come quickly, later ones in large replies.
            involved = max(1, len({owner for owner, _, _ in pending}))
            fitting = max(
                1, min(REPLY_BYTES * involved, self._window_bytes // 2) * len(steps) // max(1, rows * self._row_bytes)
            )
            self._chunk_steps = min(2 * self._chunk_steps, fitting)

    def _owners(self, row_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Worker number of each row. A worker owns lanes, so that each block is read by one worker of the cluster."""
        return self._stream.lanes_of(row_ids) % self._count

    def _pack(self, owner: int, parts: list[tuple[_Step, NDArray[np.int64]]]) -> Iterator[_Request]:
        """Requests of at most MAX_REPLY_BYTES for one worker's rows of some steps."""
        limit = max(1, MAX_REPLY_BYTES // self._row_bytes)
        places: list[tuple[_Step, NDArray[np.int64], slice]] = []
        size = 0
        for step, at in parts:
            for first in range(0, len(at), limit):
                piece = at[first : first + limit]
                if size + len(piece) > limit:
                    yield _request(owner, places)
                    places, size = [], 0
                places.append((step, piece, slice(size, size + len(piece))))
                size += len(piece)
        if places:
            yield _request(owner, places)

    def _dispatch(self) -> None:
        """Sends what is unsent to living workers: to its owner, or the next one that can."""
        living = self._workers.living()
        now = self._workers.now()
        self._met |= living.keys()
        if self._met and self._first_met is None:
            self._first_met = now
        all_met = self._first_met is not None and now - self._first_met > START_SECONDS
        for request in [request for request in self._requests if request.worker is None]:
            others = self._count if all_met or request.owner in self._met else 1
            for shift in range(others):
                worker = living.get((request.owner + shift) % self._count)
                if worker is None or self._is_shunned(worker):
                    continue
                try:
                    call = self._workers.send(worker, request.numbers)
                except WorkerLost:
                    continue
                request.worker, request.sent = worker, now
                self._calls[call] = (worker, request)
                break

    # --- answers -------------------------------------------------------------------------------------------

    def _turn(self, wanted: _Step) -> None:
        """One look at all calls, at the clock, and at who is left."""
        self._dispatch()
        for call in self._workers.wait(list(self._calls), TURN_SECONDS):
            entry = self._calls.pop(call, None)  # None: its worker was lost at this same look
            if entry is not None:
                self._take(call, *entry)
        self._judge_time()
        self._help_oneself(wanted)

    def _take(self, call: Any, worker: Worker, request: _Request | None) -> None:
        self._heard[worker] = self._workers.now()
        try:
            reply = self._workers.result(call)
        except WorkerLost as error:
            self._lose(worker, str(error), gone=error.gone)
            return
        except WorkerFailed as error:
            self._refused(worker, str(error))
            return
        if self._shunned.get(worker) == math.inf:
            del self._shunned[worker]
        if request is None:
            self._probes.pop(worker, None)
            return
        assert reply is not None, "a request for rows is answered with a Reply"
        if reply.error is not None:
            self._refused(worker, str(error_of(reply.error)))
        elif request in self._requests:
            self._shunned.pop(worker, None)
            if self._alone:
                self._alone = False
                self._on_event("data_workers_back", workers=len(self._workers.living()))
            self._place(request, reply.rows(request.numbers), reply.pid)

    def _refused(self, worker: Worker, reason: str) -> None:
        """A worker that cannot build rows: others are asked for a while, all that it has included."""
        if not self._is_shunned(worker):
            self._on_event("data_refused", worker=worker.number, reason=reason)
        self._shunned[worker] = self._workers.now() + SHUNNED_SECONDS
        self._again([request for request in self._requests if request.worker == worker], worker, "refused")

    def _is_shunned(self, worker: Worker) -> bool:
        return self._workers.now() < self._shunned.get(worker, -math.inf)

    def _place(self, request: _Request, rows: RowBatch, pid: int) -> None:
        """Copies rows to their steps: the reply's memory is free for the next one at once."""
        self._requests.remove(request)
        for step, at, here in request.places:
            step.batch.input_ids[at] = rows.input_ids[here]
            step.batch.labels[at] = rows.labels[here]
            step.batch.document_ids[at] = rows.document_ids[here]
            step.missing -= 1
        self.served[pid] = self.served.get(pid, 0) + len(request.numbers)

    # --- faults --------------------------------------------------------------------------------------------

    def _lose(self, worker: Worker, reason: str, *, gone: bool) -> None:
        self.lost += 1
        self._workers.lose(worker, gone=gone)
        self._probes.pop(worker, None)
        self._shunned.pop(worker, None)
        self._heard.pop(worker, None)
        self._calls = {call: entry for call, entry in self._calls.items() if entry[0] != worker}
        self._again([request for request in self._requests if request.worker == worker], worker, "died", reason)

    def _again(self, requests: list[_Request], worker: Worker, cause: str, reason: str = "") -> None:
        """Takes requests back from a worker; they are sent at the next look."""
        if not requests:
            return
        # What the step has waited: while there are rows enough, nobody looks at the calls.
        since = max(self._waiting_since, min(request.sent for request in requests))
        waited = self._workers.now() - since
        for request in requests:
            request.worker = None
        self.reissued += len(requests)
        self._on_event(
            "data_reissued",
            worker=worker.number,
            cause=cause,
            requests=len(requests),
            rows=sum(len(request.numbers) for request in requests),
            waited_seconds=round(waited, 3),
            **({"reason": reason} if reason else {}),
        )
        self._dispatch()

    def _judge_time(self) -> None:
        now = self._workers.now()
        for worker in {request.worker for request in self._requests if request.worker is not None}:
            mine = [request for request in self._requests if request.worker == worker]
            late = [request for request in mine if now - request.sent > SLOW_SECONDS]
            quiet = now - max(self._heard.get(worker, -math.inf), min(request.sent for request in mine))
            asked = self._probes.get(worker)
            if asked is not None and now - asked > PING_SECONDS:
                self._shunned[worker] = math.inf
                self._again(mine, worker, "frozen")
            elif late and self._others(worker):
                self._shunned[worker] = now + SHUNNED_SECONDS
                self._again(late, worker, "slow")  # its answer counts as well, if it comes first
            elif asked is None and quiet > PROBE_SECONDS:
                self._probe(worker, now)

    def _others(self, worker: Worker) -> bool:
        """Whether another worker than that one can be asked."""
        return any(other != worker and not self._is_shunned(other) for other in self._workers.living().values())

    def _probe(self, worker: Worker, now: float) -> None:
        try:
            call = self._workers.ping(worker)
        except WorkerLost as error:
            self._lose(worker, str(error), gone=error.gone)
            return
        self._probes[worker] = now
        self._calls[call] = (worker, None)

    def _help_oneself(self, wanted: _Step) -> None:
        """Builds the rows that are needed now where no worker has given them for too long."""
        living = list(self._workers.living().values())
        able = [worker for worker in living if not self._is_shunned(worker)]
        unable = [worker for worker in living if self._is_shunned(worker) and self._shunned[worker] < math.inf]
        # Workers that live but give no rows get their time as well, before they are given up.
        limit = self._patience + (SLOW_SECONDS if able else 0.0)
        if self._alone or len(unable) == self._count:
            limit = PROBE_SECONDS if able else 0.0
        if self._hurry():
            limit = min(limit, HURRY_SECONDS)
        if self._workers.now() - self._waiting_since < limit:
            return
        if not self._alone:
            self._alone = True
            reason = f"{len(living)} of {self._count} data workers live, {len(able)} of them can be asked"
            self._on_event("fallback", what="Ray data workers", to="inline", reason=reason)
        for request in [r for r in self._requests if any(step is wanted for step, _, _ in r.places)]:
            self._place(request, self._stream.rows(request.numbers), 0)


def _request(owner: int, places: list[tuple[_Step, NDArray[np.int64], slice]]) -> _Request:
    numbers = np.concatenate([step.batch.row_ids[at] for step, at, _ in places])
    for step, _, _ in places:
        step.missing += 1
    return _Request(numbers, places, owner)
