"""The process that takes rows in `benchmarks.stream`: `python -m benchmarks.stream_rank CASE.json RESULT.json`.

It stands for a rank: a Loader over a Stream (inline), or over RemoteRows whose workers belong to a data service that
the benchmark has started. One process runs one task of one case.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.harness import busy_seconds, cpu_seconds, percentile
from data_pipeline.batches import BatchRows
from data_pipeline.cluster import WorkerDirectory, join
from data_pipeline.config import WorkersConfig
from data_pipeline.dataset import Dataset
from data_pipeline.journal import Journal
from data_pipeline.loader import Loader
from data_pipeline.remote import RemoteRows
from data_pipeline.rows import RowBatch
from data_pipeline.stream import Stream
from data_pipeline.worker import Reply

SEQUENCE_TOKENS: Final = 512
BATCH_ROWS: Final = 32
BATCHES: Final = BatchRows(BATCH_ROWS)
MICRO_ROWS: Final = 8
PREFETCH_STEPS: Final = 4
"""As `data.prefetch_steps` has it."""
PACKING: Final = "best_fit"
SEED: Final = 7
ENDLESS: Final = 1 << 40
"""A step that is not reached: the window of requests stays full to the end of a measurement, as in a long run."""
HARMLESS: Final = {"data_served"}
FAULT_SECONDS: Final = 60.0
"""A fault must be over by then: noticed, and its worker replaced."""
SETTLE_SECONDS: Final = 1.0


@dataclass(frozen=True)
class Case:
    """What one process does."""

    task: str
    """Name of a function in TASKS."""
    dataset: str
    cache_bytes: int
    workers: int = 0
    """Data workers; 0: inline."""
    address: str = ""
    """Head of the Ray, if there are workers."""
    namespace: str = ""
    service: str = ""
    """Folder of the data service."""
    started_ns: int = 0
    """Monotonic time just before this process was started."""
    warm_steps: int = 0
    steps: int = 0
    step_seconds: Sequence[float] = ()
    """hiding, faults: computing time of a step."""
    seconds: float = 0.0
    """hiding: how long each step time is measured."""
    call_seconds: float = 1.0
    """Time of one call of `Work`, as calibrated."""
    repeats: int = 0
    """faults: how often each."""

    def write(self, path: Path) -> None:
        """Writes it as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


class Work:
    """Numpy work of one thread that holds no interpreter lock, as a training step on the CPU: products of matrices."""

    SIZE: Final = 96

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._a, self._b = rng.random((2, self.SIZE, self.SIZE), dtype=np.float32)
        self._c = np.empty_like(self._a)

    def call(self, times: int) -> None:
        """Works."""
        for _ in range(times):
            np.matmul(self._a, self._b, out=self._c)

    def calibrate(self) -> float:
        """Seconds of one call: the best of many tries, on a machine that may be busy."""
        best = float("inf")
        for _ in range(1000):
            start = time.perf_counter()
            self.call(20)
            best = min(best, time.perf_counter() - start)
        return best / 20


class RecordingDirectory(WorkerDirectory):
    """Notes the sizes of the replies and the blocks that each worker has read."""

    def __init__(self, count: int) -> None:
        self.reply_bytes: list[int] = []
        self.blocks_read: dict[int, int] = {}
        super().__init__(count)

    def result(self, call: Any) -> Reply | None:
        """As WorkerDirectory."""
        reply = super().result(call)
        if reply is not None and reply.arrays is not None:
            self.reply_bytes.append(sum(array.nbytes for array in reply.arrays))
            self.blocks_read[reply.pid] = max(reply.blocks_read, self.blocks_read.get(reply.pid, 0))
        return reply


class Rows:
    """The rows of a case, and what befell them; a context manager."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.events: list[dict[str, Any]] = []
        self.laps = {"imports": self._since_start()}
        self.directory: RecordingDirectory | None = None
        self.remote: RemoteRows | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Rows:
        case = self.case
        dataset = self._stack.enter_context(Dataset.open(case.dataset))
        self.stream = Stream(
            dataset, sequence_tokens=SEQUENCE_TOKENS, packing=PACKING, seed=SEED, cache_bytes=case.cache_bytes
        )
        self.laps["stream"] = self._since_start()
        if case.workers:
            join(case.address, case.namespace)
            self.laps["joined"] = self._since_start()
            self.directory = RecordingDirectory(case.workers)
            self.remote = RemoteRows(
                self.directory,
                self.stream,
                WorkersConfig(backend="ray", count=case.workers),
                rows_of=Loader(self.stream, batches=BATCHES, micro_batch_rows=1, prefetch_steps=0).row_numbers,
                steps=range(ENDLESS),
                on_event=lambda kind, **fields: self.events.append({"event": kind, **fields}),
            )
            self._stack.callback(self.remote.close)
        self.loader = self._stack.enter_context(
            Loader(
                self.stream if self.remote is None else self.remote,
                batches=BATCHES,
                micro_batch_rows=MICRO_ROWS,
                prefetch_steps=PREFETCH_STEPS,
            )
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _since_start(self) -> float:
        return (time.monotonic_ns() - self.case.started_ns) / 1e9

    def first(self) -> list[RowBatch]:
        """The first step's micro-batches."""
        batches = next(self.loader)
        self.laps["first_row"] = self._since_start()
        return batches

    def blocks_read(self) -> int:
        """Blocks that were read from shards for this case so far, by whoever reads."""
        return self.stream.blocks_read if self.directory is None else sum(self.directory.blocks_read.values())

    def unexpected(self) -> list[dict[str, Any]]:
        """Events but for the farewell."""
        return [event for event in self.events if event["event"] not in HARMLESS]


class Services:
    """The journal of the data service: which process serves under which worker number now."""

    def __init__(self, case: Case) -> None:
        self._journal = Journal(Path(case.service) / "journal.jsonl")

    def pids(self) -> dict[int, int]:
        """Process of each worker number, the latest."""
        return {event["worker"]: event["worker_pid"] for event in self._journal.events("data_worker_started")}


def calibrate(case: Case) -> dict[str, Any]:
    """Seconds of one call of `Work`, in a process like the others: with one thread."""
    return {"call_seconds": Work().calibrate()}


def throughput(case: Case) -> dict[str, Any]:
    """Takes steps as fast as it can; wall and CPU time of the steps after a warm-up."""
    with Rows(case) as rows:
        digest = sum(batch.digest() for _ in range(case.warm_steps) for batch in next(rows.loader))
        workers = set(Services(case).pids().values()) if case.workers else set()
        replies_before = len(rows.directory.reply_bytes) if rows.directory else 0
        blocks_before, cpu_before = rows.blocks_read(), cpu_seconds(os.getppid())
        busy, start = busy_seconds(), time.perf_counter()
        taken = sum(len(batch) for _ in range(case.steps) for batch in next(rows.loader))
        seconds, busy = time.perf_counter() - start, busy_seconds() - busy
        cpu_after, blocks = cpu_seconds(os.getppid()), rows.blocks_read() - blocks_before
        replies = rows.directory.reply_bytes[replies_before:] if rows.directory else []
        digest += sum(batch.digest() for _ in range(case.warm_steps) for batch in next(rows.loader))
    assert workers <= cpu_after.keys(), f"workers {workers} do not run under this benchmark: {sorted(cpu_after)}"
    used = {pid: after - cpu_before.get(pid, 0.0) for pid, after in cpu_after.items()}
    rank = used.pop(os.getpid())
    working = sum(used.pop(pid) for pid in workers)
    return {
        "rows": taken,
        "seconds": seconds,
        "cpu_seconds": {"rank": rank, "workers": working, "ray": sum(used.values())},
        "others_share": max(0.0, busy - rank - working - sum(used.values())) / seconds / len(os.sched_getaffinity(0)),
        "reply_bytes": replies,
        "blocks_read": blocks,
        "digest": f"{digest % 2**64:016x}",
        "rows_inline": rows.remote.served.get(0, 0) if rows.remote else None,
        "unexpected": rows.unexpected(),
    }


def hiding(case: Case) -> dict[str, Any]:
    """Computes between steps; the longest steps first, so that each begins with what is built ahead."""
    work, measured = Work(), []
    with Rows(case) as rows:
        next(rows.loader)
        for seconds in sorted(case.step_seconds, reverse=True):
            calls = round(seconds / case.call_seconds)
            _consume(rows, work, calls, steps=max(10, min(case.warm_steps, round(1.0 / seconds))))
            waits, computed = _consume(rows, work, calls, steps=max(20, round(case.seconds / seconds)))
            measured.append(
                {
                    "step_seconds": seconds,
                    "steps": len(waits),
                    "wait_seconds_median": statistics.median(waits),
                    "wait_seconds_p99": percentile(waits, 0.99),
                    "wait_share": sum(waits) / (sum(waits) + sum(computed)),
                    "compute_seconds_median": statistics.median(computed),
                }
            )
    return {"step_times": measured[::-1], "unexpected": rows.unexpected()}


def _consume(rows: Rows, work: Work, calls: int, *, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of waiting and of computing, of each step."""
    waits, computed = [], []
    for _ in range(steps):
        start = time.perf_counter()
        next(rows.loader)
        got = time.perf_counter()
        work.call(calls)
        waits.append(got - start)
        computed.append(time.perf_counter() - got)
    return waits, computed


def first_row(case: Case) -> dict[str, Any]:
    """How long it takes from the start of the process to its first row, and to what lies between."""
    with Rows(case) as rows:
        digest = sum(batch.digest() for batch in rows.first())
    return {"seconds": rows.laps, "digest": f"{digest % 2**64:016x}", "unexpected": rows.unexpected()}


def faults(case: Case) -> dict[str, Any]:
    """Kills and stops workers while it takes steps."""
    work, suffered = Work(), []
    (step_seconds,) = case.step_seconds
    with Rows(case) as rows:
        calls = round(step_seconds / case.call_seconds)
        waits, _ = _consume(rows, work, calls, steps=case.warm_steps)
        for number in range(case.repeats):
            for name in ("SIGKILL", "SIGSTOP"):
                suffered.append(_suffer(rows, work, calls, name, worker=number % case.workers))
    return {
        "step_seconds": step_seconds,
        "wait_seconds_before": max(waits[len(waits) // 2 :]),
        "faults": suffered,
        "rows_inline": rows.remote.served.get(0, 0) if rows.remote else 0,
        "unexpected": [event for event in rows.unexpected() if event["event"] != "data_reissued"],
    }


def _suffer(rows: Rows, work: Work, calls: int, name: str, *, worker: int) -> dict[str, Any]:
    """One fault, until it was noticed, its worker has a successor, and a second has passed."""
    services = Services(rows.case)
    victim = services.pids()[worker]
    seen, longest, start = len(rows.events), 0.0, time.monotonic()
    os.kill(victim, signal.Signals[name])
    noticed = replaced = 0.0
    look = start
    while not (noticed and replaced) or time.monotonic() < max(noticed, replaced) + SETTLE_SECONDS:
        (wait,), _ = _consume(rows, work, calls, steps=1)
        longest, now = max(longest, wait), time.monotonic()
        assert now < start + FAULT_SECONDS, f"{name} to worker {worker}: noticed {noticed}, replaced {replaced}"
        if not noticed and any(event["event"] == "data_reissued" for event in rows.events[seen:]):
            noticed = now
        if now > look + 0.1:
            look = now
            replaced = replaced or (now if services.pids()[worker] != victim else 0.0)
    events = [event for event in rows.events[seen:] if event["event"] == "data_reissued"]
    return {
        "signal": name,
        "longest_wait_seconds": longest,
        "waited_seconds": max(event["waited_seconds"] for event in events),
        "causes": [event["cause"] for event in events],
        "requests": sum(event["requests"] for event in events),
        "replaced_after_seconds": replaced - start,
    }


TASKS: Final[dict[str, Callable[[Case], dict[str, Any]]]] = {
    task.__name__: task for task in (calibrate, throughput, hiding, first_row, faults)
}


def main(case_file: str, result_file: str) -> None:
    """Does what the case says and leaves, as a rank does, without a farewell to Ray."""
    case = Case(**json.loads(Path(case_file).read_bytes()))
    result = TASKS[case.task](case)
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
