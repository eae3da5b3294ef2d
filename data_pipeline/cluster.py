"""The one door to Ray: joining a cluster, starting and calling data workers, running tasks.

Nothing here starts a Ray; whoever calls gives the address of one that runs. Calls that ask the cluster's head
(names, nodes) may block for as long as the head is gone, calls of actors do not: so a rank asks the head only
from a thread of its own (`WorkerDirectory`).
"""

from __future__ import annotations

import ipaddress
import itertools
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataConfigurationError, DataError
from data_pipeline.worker import DataWorker, Reply

JOIN_SECONDS: Final = 60.0
"""A cluster that is there takes a rank within half a second."""

KNOCK_SECONDS: Final = 5.0
QUIET_SECONDS: Final = 30.0

_LOOK_SECONDS: Final = (0.1, 2.0)
"""First and last interval between two looks for a worker that is missing."""


class Worker(NamedTuple):
    """One life of one data worker."""

    number: int
    incarnation: int
    """Larger for a later life of the same number."""

    @property
    def name(self) -> str:
        """The actor's name; each life has its own, since Ray keeps a name's dead handle wherever it was known."""
        return f"rows-{self.number}-{self.incarnation}"

    @classmethod
    def of(cls, name: str) -> Worker | None:
        """The worker of an actor's name; None for actors that are not ours."""
        kind, _, rest = name.partition("-")
        number, _, incarnation = rest.partition("-")
        if kind != "rows" or not number.isdigit() or not incarnation.isdigit():
            return None
        return cls(int(number), int(incarnation))


class WorkerLost(Exception):
    """A call got no answer, because its worker, its node or its reply is gone; another worker can be asked.

    Args:
        message: what Ray says.
        gone: the worker has ended; else it may be heard again.
    """

    def __init__(self, message: str, *, gone: bool = True) -> None:
        super().__init__(message)
        self.gone = gone


class WorkerFailed(Exception):
    """A worker met an error that it has no answer for."""


class ClusterLost(Exception):
    """The cluster cannot be reached or answered with an error of its own."""


def join(address: str, namespace: str) -> None:
    """Joins the cluster at `address` (host:port of its head) as a driver, for this process.

    Ray must run on this machine as a node of that cluster.

    Raises:
        DataConfigurationError: Ray is not installed.
        ClusterLost: it cannot be reached or refuses us.
    """
    hook = sys.excepthook
    try:
        import ray
    except ImportError as error:
        raise DataConfigurationError(
            "Ray is not installed.",
            got=f"{error}",
            rule="data workers and preparation on Ray need it on every machine",
            remedy="pip install 'solomonov[ray]', or set data.workers.backend: inline and data.prepare.backend: local",
        ) from error
    # Ray's own would ask the head before it lets a crash be known, for as long as the head is gone.
    sys.excepthook = hook
    _knock(address)  # Ray itself would try for most of a minute
    failure: list[BaseException] = []

    def connect() -> None:
        try:
            ray.init(
                address=address,
                namespace=namespace,
                log_to_driver=False,
                logging_level="ERROR",
                _node_ip_address=_own_address(address),
            )
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            failure.append(error)

    # Not in the main thread: there Ray takes SIGTERM for itself.
    thread = threading.Thread(target=connect, name="join", daemon=True)
    thread.start()
    thread.join(JOIN_SECONDS)
    if thread.is_alive():
        raise ClusterLost(f"no answer from {address} within {JOIN_SECONDS:g} s")
    if failure:
        raise ClusterLost(f"{address}: {failure[0]}") from failure[0]
    if not ray.is_initialized():  # any later call would start a Ray of its own
        raise ClusterLost(f"{address}: Ray gave up with an error that it wrote to this process's log")


def _knock(address: str) -> None:
    """Raises ClusterLost where nobody listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ClusterLost(f"{address}: {error}") from error


def leave() -> None:
    """Leaves the cluster; actors of this driver end with it."""
    import ray

    ray.shutdown()


def _own_address(address: str) -> str | None:
    """Loopback clusters: this machine's node has the head's own address, which Ray would not guess."""
    host = address.rpartition(":")[0]
    try:
        return host if ipaddress.ip_address(host).is_loopback else None
    except ValueError:
        return None


def node_count() -> int:
    """Nodes of the cluster that are alive."""
    import ray

    return sum(bool(node["Alive"]) for node in ray.nodes())


def free_cpus() -> tuple[float, float]:
    """CPUs that nobody holds, and all CPUs, in the cluster."""
    import ray

    return float(ray.available_resources().get("CPU", 0.0)), float(ray.cluster_resources().get("CPU", 0.0))


class ActorWorker(DataWorker):
    """A data worker that knows which node it is on."""

    def check(self) -> dict[str, Any]:
        """Facts of this process, with the node's id."""
        import ray

        return {**super().check(), "node": ray.get_runtime_context().get_node_id()}


class OwnedWorker:
    """A data worker that this process started: its actor ends when this process does.

    Args:
        worker: which.
        spec: the service's specification as JSON values.
        cpus: CPUs that it asks the cluster for.
    """

    def __init__(self, worker: Worker, spec: Mapping[str, Any], cpus: float) -> None:
        import ray

        self.worker = worker
        # Rows are built by one thread: more would only share the interpreter's lock. The others answer pings while it
        # works, and hold the call that tells us of its death.
        groups = {"rows": 1, "control": 2}
        actor = ray.remote(concurrency_groups=groups, num_cpus=cpus, max_restarts=0)(ActorWorker)
        self._handle = actor.options(name=worker.name, scheduling_strategy="SPREAD").remote(dict(spec))
        self.facts = self._handle.check.options(concurrency_group="rows").remote()
        """Call: facts of the process, or why it cannot serve."""
        self.life = self._handle.stay.options(concurrency_group="control").remote()
        """Call that ends with the worker."""

    def ping(self) -> Any:
        """Call that a living worker answers at once."""
        return _ping(self._handle)

    def end(self) -> None:
        """Ends the actor, if it can still hear."""
        import ray

        ray.kill(self._handle)


def _ping(handle: Any) -> Any:
    return handle.ping.options(concurrency_group="control").remote()


def kill_process(pid: int, started: float) -> bool:
    """SIGKILL to the process of that number and start time, where this runs; False if it is gone."""
    import signal

    import psutil

    try:
        process = psutil.Process(pid)
        if abs(process.create_time() - started) > 1.0:
            return False
        os.kill(pid, signal.SIGKILL)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return False
    return True


def kill_on_node(node: str, pid: int, started: float) -> Any:
    """Call of `kill_process` on a node: a process that was stopped does not hear Ray's own kill."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    where = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    return ray.remote(kill_process).options(num_cpus=0, scheduling_strategy=where, max_retries=0).remote(pid, started)


def wait_calls(calls: Sequence[Any], timeout: float) -> list[Any]:
    """Those of the calls that have ended, after at most `timeout` seconds; their results are on this node then."""
    import ray

    if not calls:
        time.sleep(timeout)
        return []
    done, _ = ray.wait(list(calls), num_returns=1, timeout=timeout)
    if done and len(calls) > 1:
        # Those that came together are handled together.
        done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
    return list(done)


def result_of(call: Any) -> Any:
    """What a call that has ended gave.

    Raises:
        WorkerLost: its worker, its node or the reply is gone.
    """
    import ray

    try:
        return ray.get(call)
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as error:
        gone = isinstance(error, ray.exceptions.ActorDiedError)
        raise WorkerLost(f"{type(error).__name__}: {_gist(error)}", gone=gone) from error


def _gist(error: BaseException) -> str:
    """The first line of an error's text; of one that was raised on another process, the last one, which names it."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1] if any(line.startswith("Traceback ") or "creation task" in line for line in lines) else lines[0]


class WorkerDirectory:
    """The living data workers of this process's namespace, found by name, by a thread that asks while any is missing.

    A worker counts as living once it has answered a ping.

    Args:
        count: how many there should be.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._lock = threading.Lock()
        self._handles: dict[Worker, Any] = {}
        self._living: dict[int, Worker] = {}
        self._buried: dict[int, int] = {}
        self._missing = threading.Event()
        self._missing.set()
        self._closed = threading.Event()
        threading.Thread(target=self._look, name="data-workers", daemon=True).start()

    def living(self) -> dict[int, Worker]:
        """The newest living worker of each number."""
        with self._lock:
            return dict(self._living)

    def lose(self, worker: Worker, *, gone: bool) -> None:
        """That worker is not heard any more: look for its next life, or for the same one where it is not gone."""
        with self._lock:
            if gone:
                self._buried[worker.number] = max(self._buried.get(worker.number, 0), worker.incarnation)
            if self._living.get(worker.number) == worker:
                del self._living[worker.number]
            self._handles.pop(worker, None)
        self._missing.set()

    def send(self, worker: Worker, numbers: NDArray[np.int64]) -> Any:
        """Call for rows of a living worker."""
        with self._lock:
            handle = self._handles.get(worker)
        if handle is None:
            raise WorkerLost(f"{worker.name} was lost")
        return handle.rows.options(concurrency_group="rows").remote(numbers)

    def ping(self, worker: Worker) -> Any:
        """Call that a living worker answers at once."""
        with self._lock:
            handle = self._handles.get(worker)
        if handle is None:
            raise WorkerLost(f"{worker.name} was lost")
        return _ping(handle)

    def wait(self, calls: Sequence[Any], timeout: float) -> list[Any]:
        """See `wait_calls`."""
        return wait_calls(calls, timeout)

    def result(self, call: Any) -> Reply | None:
        """See `result_of`; WorkerFailed where the worker raised an error that it has no answer for."""
        import ray

        try:
            reply: Reply | None = result_of(call)
        except ray.exceptions.RayTaskError as error:
            raise WorkerFailed(_gist(error)) from error
        return reply

    def now(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    def close(self) -> None:
        """Ends the thread, or leaves it waiting for a head that does not answer."""
        self._closed.set()
        self._missing.set()

    def _look(self) -> None:
        pause = _LOOK_SECONDS[0]
        pings: dict[Worker, tuple[Any, Any]] = {}
        while not self._closed.is_set():
            self._missing.wait()
            found = self._greet(pings)
            with self._lock:
                if len(self._living) >= self._count:
                    self._missing.clear()
            pause = _LOOK_SECONDS[0] if found else min(2 * pause, _LOOK_SECONDS[1])
            self._closed.wait(pause)

    def _greet(self, pings: dict[Worker, tuple[Any, Any]]) -> bool:
        """Pings workers with new names; those that answered are living. True while something is under way."""
        import ray

        with self._lock:
            known, buried = dict(self._living), dict(self._buried)
        try:
            for worker in filter(None, map(Worker.of, ray.util.list_named_actors())):
                after = max(
                    buried.get(worker.number, -1), known[worker.number].incarnation if worker.number in known else -1
                )
                if worker.incarnation > after and worker not in pings:
                    handle = ray.get_actor(worker.name)
                    pings[worker] = (handle, _ping(handle))
        except (ValueError, ray.exceptions.RayError):
            return True  # it went between the list and the look, or the head is busy: look again
        for call in wait_calls([ping for _, ping in pings.values()], 0.05) if pings else []:
            worker = next(worker for worker, (_, ping) in pings.items() if ping == call)
            handle, _ = pings.pop(worker)
            try:
                result_of(call)
            except WorkerLost:
                continue
            with self._lock:
                self._handles[worker] = handle
                self._living[worker.number] = max(worker, self._living.get(worker.number, worker))
        return bool(pings)


def run_tasks(
    function: Callable[..., Any],
    calls: Iterator[tuple[Any, tuple[Any, ...]]],
    *,
    in_flight: int,
    on_quiet: Callable[[], None],
) -> Generator[tuple[Any, Any]]:
    """Runs `function` on the cluster for each (key, arguments); yields (key, result) as they end.

    A task whose node or process dies is run again, up to 3 times: it must be idempotent. Closing the generator ends
    the tasks that run: when it returns, none does, as far as the cluster answers within 10 s. `on_quiet` is called
    whenever none has ended for QUIET_SECONDS.

    Raises:
        DataError: a task's process died each time.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On the driver's own node, whose death is the driver's as well.
    here = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=False)
    gate = ray.remote(_Gate).options(num_cpus=0, scheduling_strategy=here).remote()
    options = {"num_cpus": 1, "max_retries": 3, "scheduling_strategy": "SPREAD", "name": function.__name__}
    task = ray.remote(_if_let_in).options(**options)
    numbers = itertools.count()
    running: dict[Any, tuple[int, Any]] = {}
    heard = time.monotonic()
    try:
        while True:
            while len(running) < in_flight and (entry := next(calls, None)) is not None:
                number = next(numbers)
                running[task.remote(gate, number, function, *entry[1])] = (number, entry[0])
            if not running:
                return
            if time.monotonic() - heard > QUIET_SECONDS:
                heard = time.monotonic()
                on_quiet()
            for call in wait_calls(list(running), 1.0):
                heard = time.monotonic()
                _, key = running.pop(call)
                try:
                    yield key, result_of(call)
                except WorkerLost as error:
                    raise DataError(
                        "A task of the preparation died on the cluster four times.",
                        got=f"{error}",
                        rule="a task ends when its work is done; a node that dies costs one try",
                        remedy="if memory ran out, set data.prepare.workers lower; then run the same command again: "
                        "finished tasks are kept",
                    ) from error
    finally:
        if running:
            _end(running, gate)
        ray.kill(gate)


def _end(running: Mapping[Any, tuple[int, Any]], gate: Any) -> None:
    """End the tasks that run, and begin none of those that wait, as far as the cluster answers within 10 s.

    Those that wait are not cancelled, but turned back at the gate: Ray 2.60 was once seen to abort the driver, after
    all had been cancelled, since one of them answered all the same (compare ray-project/ray issue 54260).
    """
    import ray

    try:
        begun = ray.get(gate.close.remote(), timeout=10.0)
    except ray.exceptions.RayError:
        return  # the tasks end some time after this driver has left
    for call, (number, _) in running.items():
        if number in begun:
            ray.cancel(call, force=True)
    ray.wait(list(running), num_returns=len(running), timeout=10.0)


class _Gate:
    """An actor that tasks ask before they begin; it knows which have."""

    def __init__(self) -> None:
        self._begun: set[int] = set()
        self._closed = False

    def let_in(self, number: int) -> bool:
        """Whether the task may begin."""
        if not self._closed:
            self._begun.add(number)
        return not self._closed

    def close(self) -> set[int]:
        """No task may begin any more; those that have."""
        self._closed = True
        return self._begun


def _if_let_in(gate: Any, number: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """A task: the function's result; None where the gate was closed before it could begin."""
    # Not by ray.get, which gives the task's CPU away while it waits.
    if not gate.let_in.remote(number).future().result():
        return None
    return function(*arguments)
