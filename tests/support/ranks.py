"""Runs a function on several live gloo ranks of this machine: `run_ranks(function, world, *args)`.

The processes of a world are started once and used again by every test: importing torch and DeepSpeed costs
some seconds a process. They meet through a file, so no port is chosen. The first failure ends them all (a
collective that one rank has left cannot be finished), and the next call starts a fresh pool.
"""

from __future__ import annotations

import atexit
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.support.processes import Program, wait_for
from tests.support.rank_worker import Failure, Request

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 240.0  # importing torch and DeepSpeed takes 6 s alone, a minute on a crowded machine
FOLLOW_SECONDS = 1.0  # after the first failure, for the other ranks to tell theirs
STACKS_SECONDS = 5.0
MAX_PROCESSES = 8  # about 0.4 GiB each
OUTPUT_CHARACTERS = 6000


class RankFailure(AssertionError):
    """A rank raised, died or hung. `rank` is the first cause; `failures` has every rank that told one."""

    def __init__(self, message: str, *, rank: int, failures: dict[int, Failure]) -> None:
        super().__init__(message)
        self.rank = rank
        self.failures = failures


class RankTimeout(RankFailure):
    """The deadline passed: the message holds all ranks' stacks, `rank` is the first without an answer."""


class RankPool:
    """The live processes of one world size. Use `run_ranks`, which keeps and replaces pools."""

    def __init__(self, world: int) -> None:
        main = threading.current_thread() is threading.main_thread()
        assert main, "ranks die with the thread that starts them, so that must be the main one"
        self.world = world
        self.folder = Path(tempfile.mkdtemp(prefix="solomonov-ranks-"))
        self.programs: list[Program] = []
        self.channels: list[Connection] = []
        try:
            for rank in range(world):
                self._start(rank)
            self._collect(START_SECONDS, [0] * world, decode=False)
        except BaseException:
            self.close(kill=True)
            raise

    @property
    def pids(self) -> list[int]:
        """Process ids by rank."""
        return [program.pid for program in self.programs]

    def run(self, request: bytes, timeout: float) -> list[Any]:
        """Sends one pickled request to all ranks; their values by rank. After an error, close the pool."""
        starts = [program.log.stat().st_size for program in self.programs]
        for channel in self.channels:
            try:
                channel.send_bytes(request)
            except BrokenPipeError:  # a rank died while idle; its channel reports it below
                continue
        return self._collect(timeout, starts, decode=True)

    def close(self, *, kill: bool = False) -> None:
        """Ends all ranks: idle ones leave by themselves (and write their coverage), others are killed."""
        for channel in self.channels:
            channel.close()
        end = time.monotonic() + (0.0 if kill else 15.0)
        for program in self.programs:
            while program.running and time.monotonic() < end:
                time.sleep(0.01)
            program.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, rank: int) -> None:
        ours, theirs = Pipe()
        environment = {
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_WORLD_SIZE": str(self.world),
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
        }
        argv = [sys.executable, "-m", "tests.support.rank_worker", "--channel", str(theirs.fileno())]
        argv += ["--parent", str(os.getpid()), "--rendezvous", str(self.folder / "rendezvous")]
        argv += ["--stacks", str(self._stacks_file(rank))]
        log = self.folder / f"rank-{rank}.log"
        self.programs.append(Program(argv, log=log, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()]))
        self.channels.append(ours)
        theirs.close()

    def _stacks_file(self, rank: int) -> Path:
        return self.folder / f"stacks-{rank}.txt"

    def _collect(self, timeout: float, starts: list[int], *, decode: bool) -> list[Any]:
        """One answer a rank; raises at the first failure or the deadline."""
        values: dict[int, Any] = {}
        failures: dict[int, Failure] = {}
        end = time.monotonic() + timeout
        pending = dict(enumerate(self.channels))
        while pending and time.monotonic() < end:
            ready = wait(list(pending.values()), timeout=end - time.monotonic())
            for rank in [rank for rank, channel in pending.items() if channel in ready]:
                ok, value = self._receive(rank, decode)
                del pending[rank]
                if ok:
                    values[rank] = value
                else:
                    failures[rank] = value
                    end = min(end, time.monotonic() + FOLLOW_SECONDS)
        if failures:
            self._fail(failures, starts)
        if pending:
            self._time_out(sorted(pending), timeout, starts)
        return [values[rank] for rank in range(self.world)]

    def _receive(self, rank: int, decode: bool) -> tuple[bool, Any]:
        try:
            reply = self.channels[rank].recv_bytes()
        except (EOFError, ConnectionResetError):
            code = self.programs[rank].process.wait(timeout=10)
            return False, Failure("RankDied", f"the process ended with {code}", "")
        return pickle.loads(reply) if decode else (True, None)

    def _output(self, rank: int, start: int) -> str:
        text = self.programs[rank].log.read_bytes()[start:].decode(errors="replace")
        return f"--- output of rank {rank}\n{text[-OUTPUT_CHARACTERS:]}" if text else ""

    def _fail(self, failures: dict[int, Failure], starts: list[int]) -> None:
        died = [rank for rank, failure in failures.items() if failure.kind == "RankDied"]
        first = (died or list(failures))[0]
        parts = [f"rank {first} of {self.world}: {failures[first].kind}: {failures[first].message}"]
        for rank, failure in failures.items():
            parts.append(f"--- rank {rank}: {failure.kind}: {failure.message}\n{failure.trace}")
        parts += [self._output(rank, start) for rank, start in enumerate(starts)]
        raise RankFailure("\n".join(filter(None, parts)), rank=first, failures=failures)

    def _time_out(self, pending: list[int], timeout: float, starts: list[int]) -> None:
        parts = [f"ranks {pending} of {self.world} gave no answer within {timeout:g} s"]
        for program in self.programs:
            program.send(signal.SIGQUIT)
        for rank in range(self.world):
            parts.append(f"--- stacks of rank {rank}\n{self._stacks(rank)}")
        parts += [self._output(rank, start) for rank, start in enumerate(starts)]
        raise RankTimeout("\n".join(filter(None, parts)), rank=pending[0], failures={})

    def _stacks(self, rank: int) -> str:
        """What faulthandler wrote for one rank, once the file has stopped growing."""
        sizes = [-1] * 5

        def complete() -> bool:
            sizes.append(self._stacks_file(rank).stat().st_size)
            return sizes[-1] > 0 and len(set(sizes[-5:])) == 1

        try:
            wait_for(complete, deadline=STACKS_SECONDS, what=f"stacks of rank {rank}")
        except TimeoutError:
            return f"(none within {STACKS_SECONDS:g} s)"
        return self._stacks_file(rank).read_text(errors="replace")


_POOLS: dict[int, RankPool] = {}  # in order of use, the latest last


def run_ranks(function: Callable[..., Any], world: int, *args: Any, timeout: float = 60.0, **kwargs: Any) -> list[Any]:
    """Calls `function(*args, **kwargs)` on each of `world` ranks and returns their values by rank.

    Args:
        function: module-level; each rank imports it by name. In it `torch.distributed` is initialised (gloo,
            CPU) and RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE are set; torch's seed is 0.
        world: number of ranks; processes are kept for the next call with the same number.
        timeout: seconds for the call, the start of a pool not counted.

    Raises:
        RankFailure: a rank raised or died: rank, remote traceback and the output of all ranks.
        RankTimeout: a rank did not answer in time: the stacks of all ranks.
    """
    assert "<locals>" not in function.__qualname__, f"{function.__qualname__} is not at module level"
    request = pickle.dumps(Request(function.__module__, function.__qualname__, args, kwargs))
    pool = _POOLS.pop(world, None) or _make_pool(world)
    try:
        values = pool.run(request, timeout)
    except BaseException:  # Ctrl-C and pytest's own time limit too
        pool.close(kill=True)
        raise
    _POOLS[world] = pool  # only a pool that answered is kept
    return values


def pool_pids(world: int) -> list[int]:
    """The process ids of the kept pool of this world, by rank; empty when there is none."""
    return _POOLS[world].pids if world in _POOLS else []


def close_pools() -> None:
    """Ends all ranks that are kept for reuse."""
    while _POOLS:
        _POOLS.popitem()[1].close()


def _make_pool(world: int) -> RankPool:
    while _POOLS and sum(_POOLS) + world > MAX_PROCESSES:
        _POOLS.pop(next(iter(_POOLS))).close()
    return RankPool(world)


atexit.register(close_pools)
