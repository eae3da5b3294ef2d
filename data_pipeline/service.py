"""The data service of a run: starts its data workers on a Ray cluster, watches them, and replaces those that die.

`python -m data_pipeline serve RUN_DIR`, beside the ranks. It owns the workers: they end when it does, however it ends.
Each rank finds them by name; the service carries no rows. What happens is written to the run's journal.

    a worker that dies             is started again at once (0.7 s), on whatever node has room
    one that holds still for 3 s   is killed where it runs, then as above
    one that cannot read the data  while the workers start for the first time: the service leaves with the reason (78 or
                                   74); later, or where it may pass: it is ended, and tried again with a growing pause
    one that cannot even begin     three times while they start for the first time: likewise
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

from data_pipeline import cluster
from data_pipeline.cluster import OwnedWorker, Worker, WorkerLost
from data_pipeline.errors import DataConfigurationError, DataError
from data_pipeline.journal import Journal
from data_pipeline.spec import ServiceSpec
from data_pipeline.worker import error_of

LOOK_SECONDS: Final = 0.25
PING_EVERY_SECONDS: Final = 1.0
FROZEN_SECONDS: Final = 3.0
WAITING_SECONDS: Final = 20.0
"""A worker that has not begun by then may be waiting for room in the cluster: worth saying."""
LONG_LIFE_SECONDS: Final = 5.0
"""A worker that lived so long is started again at once, whatever happened before."""
BEGINNING_SECONDS: Final = 10.0
"""The workers start for the first time until all have begun, or for so long after the first one has: a cluster that is
short of room must not make of a fault in the middle of a run one of its beginning."""
CONDEMNED_SECONDS: Final = 10.0
"""A worker that its kill did not reach by then is given up, and another one takes its place."""
BEGINNINGS: Final = 3
PAUSE_SECONDS: Final = (0.5, 30.0)
"""First and longest pause before a worker that keeps dying is tried again."""

OnEvent = Callable[..., Any]


@dataclass(eq=False)
class _Place:
    """One worker number, over its lives."""

    number: int
    owned: OwnedWorker | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    """pid, started, host, node; empty until the worker has told."""
    since: float = 0.0
    """Start of this life; while there is none, when the next one is due."""
    ping: Any = None
    pinged: float = 0.0
    condemned: float | None = None
    """Since when its kill is under way."""
    incarnation: int = 0
    stillborn: int = 0
    """Lives in a row that ended before the worker had told anything."""
    told_waiting: bool = False
    pause: float = 0.0


class Service:
    """The data workers of one run.

    Args:
        spec: what is served, and where.
        on_event: told of `data_service_started`, `data_worker_started`, `data_worker_died`, `data_worker_frozen`,
            `data_worker_refused` and `data_workers_waiting`.
        first_start: a worker that cannot read the data ends the service.
    """

    def __init__(self, spec: ServiceSpec, on_event: OnEvent, *, first_start: bool) -> None:
        self._spec, self._on_event, self._first_start = spec, on_event, first_start
        self._values = spec.model_dump(mode="json")
        self._places = [_Place(number) for number in range(spec.workers)]
        self._first_begun: float | None = None
        self._errands: list[Any] = []
        self._announced = False

    def run(self, stop: threading.Event) -> None:
        """Keeps the workers alive until `stop` is set.

        Raises:
            DataError: at the first start, a worker cannot read the data.
        """
        while not stop.is_set():
            now = time.monotonic()
            for place in self._places:
                if place.owned is None and now >= place.since:
                    self._start(place, now)
            self._listen()
            self._judge(time.monotonic())
            if not self._announced and all(place.facts for place in self._places):
                self._announced = True
                self._on_event("data_service_started", namespace=self._spec.namespace, workers=self._describe())

    def _describe(self) -> list[dict[str, Any]]:
        return [{"worker": place.number, **_public(place.facts)} for place in self._places]

    def _start(self, place: _Place, now: float) -> None:
        # Milliseconds since 1970: larger than in any life before, also under an earlier service.
        place.incarnation = max(place.incarnation + 1, int(time.time() * 1000))
        place.owned = OwnedWorker(Worker(place.number, place.incarnation), self._values, self._spec.cpus)
        place.since, place.facts, place.ping, place.condemned, place.told_waiting = now, {}, None, None, False

    def _listen(self) -> None:
        """Hears what the workers have to say, for at most LOOK_SECONDS."""
        calls: dict[Any, tuple[_Place, str]] = {}
        for place in self._places:
            if place.owned is not None:
                calls[place.owned.life] = (place, "life")
                if not place.facts:
                    calls[place.owned.facts] = (place, "facts")
                if place.ping is not None:
                    calls[place.ping] = (place, "ping")
        # Deaths last: what a worker said before it died is heard before.
        done = cluster.wait_calls([*calls, *self._errands], LOOK_SECONDS)
        for call in sorted((call for call in done if call in calls), key=lambda call: calls[call][1] == "life"):
            self._hear(*calls[call], call)
        for call in [call for call in self._errands if call in done]:
            self._errands.remove(call)

    def _hear(self, place: _Place, what: str, call: Any) -> None:
        try:
            answer = cluster.result_of(call)
        except WorkerLost as error:
            if what == "life":
                self._buried(place, str(error))
            return
        if what == "ping":
            place.ping = None
        elif what == "facts":
            self._introduced(place, answer)

    def _introduced(self, place: _Place, facts: dict[str, Any]) -> None:
        if facts["error"] is None:
            place.facts, place.stillborn = facts, 0
            self._first_begun = self._first_begun or time.monotonic()
            namespace = self._spec.namespace
            self._on_event("data_worker_started", worker=place.number, namespace=namespace, **_public(facts))
            return
        error = error_of(facts["error"])
        if self._beginning and not facts["error"].get("passing"):
            raise error
        self._on_event("data_worker_refused", worker=place.number, **_public(facts), message=str(error))
        self._end(place)
        self._pause(place)

    @property
    def _beginning(self) -> bool:
        """The workers start for the first time: what is wrong is the user's to mend."""
        if not self._first_start or self._announced:
            return False
        return self._first_begun is None or time.monotonic() - self._first_begun < BEGINNING_SECONDS

    def _buried(self, place: _Place, cause: str) -> None:
        lived = time.monotonic() - place.since
        facts = _public(place.facts)
        self._on_event("data_worker_died", worker=place.number, **facts, cause=cause, seconds=round(lived, 1))
        place.stillborn += not place.facts
        if self._beginning and place.stillborn >= BEGINNINGS:
            raise DataConfigurationError(
                "A data worker ends before it has begun.",
                got=f"worker {place.number}, {place.stillborn} times; the last time: {cause}",
                rule="every node of the Ray cluster has this package, of the same version, and memory for a worker",
                remedy="install it there (see Ray's logs for more), or set data.workers.backend: inline",
            )
        self._end(place)  # a node that only lost touch may still run it
        if lived >= LONG_LIFE_SECONDS:
            place.pause, place.since = 0.0, time.monotonic()
        else:
            self._pause(place)

    def _end(self, place: _Place) -> None:
        if place.owned is not None:
            place.owned.end()
        place.owned, place.facts, place.ping = None, {}, None

    def _pause(self, place: _Place) -> None:
        place.since = time.monotonic() + place.pause
        place.pause = min(max(PAUSE_SECONDS[0], 2 * place.pause), PAUSE_SECONDS[1])

    def _judge(self, now: float) -> None:
        """Pings the workers; kills those that hold still, says which ones have not begun."""
        for place in self._places:
            if place.owned is None:
                continue
            if place.condemned is not None:
                if now - place.condemned > CONDEMNED_SECONDS:
                    self._buried(place, "frozen, and its kill did not reach it")
                continue
            if not place.facts:
                if now - place.since > WAITING_SECONDS and not place.told_waiting:
                    place.told_waiting = True
                    free, total = cluster.free_cpus()
                    self._on_event("data_workers_waiting", worker=place.number, cpus_free=free, cpus=total)
            elif place.ping is None:
                if now - place.pinged > PING_EVERY_SECONDS:
                    place.ping, place.pinged = place.owned.ping(), now
            elif now - place.pinged > FROZEN_SECONDS:
                place.condemned = now
                self._on_event("data_worker_frozen", worker=place.number, **_public(place.facts))
                facts = place.facts
                self._errands.append(cluster.kill_on_node(facts["node"], facts["pid"], facts["started"]))


def _public(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts of a worker for the journal."""
    return {f"worker_{key}": facts[key] for key in ("pid", "host", "node") if key in facts}


def serve(run_folder: Path) -> int:
    """Runs the data service of a run until SIGTERM; the body of `python -m data_pipeline serve RUN_DIR`.

    Returns:
        0 after SIGTERM; 78 or 74 where the data cannot be read; 1 where the cluster cannot be reached.
    """
    stop = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the supervisor, which then sends SIGTERM
    try:
        spec = ServiceSpec.load(run_folder)
        journal = Journal(run_folder / "journal.jsonl")
        begun = {event["namespace"] for event in journal.events("data_service_started", "data_worker_started")}
        cluster.join(spec.address, spec.namespace)
        try:
            Service(spec, journal.try_write, first_start=spec.namespace not in begun).run(stop)
        finally:
            cluster.leave()
    except DataError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except cluster.ClusterLost as error:
        print(f"error: the Ray cluster cannot be joined: {error}", file=sys.stderr, flush=True)
        return 1
    return 0
