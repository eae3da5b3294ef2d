"""What a Slurm job does at the end of a cycle (from one start of the job to its next): leave, or be queued again.

Slurm itself queues a job again when it had to kill it (preemption, a lost node). It does not where the job left by
itself, as a saved run does, or at the time limit: then `requeue` does, in this one place. Both ways may go round for
ever without getting anywhere; the record of the job's starts is the brake on both.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from launcher.errors import SlurmError
from launcher.exits import ExitCode, Outcome, classify, describe
from launcher.slurm_commands import JobRecord, require_node_name, run_slurm, show_job
from launcher.slurm_step import Allocation

NO_PROGRESS = 1
"""What a job leaves with that was stopped by the brake."""


T = TypeVar("T")

PAUSES_SECONDS = (1.0, 5.0, 15.0, 30.0)
"""Between the questions to a controller that does not answer."""
SUPERVISOR_DEATHS = tuple(
    128 + number
    for number in (signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
)
"""Codes of a supervisor that a signal ended: by a fault, or by a request that came before it listened."""
SUSPICIOUS_CRASHES = 2
"""From so many on, crashes that all began on one node speak against the node."""


@dataclass(frozen=True)
class CycleRecord:
    """The starts of one Slurm job and the end of its last cycle: `slurm-ID.json` in the folder of its logs."""

    starts: tuple[int, ...] = ()
    """Durable step at each start of the job, the newest last."""
    restart: int = 0
    """Slurm's count of the newest start."""
    step: int = 0
    """Durable step at the end of the last cycle."""
    suspect: str | None = None
    """The node on which every crash of the last cycle began."""
    excluded: tuple[str, ...] = ()
    """Nodes that the job was asked to avoid."""
    ended: bool = False
    """The supervisor of the newest cycle ended by itself: what it left with is its ranks' end, and not its own."""
    stopping: bool = False
    """It had been asked to save and leave before its ranks ended."""

    @classmethod
    def read(cls, folder: Path, job: str) -> CycleRecord:
        """The record of a job; an empty one before its first start."""
        try:
            record = json.loads(_path(folder, job).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls()
        except json.JSONDecodeError as error:  # a machine went down while it was written
            print(f"{_path(folder, job)} cannot be read ({error}): the job's earlier starts do not count", flush=True)
            return cls()
        lists = {name: tuple(record[name]) for name in ("starts", "excluded")}
        return cls(**{**record, **lists})

    def write(self, folder: Path, job: str) -> None:
        """Replace the record of a job."""
        path = _path(folder, job)
        aside = path.with_suffix(".tmp")
        with aside.open("w", encoding="utf-8") as file:
            json.dump(asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)

    def idle_cycles(self, step: int) -> int:
        """Cycles in a row, the newest one included, that began at `step` or above: they led nowhere."""
        count = 0
        for start in reversed(self.starts):
            if start < step:
                break
            count += 1
        return count


def _path(folder: Path, job: str) -> Path:
    return folder / f"slurm-{job}.json"


def cancel_mark(folder: Path, job: str) -> Path:
    """The file that says: somebody cancelled this job, do not queue it again."""
    return folder / f"slurm-{job}.cancelled"


@dataclass(frozen=True)
class CycleFacts:
    """All that the decision depends on."""

    code: int
    """What the supervisor left with, as a shell tells it."""
    ours: bool
    """Slurm has not started the job anew meanwhile."""
    cancelled: bool
    """Somebody asked for the end of the job."""
    ending: bool
    """Slurm is ending the job, and not for its time limit: it has decided by itself what follows."""
    preempted: bool
    idle_cycles: int
    max_no_progress: int
    ended: bool = True
    """The supervisor ended by itself."""
    stopping: bool = False
    """It had been asked to save and leave."""
    suspect: str | None = None
    spare_nodes: int = 0
    """Nodes of the partition beyond those that the job needs and avoids."""


@dataclass(frozen=True)
class CycleDecision:
    """What to do at the end of a cycle."""

    requeue: bool
    exit_code: int
    """What the job leaves with, if it is not queued again."""
    reason: str
    exclude: str | None = None
    """A node to avoid from now on."""


def decide(facts: CycleFacts) -> CycleDecision:
    """Queue the job again, or let it end."""
    outcome = classify(facts.code)
    idle = f"{facts.idle_cycles} starts of the job in a row came to no newer checkpoint (launch.max_no_progress)"
    if not facts.ours:
        return CycleDecision(False, facts.code, "Slurm has started the job anew meanwhile: that one goes on")
    if facts.cancelled or facts.code == ExitCode.INTERRUPTED:
        return CycleDecision(False, facts.code, "cancelled")
    if facts.ending:
        return CycleDecision(False, facts.code, "Slurm ends the job: it was cancelled, or Slurm queues it again itself")
    if outcome is Outcome.AGAIN:
        if facts.idle_cycles >= facts.max_no_progress:
            return CycleDecision(False, NO_PROGRESS, idle)
        return CycleDecision(True, facts.code, "preempted" if facts.preempted else "saved before the time limit")
    if facts.idle_cycles >= facts.max_no_progress:  # the next start would be refused
        return CycleDecision(False, facts.code, describe(facts.code))
    if facts.code in SUPERVISOR_DEATHS and not facts.ended:
        return CycleDecision(True, facts.code, f"the supervisor was {describe(128 - facts.code)}")
    if outcome is Outcome.CRASH and (facts.stopping or facts.preempted):
        return CycleDecision(True, facts.code, f"asked to save, the ranks ended with {describe(facts.code)}")
    if outcome is Outcome.CRASH and facts.suspect is not None and facts.spare_nodes > 0:
        reason = f"every crash began on {facts.suspect}: again without it"
        return CycleDecision(True, facts.code, reason, exclude=facts.suspect)
    return CycleDecision(False, facts.code, describe(facts.code))


@dataclass(frozen=True)
class Cycle:
    """One start of a Slurm job, as its supervisor keeps the record of it."""

    folder: Path
    allocation: Allocation
    hosts_of_crashes: dict[int, str | None] = field(default_factory=dict)
    """By attempt that crashed: where the rank was that brought the others down."""
    ends: dict[int, Mapping[str, object]] = field(default_factory=dict)
    """By rank: how it ended in the newest attempt."""
    stops: list[str] = field(default_factory=list)
    """Requests to save and leave, by whom they came."""

    def begin(self, step: int, max_no_progress: int) -> str | None:
        """Note the start.

        Args:
            step: the newest durable step.

        Returns:
            Why the job should not go on, or None.
        """
        job = self.allocation.name
        record = CycleRecord.read(self.folder, job)
        idle = record.idle_cycles(step)
        starts = (*record.starts, step)
        restart = self.allocation.restart
        replace(record, starts=starts, restart=restart, step=step, suspect=None, ended=False, stopping=False).write(
            self.folder, job
        )
        if idle >= max_no_progress:
            return f"Slurm has started the job {idle} times without a checkpoint newer than step {step}"
        return None

    def note(self, kind: str, fields: Mapping[str, object]) -> None:
        """Take note of an event of the job: who caused a crash, and requests to leave."""
        if kind == "stopping":
            self.stops.append(str(fields["signal"]))
        if kind == "attempt_started":
            self.ends.clear()
        if kind == "rank_exited":
            self.ends[int(str(fields["rank"]))] = fields
        if kind in ("restart", "finished") and fields["rank"] is not None:
            end = self.ends[int(str(fields["rank"]))]
            code, host = end["exit_code"], end["host"]
            if not end["killed_by_launcher"] and (code is None or classify(int(str(code))) is Outcome.CRASH):
                self.hosts_of_crashes[int(str(end["attempt"]))] = str(host) if host is not None else None

    def end(self, step: int) -> None:
        """Note the end, before the process leaves; where it cannot be written, what it leaves with still counts."""
        job = self.allocation.name
        hosts = list(self.hosts_of_crashes.values())
        # One crash may have any cause; two in a row on the same one of several nodes have one that is there.
        several = self.allocation.nodes > 1 and len(hosts) >= SUSPICIOUS_CRASHES
        suspect = hosts[0] if several and len(set(hosts)) == 1 else None
        record = CycleRecord.read(self.folder, job)
        record = replace(record, step=step, suspect=suspect, ended=True, stopping=bool(self.stops))
        try:
            record.write(self.folder, job)
        except OSError as error:
            print(f"the end of the job's cycle could not be noted: {error}", flush=True)


def requeue(
    folder: Path,
    code: int,
    allocation: Allocation,
    max_no_progress: int,
    on_decision: Callable[[CycleDecision], None],
) -> int:
    """Decide what follows the end of a supervisor, and do it.

    Args:
        folder: of the job's logs.
        code: what the supervisor left with, as a shell tells it.
        on_decision: is told before anything is done.

    Returns:
        What the batch script leaves with. Does not return where Slurm queues the job again: it ends this process.
    """
    job = allocation.name
    record = CycleRecord.read(folder, job)
    shown = _patiently(lambda: show_job(job))
    decision = decide(_facts(code, record, shown, allocation, max_no_progress, cancel_mark(folder, job).exists()))
    on_decision(decision)
    if not decision.requeue:
        return decision.exit_code
    if decision.exclude is None:
        _patiently(lambda: run_slurm(["scontrol", "requeue", job]))
    else:
        record = replace(record, excluded=(*record.excluded, decision.exclude))
        record.write(folder, job)
        avoided = ",".join(require_node_name(name) for name in record.excluded)
        # Only a job that waits can be told what to avoid: it is held for that moment, and this script is asked to end.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        run_slurm(["scontrol", "requeuehold", job])
        try:
            run_slurm(["scontrol", "update", f"JobId={job}", f"ExcNodeList={avoided}"])
        finally:
            run_slurm(["scontrol", "release", job])
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:  # Slurm ends this script
        time.sleep(60.0)


def _patiently(ask: Callable[[], T]) -> T:
    """The answer of a controller that may be busy or away for a moment: without it a saved job would be lost."""
    for pause in PAUSES_SECONDS:
        try:
            return ask()
        except SlurmError as error:
            print(f"{error.what}: {error.got}; asking again in {pause:g} s", flush=True)
            time.sleep(pause)
    return ask()


def _facts(
    code: int,
    record: CycleRecord,
    shown: JobRecord | None,
    allocation: Allocation,
    max_no_progress: int,
    cancelled: bool,
) -> CycleFacts:
    ours = shown is None or shown.restarts == allocation.restart
    return CycleFacts(
        code=code,
        ours=ours and record.restart == allocation.restart,
        cancelled=cancelled,
        ending=shown is not None and shown.state not in ("RUNNING", "SUSPENDED") and not shown.out_of_time,
        preempted=shown is not None and shown.preempted,
        idle_cycles=record.idle_cycles(record.step),
        max_no_progress=max_no_progress,
        ended=record.ended,
        stopping=record.stopping,
        suspect=record.suspect,
        spare_nodes=shown.partition_nodes - allocation.nodes - len(record.excluded) if shown is not None else 0,
    )
