"""Idempotent tasks, and what runs them: this process, a pool of processes, or a Ray cluster.

A task is a function of its arguments that writes files atomically and returns a JSON result. The result is
recorded under `.work/done/` only after its files are durable; a task whose record and files are there is not
run again. So a preparation may be killed at any moment and started again, with any number of workers, here or
on a cluster. Records are written by this process alone.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from data_pipeline import cluster
from data_pipeline.errors import DamagedDataError, DataConfigurationError, DataError
from data_pipeline.files import NO_PERMISSION, NO_SPACE, write_bytes, write_json
from data_pipeline.manifest import digest_file
from data_pipeline.progress import Phase, Progress

WORK: Final = ".work"
_MARK: Final = f"{WORK}/cluster"
"""File by which a node of a cluster knows that it sees the folder that we write: it holds our namespace."""
_PR_SET_PDEATHSIG: Final = 1

Result = dict[str, Any]
"""What a task returns. `files`, where present, lists the records of the files that it wrote."""


@dataclass(frozen=True, slots=True)
class Task:
    """One unit of work.

    Attributes:
        name: file name of the task's record; unique in a preparation. Empty: never recorded, always run.
        function: a module-level function; called with `arguments` in a worker process.
        counted: whether a run of this task counts as redone work in the report.
    """

    name: str
    function: Callable[..., Result]
    arguments: dict[str, Any] = field(default_factory=dict)
    counted: bool = True


class Runner:
    """Runs tasks in up to `workers` processes, or in this process where that is 1, or on a cluster.

    Args:
        folder: the dataset folder; absolute.
        workers: how many tasks run at a time.
        progress: what shows them.
        address: host:port of the Ray cluster that runs them; it is joined for the first task. None: this machine.
    """

    def __init__(self, folder: Path, workers: int, progress: Progress, address: str | None = None) -> None:
        self.folder, self.workers, self.progress = folder, workers, progress
        self.redone = 0
        """Counted tasks that were run."""
        self._address = address
        self._namespace = ""
        """Ours on the cluster, once it is joined."""
        self._pool: ProcessPoolExecutor | None = None
        self._others = set(multiprocessing.active_children())

    @property
    def aside(self) -> Path:
        """Where unfinished files are."""
        return self.folder / WORK / "tmp"

    def run(self, phase: str, tasks: Sequence[Task]) -> list[Result]:
        """Runs the tasks that have no valid record; returns the results of all, in the order of `tasks`.

        Raises:
            DataError: what the first failing task raised, or a worker process died.
            OSError: a task could not read or write.
        """
        if not tasks:
            return []
        results = [self._recorded(task) for task in tasks]
        missing = [number for number, result in enumerate(results) if result is None]
        with self.progress.phase(phase, len(tasks)) as shown:
            for _ in range(len(tasks) - len(missing)):
                shown.advance()
            # Closed at once when anything is raised here, Ctrl-C too: that ends the tasks on a cluster.
            with closing(self._run([(number, tasks[number]) for number in missing], shown)) as ended:
                for number, result in ended:
                    results[number] = result
        done = [result for result in results if result is not None]
        assert len(done) == len(tasks), f"{len(tasks) - len(done)} tasks of {phase} gave no result"
        return done

    def _run(self, tasks: list[tuple[int, Task]], shown: Phase) -> Generator[tuple[int, Result]]:
        if self._address is not None:
            return self._run_on_cluster(tasks, shown, self._address)
        return self._run_here(tasks, shown) if self.workers == 1 else self._run_in_pool(tasks, shown)

    def _run_here(self, tasks: list[tuple[int, Task]], shown: Phase) -> Generator[tuple[int, Result]]:
        for number, task in tasks:
            yield number, self._finished(task, task.function(**task.arguments), shown)

    def _run_in_pool(self, tasks: list[tuple[int, Task]], shown: Phase) -> Generator[tuple[int, Result]]:
        queue = iter(tasks)
        running: dict[Future[_Outcome], tuple[int, Task]] = {}
        try:
            while True:
                # Two tasks a worker in flight: none waits, and a failure leaves little to finish.
                while len(running) < 2 * self.workers and (entry := next(queue, None)) is not None:
                    call = entry[1].function, entry[1].arguments
                    running[self._started_pool().submit(_execute, *call)] = entry
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    number, task = running.pop(future)
                    yield number, self._finished(task, future.result().unwrap(), shown)
        except BrokenProcessPool as error:
            raise DataError(
                "A worker process of the preparation died.",
                got=str(error),
                rule="workers end only when their work is done",
                remedy="if memory ran out, set data.prepare.workers lower; then run the same command again: "
                "finished tasks are kept",
            ) from error

    def _run_on_cluster(
        self, tasks: list[tuple[int, Task]], shown: Phase, address: str
    ) -> Generator[tuple[int, Result]]:
        if not tasks:
            return
        if not self._namespace:
            self._join(address)
        # Tasks without a record come before the folder is ours: they write nothing into it.
        mark = None
        if any(task.name for _, task in tasks):
            mark = (self.folder / _MARK, self._namespace)
            write_bytes(mark[0], self.aside, self._namespace.encode())
        calls = ((entry, (entry[1].function, entry[1].arguments, mark)) for entry in tasks)
        with closing(
            cluster.run_tasks(_execute_on_node, calls, in_flight=2 * self.workers, on_quiet=self._say_room)
        ) as ended:
            for (number, task), outcome in ended:
                yield number, self._finished(task, outcome.unwrap(), shown)

    def _join(self, address: str) -> None:
        namespace = f"prepare-{secrets.token_hex(8)}"
        try:
            cluster.join(address, namespace)
        except cluster.ClusterLost as error:
            raise DataError(
                "The Ray cluster that is to prepare the dataset cannot be joined.",
                got=str(error),
                rule="host:port of the head of a Ray that runs and that this machine is a node of",
                remedy="check the address and that Ray runs here, with the same token; or set "
                "data.prepare.backend: local. Finished tasks are kept",
            ) from error
        self._namespace = namespace
        if cluster.free_cpus()[1] < 1:
            self.progress.line(f"no node of the Ray cluster at {address} has a CPU: waiting for one")

    def _say_room(self) -> None:
        free, total = cluster.free_cpus()
        self.progress.line(f"no task has ended for a while; {free:g} of the cluster's {total:g} CPUs are free")

    def _finished(self, task: Task, result: Result, shown: Phase) -> Result:
        if task.name:
            write_json(self._record(task), self.aside, result)
        self.redone += task.counted
        shown.advance()
        return result

    def _record(self, task: Task) -> Path:
        return self.folder / WORK / "done" / f"{task.name}.json"

    def _recorded(self, task: Task) -> Result | None:
        """The result of an earlier run, if its files are still what it wrote."""
        if not task.name or not (record := self._record(task)).exists():
            return None
        result: Result = json.loads(record.read_bytes())
        for file in result.get("files", ()):
            path = self.folder / file["file"]
            if not path.is_file() or path.stat().st_size != file["size"]:
                return None
            # Files of the dataset lie where others may touch them; those under .work are ours alone.
            if not file["file"].startswith(WORK) and digest_file(path) != file["xxh3_128"]:
                return None
        return result

    def _started_pool(self) -> ProcessPoolExecutor:
        if self._pool is None:
            # spawn: a forked child of a process with threads (torch, rich) may hang.
            self._pool = ProcessPoolExecutor(
                self.workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(os.getpid(),),
            )
        return self._pool

    def __enter__(self) -> Runner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._namespace:
            cluster.leave()
        if self._pool is None:
            return
        if isinstance(error, Exception) or error is None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            return
        # Interrupted (Ctrl-C): leave now. What the workers have not renamed yet is nothing.
        for child in set(multiprocessing.active_children()) - self._others:
            child.kill()
        self._pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """A task's result or its failure, in a form that travels between processes."""

    result: Result | None = None
    damaged: bool = False
    message: dict[str, str] | None = None
    os_error: tuple[int, str, str] | None = None

    def unwrap(self) -> Result:
        if self.message is not None:
            kind = DamagedDataError if self.damaged else DataConfigurationError
            message = self.message
            raise kind(message["what"], got=message["got"], rule=message["rule"], remedy=message["remedy"]) from None
        if self.os_error is not None:
            raise OSError(*self.os_error)
        assert self.result is not None, "an outcome is a result or a failure"
        return self.result


def _execute(function: Callable[..., Result], arguments: dict[str, Any]) -> _Outcome:
    try:
        return _Outcome(result=function(**arguments))
    except (DataConfigurationError, DamagedDataError) as error:
        message = {"what": error.what, "got": error.got, "rule": error.rule, "remedy": error.remedy}
        return _Outcome(damaged=isinstance(error, DamagedDataError), message=message)
    except OSError as error:
        return _Outcome(os_error=(error.errno or 0, error.strerror or str(error), str(error.filename or "")))


def _execute_on_node(
    function: Callable[..., Result], arguments: dict[str, Any], mark: tuple[Path, str] | None
) -> _Outcome:
    """`_execute` on a node of a cluster: failures that may be this machine's name it.

    Args:
        function: the task.
        arguments: its arguments.
        mark: a file in the dataset folder and its content, for tasks that write there.
    """
    host = socket.gethostname()
    if mark is not None and (seen := _content(mark[0])) != mark[1]:
        # Not a matter of missing files alone: a task would make the folder, on a disk that nobody else sees.
        return _unseen(host, f"{mark[0]}: {'no such file' if seen is None else f'it belongs to {seen}'}")
    outcome = _execute(function, arguments)
    if outcome.os_error is None:
        return outcome
    number, text, name = outcome.os_error
    if number in NO_SPACE or number in NO_PERMISSION:
        return replace(outcome, os_error=(number, f"{text}, on node {host}", name))
    return _unseen(host, f"{name or 'a file'}: {text}")


def _content(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _unseen(host: str, got: str) -> _Outcome:
    return _Outcome(
        message={
            "what": f"Node {host} of the Ray cluster cannot use a file of the preparation.",
            "got": f"on {host}: {got}",
            "rule": "each node sees the inputs and data.folder on a disk that all share, under the same paths",
            "remedy": f"mount that disk on {host}, or take the node out of the cluster, or set "
            "data.prepare.backend: local; then run the same command again: finished tasks are kept",
        }
    )


def _start_worker(parent: int) -> None:
    """Ties a worker's life to its parent's, and leaves Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have died before the call above: then nobody would end this process.
    if os.getppid() != parent:
        os._exit(1)


@contextmanager
def work_lock(folder: Path) -> Iterator[None]:
    """Holds the dataset folder for this process; the kernel lets go when it ends, however it ends.

    Raises:
        DataConfigurationError: another process is preparing this folder.
    """
    import fcntl

    work = folder / WORK
    work.mkdir(parents=True, exist_ok=True)
    path = work / "lock"
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before us may have finished and removed .work since the file was opened.
            ours = path.exists() and os.fstat(lock.fileno()).st_ino == path.stat().st_ino
        except BlockingIOError:
            ours = False
        if not ours:
            raise DataConfigurationError(
                f"Another process is preparing {folder}.",
                got=f"{path} is locked",
                rule="one `prepare` at a time writes a dataset folder",
                remedy="wait for it to end and run the same command again, or set data.folder to another place",
            )
        yield
