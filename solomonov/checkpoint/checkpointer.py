"""Save and find checkpoints together: every rank calls, all ranks come to the same end, and none waits for ever.

Whatever happens on one rank between two collectives is told to all in the next one: a full disk makes the save
fail everywhere and the run go on; a programming error is raised everywhere.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from solomonov.checkpoint import files, store
from solomonov.checkpoint.format import RankEntry, TensorId
from solomonov.checkpoint.fragments import Fragment
from solomonov.checkpoint.reader import CheckpointReader
from solomonov.checkpoint.store import CheckpointInfo, DamagedFolder, ResumeFact
from solomonov.checkpoint.writer import Header, commit, write_rank_file
from solomonov.errors import ConfigurationError, DamagedCheckpointError

T = TypeVar("T")
EventSink = Callable[[str, dict[str, Any]], None]
"""Takes an event's name and its plain-JSON fields. Called on rank 0 only."""


class Collective(Protocol):
    """What the ranks need to agree; any process group of the control plane."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def all_gather_object(self, value: T) -> list[T]: ...
    def broadcast_object(self, value: T, src: int = 0) -> T: ...
    def barrier(self) -> None: ...


class SingleProcess:
    """The collective of a process that is alone."""

    rank = 0
    size = 1

    def all_gather_object(self, value: T) -> list[T]:
        """Its own value."""
        return [value]

    def broadcast_object(self, value: T, src: int = 0) -> T:
        """Its own value."""
        return value

    def barrier(self) -> None:
        """Nobody to wait for."""


@dataclass(frozen=True)
class SystemFailure:
    """An OSError of one rank, told to all."""

    rank: int
    errno: int
    message: str
    path: str
    free_bytes: int | None
    """Free in the checkpoints' file system when it happened; None where that could not be asked."""


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """What came of one rank's share of a phase."""

    value: T | None = None
    failure: SystemFailure | None = None
    raised: str | None = None


@dataclass(frozen=True)
class _Probe:
    """What one rank found when it looked at a checkpoint."""

    visible: bool
    run_id: str = ""
    step: int = -1
    digest: str = ""
    problem: DamagedCheckpointError | None = None


class Checkpointer:
    """The checkpoints of one run, as one attempt of it writes and finds them. Every method is collective.

    Args:
        folder: `checkpoints/` of the run, on a file system that all ranks share.
        collective: connects the ranks.
        run_id: identity of the run; checkpoints of another are refused.
        attempt: number of this start of the run, higher than every earlier one's.
        keep_last: newest verified checkpoints that retention keeps, at least 1.
        on_event: takes `checkpoint_durable`, `checkpoint_failed`, `checkpoint_damaged`, `checkpoint_set_aside`,
            `checkpoint_pruned` and `checkpoint_retention_failed`; called on rank 0 only.
    """

    def __init__(
        self,
        folder: Path,
        collective: Collective,
        *,
        run_id: str,
        attempt: int,
        keep_last: int,
        on_event: EventSink,
    ) -> None:
        assert keep_last >= 1, f"keep_last is {keep_last}: the last checkpoint is never deleted"
        self.folder, self.collective, self.run_id = folder, collective, run_id
        self.attempt, self.keep_last = attempt, keep_last
        self.consecutive_failures = 0
        self._on_event = on_event
        self._verified: set[str] = set()
        self._parent_step: int | None = None

    # --- agreement -----------------------------------------------------------------------------------------

    def _event(self, name: str, **fields: Any) -> None:
        if self.collective.rank == 0:
            self._on_event(name, fields)

    def _together(self, work: Callable[[], T]) -> tuple[list[T], list[SystemFailure]]:
        """Run `work` on this rank and tell all ranks what came of it.

        Returns:
            Every rank's value in the order of ranks, and the OSErrors; the same on every rank. With failures,
            the values are those of the ranks that had none.

        Raises:
            RuntimeError: another rank raised something else than an OSError; that rank raises its own error.
        """
        outcome: _Outcome[T] | None = None
        try:
            try:
                outcome = _Outcome(value=work())
            except OSError as error:
                outcome = _Outcome(failure=self._failure(error))
        finally:
            if outcome is None:
                error_type, error, _ = sys.exc_info()
                name = error_type.__name__ if error_type else "unknown"
                outcome = _Outcome(raised=f"{name}: {error}")
            outcomes = self.collective.all_gather_object(outcome)
        for rank, other in enumerate(outcomes):
            if other.raised is not None:
                raise RuntimeError(f"rank {rank} stopped while all worked on a checkpoint: {other.raised}")
        failures = [other.failure for other in outcomes if other.failure is not None]
        values: list[Any] = [other.value for other in outcomes if other.failure is None]
        return values, failures

    def _on_first(self, work: Callable[[], T]) -> tuple[T | None, list[SystemFailure]]:
        """Run `work` on rank 0 alone; its value, or its failure, on every rank."""
        values, failures = self._together(lambda: work() if self.collective.rank == 0 else None)
        return (None if failures else values[0]), failures

    def _failure(self, error: OSError) -> SystemFailure:
        path, number = str(error.filename or self.folder), error.errno or errno.EIO
        return SystemFailure(self.collective.rank, number, error.strerror or str(error), path, self._free_bytes())

    def _free_bytes(self) -> int | None:
        """Bytes that this user may still write, in the nearest folder that exists."""
        existing = next((path for path in (self.folder, *self.folder.parents) if path.is_dir()), None)
        if existing is None:
            return None
        status = os.statvfs(existing)
        return status.f_bavail * status.f_frsize

    # --- before the first step -----------------------------------------------------------------------------

    def check_writable(self) -> None:
        """Create the folder and write a probe. ConfigurationError where that fails, on every rank."""
        probe = self.folder / f"probe-{self.collective.rank:05d}"

        def write() -> None:
            files.make_folder(self.folder)
            files.write_atomically(probe, b"probe\n")
            os.unlink(probe)

        _, failures = self._together(write)
        if failures:
            first = failures[0]
            raise ConfigurationError(
                f"no checkpoint can be written to {self.folder}",
                got=f"rank {first.rank}: {first.message} ({first.path})",
                rule="every rank can create, sync, rename and delete files there",
                remedy="change the folder's owner or mode, free space, or choose another folder for runs",
            )

    # --- save ----------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        fragments: Iterable[Fragment],
        *,
        expected: Mapping[TensorId, tuple[int, ...]],
        scalars: Mapping[str, Any],
        state: Mapping[str, Any],
        topology: Mapping[str, Any],
    ) -> CheckpointInfo | None:
        """Write a checkpoint; durable when this returns one.

        Args:
            step: updates done; the same on all ranks.
            fragments: this rank's; together the ranks' tile every expected tensor exactly once.
            expected: (name, kind) -> shape; a rank may know only its own tensors, the union counts.
            scalars: optimizer state that is one number; ranks may know different keys, not different values.
            state: rank 0's is stored.
            topology: rank 0's is stored.

        Returns:
            The checkpoint, on every rank; None on every rank where the system would not have it (disk full,
            input/output error, read-only): then the event `checkpoint_failed` was given, what was written of
            it was removed, and older checkpoints are as they were.

        Raises:
            ValueError, RuntimeError: the fragments do not tile what is expected, or the like; on every rank.
            ConfigurationError: the ranks disagree on run, attempt, step or folder; on every rank, before anything
                is written.
        """
        started = time.monotonic()
        held = list(fragments)
        final = self.folder / store.folder_name(step)
        asked = self.collective.all_gather_object(
            (self.run_id, self.attempt, step, sum(fragment.nbytes for fragment in held))
        )
        if len({claim[:3] for claim in asked}) > 1:
            raise ConfigurationError(
                "the ranks do not mean the same checkpoint",
                got="; ".join(f"rank {r}: run {c[0]}, attempt {c[1]}, step {c[2]}" for r, c in enumerate(asked)),
                rule="all ranks save the same step of the same attempt of the same run",
                remedy="start all ranks from the same run folder",
            )
        needed = sum(claim[3] for claim in asked)
        tmp, failures = self._on_first(lambda: self._begin(step, needed))
        if tmp is None:
            return self._give_up(step, needed, failures, None)
        self._check_same_folder(tmp)
        entries, failures = self._together(
            lambda: write_rank_file(self.folder / tmp, self.collective.rank, held)
        )
        if failures:
            return self._give_up(step, needed, failures, self.folder / tmp)
        wholes = self.collective.all_gather_object((dict(expected), dict(scalars)))
        header = Header(
            run_id=self.run_id,
            step=step,
            attempt=self.attempt,
            parent_step=self._parent_step,
            topology=topology,
            scalars=_merged([scalars for _, scalars in wholes], "scalar"),
            state=state,
        )
        shapes = _merged([shapes for shapes, _ in wholes], "tensor")
        info, failures = self._on_first(lambda: self._commit(self.folder / tmp, final, entries, shapes, header))
        if info is None:
            return self._give_up(step, needed, failures, self.folder / tmp)
        self.consecutive_failures = 0
        self._parent_step = step
        self._verified.add(info.digest)
        seconds = round(time.monotonic() - started, 3)
        self._event(
            "checkpoint_durable",
            step=step,
            folder=str(info.folder),
            bytes=info.nbytes,
            seconds=seconds,
            digest=info.digest,
        )
        self._retain(info)
        return info

    def _begin(self, step: int, needed: int) -> str:
        """Make the folder to write in; its name. OSError(ENOSPC) where the disk cannot hold what is to come."""
        files.make_folder(self.folder)
        free = self._free_bytes()
        if free is not None and free < needed:
            # Filling the disk to the last block would also stop whoever else writes to it: logs, metrics.
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} for all ranks' files", str(self.folder))
        name = store.temporary_name(step, self.attempt)
        os.mkdir(self.folder / name)
        return name

    def _check_same_folder(self, tmp: str) -> None:
        """ConfigurationError on every rank where one does not see the folder that rank 0 made."""
        seen = self.collective.all_gather_object((self.folder / tmp).is_dir())
        if not all(seen):
            blind = [rank for rank, sees in enumerate(seen) if not sees]
            if self.collective.rank == 0:
                os.rmdir(self.folder / tmp)
            raise ConfigurationError(
                f"ranks {blind} do not see the checkpoint folder of rank 0",
                got=f"{self.folder / tmp} is not there on them",
                rule="the run folder lies on a file system that all ranks share, under the same path",
                remedy="move the run folder to a shared file system, or correct its path on those machines",
            )

    def _commit(
        self,
        tmp: Path,
        final: Path,
        entries: list[RankEntry],
        expected: Mapping[TensorId, tuple[int, ...]],
        header: Header,
    ) -> CheckpointInfo:
        """Rank 0's part of a save. A damaged folder of the same name is set aside, a good one replaced."""
        if os.path.lexists(final):
            found = store.inspect(final) if final.is_dir() and not final.is_symlink() else None
            if not isinstance(found, CheckpointInfo) or self._damage(found) is not None:
                store.set_aside(final, "damaged")
        return commit(tmp, final, entries=entries, expected=expected, header=header)

    def _damage(self, info: CheckpointInfo) -> DamagedCheckpointError | None:
        try:
            store.verify_checkpoint(info)
        except DamagedCheckpointError as error:
            return error
        return None

    def _give_up(self, step: int, needed: int, failures: list[SystemFailure], tmp: Path | None) -> None:
        """Remove what was written, say what happened, and let the run go on."""
        self.consecutive_failures += 1
        leftover = ""
        if self.collective.rank == 0:
            try:
                if tmp is not None and tmp.is_dir():
                    store.delete(tmp)
                store.recover(self.folder)
            except OSError as error:
                leftover = f"{error.strerror} ({error.filename})"
        first = failures[0]
        self._event(
            "checkpoint_failed",
            step=step,
            cause=errno.errorcode.get(first.errno, str(first.errno)),
            message=first.message,
            path=first.path,
            ranks=[failure.rank for failure in failures],
            bytes_needed=needed,
            bytes_free=first.free_bytes,
            consecutive_failures=self.consecutive_failures,
            not_removed=leftover or None,
        )

    def _retain(self, info: CheckpointInfo) -> None:
        """Retention after a durable save, on rank 0, while the others go on; it never ends the run."""
        if self.collective.rank != 0:
            return
        try:
            store.write_latest(self.folder, info.folder)
            report = store.prune(
                self.folder,
                self.keep_last,
                verified=self._verified,
                newest_step=info.step,
                attempt=self.attempt,
            )
        except OSError as error:
            self._event("checkpoint_retention_failed", step=info.step, message=str(error))
            return
        for broken in report.damaged:
            self._tell_damage(broken)
        if report.deleted:
            steps = [old.step for old in report.deleted]
            self._event("checkpoint_pruned", step=info.step, steps=steps, bytes_freed=report.bytes_freed)

    # --- find ----------------------------------------------------------------------------------------------

    def find(self, facts: Iterable[ResumeFact] = (), *, fresh: bool = False) -> CheckpointReader | None:
        """The newest checkpoint that verifies, opened on every rank; None where the run starts from step 0.

        Args:
            facts: where earlier attempts went on from, see `store.superseded_by`; rank 0's count.
            fresh: start from step 0 whatever is there; all checkpoints are set aside.

        Raises:
            DamagedCheckpointError: there are checkpoints and none of them verifies.
            ConfigurationError: they are another run's, or not all ranks see the same ones.
        """
        known = self.collective.broadcast_object([tuple(fact) for fact in facts])
        past = [ResumeFact(*fact) for fact in known]
        folders, failures = self._on_first(lambda: self._list(fresh))
        self._raise_failures(failures)
        damage: list[DamagedFolder] = []
        for name in folders or []:
            probes, failures = self._together(lambda name=name: self._probe(self.folder / name, past))
            self._raise_failures(failures)
            self._check_agreement(name, probes)
            problem = next((probe.problem for probe in probes if probe.problem is not None), None)
            if problem is not None:
                damage.append(DamagedFolder(self.folder / name, probes[0].step, problem))
                continue
            fence = store.superseded_by(probes[0].attempt, probes[0].step, past)
            if fence is not None:
                self._fence_off(self.folder / name, probes[0].step, fence)
                continue
            for broken in damage:
                self._set_aside(broken)
            reader = CheckpointReader.open(self.folder / name)
            self._verified.add(reader.digest)
            self._parent_step = reader.step
            return reader
        return None
