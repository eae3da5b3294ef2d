"""The ranks of an attempt as one step (`srun`) of the Slurm allocation that this process runs in."""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from launcher.agent import beat_of, end_of, read_report
from launcher.child import Child, ChildCommand, start_child
from launcher.errors import LaunchConfigurationError
from launcher.exits import RankExit, order_of_death
from launcher.hang import Beat
from launcher.job import JobSpec

END_SECONDS = 30.0
"""What srun gets to leave after all of its tasks have ended: it asks the controller."""
REPORT_SECONDS = 1.0
"""From srun's word that a task has ended to the report of its agent, which comes another way; longer: there is none."""
MOST_TASKS = 1 << 20
"""A line that names more of them at once is none of srun's."""
TASKS_ENDED = re.compile(rb"^srun: error: \S+: tasks? ([0-9,-]+): .*\n", re.MULTILINE)
"""What srun writes of tasks that did not end well, whether or not their agents lived to report."""


def tasks_ended(text: bytes) -> list[int]:
    """Numbers of the tasks that ended by srun's log, as they come: `srun: error: node[1-2]: tasks 0-2,5: Killed`."""
    found: list[int] = []
    for listed in TASKS_ENDED.findall(text):
        for part in listed.decode().split(","):
            first, _, last = part.partition("-")
            if first.isdigit() and (last or first).isdigit() and int(last or first) - int(first) < MOST_TASKS:
                found += range(int(first), int(last or first) + 1)
    return found


@dataclass(frozen=True)
class Allocation:
    """The Slurm job that this process runs in."""

    job_id: str
    restart: int
    """How often it was requeued."""
    nodes: int
    node_list: str
    tasks_per_node: int | None = None
    """As asked of sbatch; None: nothing was."""
    array_job: str | None = None
    array_task: str | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Allocation | None:
        """Read Slurm's variables; None outside an allocation."""
        given = os.environ if environment is None else environment
        if "SLURM_JOB_ID" not in given or "SLURM_JOB_NODELIST" not in given:
            return None
        return cls(
            job_id=given["SLURM_JOB_ID"],
            restart=int(given.get("SLURM_RESTART_COUNT", "0")),  # unset at the first start
            nodes=int(given.get("SLURM_JOB_NUM_NODES", given.get("SLURM_NNODES", "1"))),
            node_list=given["SLURM_JOB_NODELIST"],
            tasks_per_node=int(given["SLURM_NTASKS_PER_NODE"]) if "SLURM_NTASKS_PER_NODE" in given else None,
            array_job=given.get("SLURM_ARRAY_JOB_ID"),
            array_task=given.get("SLURM_ARRAY_TASK_ID"),
        )

    @property
    def as_overrides(self) -> list[str]:
        """What it says of the launch section, as `key=value`."""
        tasks = [f"launch.ranks_per_node={self.tasks_per_node}"] if self.tasks_per_node is not None else []
        return [f"launch.nodes={self.nodes}", *tasks]

    @classmethod
    def require(cls) -> Allocation:
        """The same; LaunchConfigurationError outside an allocation."""
        found = cls.from_environment()
        if found is None:
            raise LaunchConfigurationError(
                "this process is not in a Slurm job",
                got=f"SLURM_JOB_ID={os.environ.get('SLURM_JOB_ID', '')!r}",
                rule="it is what slurm/train.sbatch starts",
                remedy="submit the run: solomonov submit CONFIG --on slurm",
            )
        return found

    @property
    def name(self) -> str:
        """What Slurm's commands call it. The id of one element of an array is that of the whole array."""
        return f"{self.array_job}_{self.array_task}" if self.array_job is not None else self.job_id


class SlurmGang:
    """Ranks that are tasks of one srun; see `launcher.gang.Gang` and `StartGang`.

    Beside each rank stands an agent (`launcher.agent`), whose reports come through srun's stdout.

    Args:
        allocation: the job that this process runs in.
        rank_script: `slurm/rank.sh`.
        srun_options: more options for srun.
    """

    def __init__(
        self,
        spec: JobSpec,
        folder: Path,
        *,
        attempt: int,
        master_port: int,
        wake_fd: int,
        allocation: Allocation,
        rank_script: Path,
        srun_options: Sequence[str] = (),
    ) -> None:
        self._folder = folder
        self._pids: dict[int, int] = {}
        self._hosts: dict[int, str] = {}
        self._beats: dict[int, Beat] = {}
        self.world_size = spec.world_size
        self.resize_reason: str | None = None
        self._living = set(range(spec.world_size))
        self._killed = self._srun_ended = False
        self._unread = b""
        self._gone: dict[int, float] = {}
        """When srun's word was seen that a task has ended."""
        log = folder / "srun.log"
        self._log_read = log.stat().st_size if log.exists() else 0
        """Bytes of srun's log that were looked at: whole lines. A job that was queued again may add to an old one."""
        self._started_at = time.monotonic()
        agent = [sys.executable, "-m", "launcher", "agent", str(folder), str(attempt)]
        command = [
            "srun",
            f"--nodes={spec.nodes}",
            f"--ntasks={spec.world_size}",
            f"--ntasks-per-node={spec.ranks}",
            "--distribution=block",
            "--kill-on-bad-exit=0",  # a rank that fails must not cut a save on another node: we decide
            "--wait=0",
            "--mpi=none",
            *srun_options,
            str(rank_script),
            *agent,
            *spec.command,
        ]
        environment = {**os.environ, **spec.environment, "MASTER_PORT": str(master_port)}
        self._output, writer = os.pipe()
        reader, self._orders = os.pipe()  # srun gives its stdin to every task
        os.set_blocking(self._output, False)
        try:
            self._srun: Child = start_child(
                ChildCommand(
                    command,
                    environment,
                    log,
                    spec.working_directory,
                    output_fd=writer,
                    input_fd=reader,
                )
            )
        except BaseException:
            os.close(self._output)
            os.close(self._orders)
            raise
        finally:
            os.close(writer)
            os.close(reader)
        self._selector = selectors.DefaultSelector()
        self._selector.register(wake_fd, selectors.EVENT_READ)
        self._selector.register(self._output, selectors.EVENT_READ)

    @property
    def pids(self) -> list[int]:
        """Empty: they are other machines' numbers."""
        return []

    @property
    def alive(self) -> bool:
        """See `Gang.alive`."""
        return bool(self._living)

    def wait(self, timeout: float | None, also: Sequence[int] = ()) -> list[RankExit]:
        """See `Gang.wait`."""
        for fd in also:
            self._selector.register(fd, selectors.EVENT_READ)
        # Nothing wakes us when srun writes into its log.
        self._selector.select(REPORT_SECONDS if timeout is None else min(timeout, REPORT_SECONDS))
        for fd in also:
            self._selector.unregister(fd)
        return order_of_death(self._read())

    def _read(self) -> list[RankExit]:
        """Take in what the agents have said; at the end of it, every rank has ended."""
        ends, over = [], False
        while True:
            try:
                data = os.read(self._output, 65536)
            except BlockingIOError:
                break
            if not data:
                over = True
                break
            self._unread += data
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            if (end := self._heard(line)) is not None:
                ends.append(end)
        if over:
            self._selector.unregister(self._output)
            if not self._pids and not self._srun_ended:
                return ends + self._never_began()
            return ends + [self._lost(rank) for rank in sorted(self._living)]
        self._read_log()
        late = time.monotonic() - REPORT_SECONDS
        return ends + [self._lost(rank) for rank, seen in self._gone.items() if rank in self._living and seen < late]

    def _never_began(self) -> list[RankExit]:
        """The ends of ranks that srun did not start: what it left with, and why is in its log."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._srun.exit_fd, selectors.EVENT_READ)
            selector.select(END_SECONDS)
        code, missing = self._srun.exit_code() or 1, sorted(self._living)
        self._living.clear()
        seconds = time.monotonic() - self._started_at
        return [RankExit(rank, 0, code, killed=self._killed, seconds=seconds) for rank in missing]

    def _lost(self, rank: int) -> RankExit:
        """The end of a rank whose agent did not live to tell: we ended the step, or it is gone with its machine."""
        self._living.discard(rank)
        beat = self._beats.pop(rank, None)
        return RankExit(
            rank,
            self._pids.get(rank, 0),
            -signal.SIGKILL,
            killed=self._srun_ended,
            lost=not self._srun_ended,
            seconds=time.monotonic() - self._started_at,
            step=beat.step if beat is not None else None,
            section=beat.section if beat is not None else None,
            host=self._hosts.get(rank),
        )

    def _read_log(self) -> None:
        """Take in what srun says of tasks: peers that wait for a lost one do not end by themselves."""
        with (self._folder / "srun.log").open("rb") as log:
            log.seek(self._log_read)
            text = log.read()
        text = text[: text.rfind(b"\n") + 1]
        self._log_read += len(text)
        for rank in tasks_ended(text):
            self._gone.setdefault(rank, time.monotonic())

    def _heard(self, line: bytes) -> RankExit | None:
        report = read_report(line)
        if report is None:
            with (self._folder / "srun.log").open("ab") as log:
                log.write(line + b"\n")
            return None
        kind, fields = report
        rank = fields["rank"]
        assert isinstance(rank, int), "an agent says which rank it stands beside"
        if kind == "started":
            self._pids[rank] = int(str(fields["pid"]))
            self._hosts[rank] = str(fields["host"])
        elif kind == "beat":
            self._beats[rank] = beat_of(fields, time.monotonic())
        elif kind == "ended":
            self._living.discard(rank)
            self._beats.pop(rank, None)
            return end_of(fields)
        return None

    def beats(self) -> dict[int, Beat]:
        """See `Gang.beats`: as the agents told."""
        return dict(self._beats)

    def terminate(self) -> None:
        """Order every rank to save and leave.

        Not by scancel: where the job was started anew after a lost node, the controller takes the end of the lost
        step for the end of this one, which has the same number, and signals nobody any more.
        """
        self._order("terminate")

    def dump_stacks(self) -> None:
        """Order the stacks of every rank."""
        self._order("stacks")

    def kill(self) -> None:
        """Order the end of every rank; where agents do not answer any more, srun ends their tasks."""
        self._order("kill")
        if self._killed or not self._pids:
            self._srun.send_signal(signal.SIGTERM)
            self._srun_ended = True
        self._killed = True

    def _order(self, order: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # srun has ended, which the reports tell
            os.write(self._orders, order.encode() + b"\n")

    def close(self) -> None:
        """End whatever is left, and wait until Slurm has it so: the next step needs its place."""
        if self._living:
            self.kill()
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._srun.exit_fd, selectors.EVENT_READ)
                if not selector.select(END_SECONDS):
                    self._srun.send_signal(signal.SIGTERM)
                    selector.select(END_SECONDS)
        finally:
            self._srun.reap()
            self._selector.close()
            os.close(self._output)
            os.close(self._orders)

    def __enter__(self) -> SlurmGang:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
