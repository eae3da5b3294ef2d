"""Save and find checkpoints together: every rank calls, all come to the same end, and none waits for ever.

A full disk on one rank makes the save fail on all, and the run goes on; a programming error is raised on all;
a checkpoint is used only after every byte of it was verified and all ranks have seen the same one.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from solomonov.checkpoint import files, refusals, store
from solomonov.checkpoint.agreement import (
    Collective,
    SystemFailure,
    on_first,
    raise_failures,
    together,
)
from solomonov.checkpoint.format import RankEntry, TensorId
from solomonov.checkpoint.fragments import Fragment
from solomonov.checkpoint.reader import CheckpointReader
from solomonov.checkpoint.store import CheckpointInfo, DamagedFolder, ResumeFact
from solomonov.checkpoint.writer import Header, commit, write_rank_file
from solomonov.errors import DamagedCheckpointError

V = TypeVar("V")
EventSink = Callable[[str, dict[str, Any]], None]
"""Takes an event's name and its plain-JSON fields. Called on rank 0 only."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with a checkpoint, in a form that travels between ranks."""

    what: str
    got: str
    rule: str

    @staticmethod
    def of(error: DamagedCheckpointError) -> Problem:
        """The fields of the error."""
        return Problem(error.what, error.got, error.rule)


@dataclass(frozen=True)
class _Doubt:
    """A folder that is not to be used: damaged, or fenced off."""

    folder: Path
    step: int
    problem: Problem | None = None
    fence: ResumeFact | None = None


class Checkpointer:
    """The checkpoints of one run, as one attempt of it writes and finds them. Every method is collective.

    Args:
        folder: `checkpoints/` of the run, on a file system that all ranks share.
        collective: connects the ranks.
        run_id: identity of the run; checkpoints of another are refused.
        attempt: number of this start of the run, higher than every earlier one's.
        keep_last: newest verified checkpoints that retention keeps, at least 1.
        on_event: takes `checkpoint_durable`, `checkpoint_failed`, `checkpoint_pruned`,
            `checkpoint_retention_failed`, `checkpoint_claim_failed`, `checkpoint_damaged` and
            `checkpoint_set_aside`; called on rank 0.
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
        """Saves that failed since the last durable one."""
        self._on_event = on_event
        self._verified: set[str] = set()
        self._parent_step: int | None = None
        self._facts: list[ResumeFact] = []

    def _event(self, name: str, **fields: Any) -> None:
        if self.collective.rank == 0:
            self._on_event(name, fields)

    def check_writable(self) -> None:
        """Create the folder and write a probe. ConfigurationError where that is forbidden, on every rank.

        A disk that is only full is no reason to refuse: it may have room again when a checkpoint is due.
        """
        probe = self.folder / f"probe-{self.collective.rank:05d}"

        def write() -> None:
            files.make_folder(self.folder)
            files.write_atomically(probe, b"probe\n")
            os.unlink(probe)

        _, failures = together(self.collective, write)
        lasting = [failure for failure in failures if failure.errno not in (errno.ENOSPC, errno.EDQUOT)]
        if lasting:
            raise refusals.not_writable(self.folder, lasting[0])

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
            fragments: this rank's, views are enough; those of all ranks tile every expected tensor once.
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
            ConfigurationError: the ranks disagree on run, attempt, step or folder, or a later attempt of
                the run has started; on every rank.
        """
        started = time.monotonic()
        held: list[Fragment] = []

        def claim() -> tuple[str, int, int, int]:
            held.extend(fragments)
            return self.run_id, self.attempt, step, sum(fragment.nbytes for fragment in held)

        claims, failures = together(self.collective, claim)
        raise_failures(failures)
        if len({claim[:3] for claim in claims}) > 1:
            raise refusals.ranks_disagree(claims)
        needed = sum(nbytes for *_, nbytes in claims)
        tmp, failures = on_first(self.collective, lambda: self._begin(step, needed))
        if tmp is None:
            self._give_up(step, needed, failures, None)
            return None
        self._check_same_folder(tmp)
        entries, failures = together(
            self.collective, lambda: write_rank_file(self.folder / tmp, self.collective.rank, held)
        )
        if failures:
            self._give_up(step, needed, failures, self.folder / tmp)
            return None
        wholes = self.collective.all_gather_object((dict(expected), dict(scalars)))
        header = Header(
            run_id=self.run_id,
            step=step,
            attempt=self.attempt,
            parent_step=self._parent_step,
            topology=topology,
            scalars=_merged([numbers for _, numbers in wholes]),
            state=state,
        )
        shapes = _merged([known for known, _ in wholes])
        info, failures = on_first(self.collective, lambda: self._commit(self.folder / tmp, entries, shapes, header))
        if info is None:
            self._give_up(step, needed, failures, self.folder / tmp)
            return None
        self._succeed(info, time.monotonic() - started)
        return info

    def _begin(self, step: int, needed: int) -> str:
        """Make the folder to write in; its name. OSError(ENOSPC) where the disk cannot hold what comes."""
        self._check_not_superseded()
        files.make_folder(self.folder)
        store.claim(self.folder, self.attempt)
        if files.free_bytes(self.folder) < needed:
            # Filling the disk to its last block would also stop whoever else writes there: logs, metrics.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder))
        name = store.temporary_name(step, self.attempt)
        os.mkdir(self.folder / name)
        return name

    def _check_not_superseded(self) -> None:
        """ConfigurationError where a later attempt has looked for a checkpoint: this one must not go on."""
        newest = store.claimed(self.folder)
        if newest > self.attempt:
            raise refusals.superseded(self.folder, newest, self.attempt)

    def _check_same_folder(self, tmp: str) -> None:
        """ConfigurationError on every rank where one does not see the folder that rank 0 made."""
        mine = self.folder / tmp
        seen = self.collective.all_gather_object((str(mine), os.path.isdir(mine)))
        if not all(visible for _, visible in seen):
            if self.collective.rank == 0:
                os.rmdir(mine)
            raise refusals.not_shared(seen)

    def _commit(
        self,
        tmp: Path,
        entries: list[RankEntry],
        expected: Mapping[TensorId, tuple[int, ...]],
        header: Header,
    ) -> CheckpointInfo:
        """Rank 0's part of a save. A damaged folder of the same name is set aside; a good one is replaced."""
        self._check_not_superseded()
        final = self.folder / store.folder_name(header.step)
        found = store.check(final) if os.path.lexists(final) else None
        if isinstance(found, DamagedFolder):
            store.set_aside(final, "damaged")
        elif found is not None and found.attempt > self.attempt:
            raise refusals.superseded(self.folder, found.attempt, self.attempt)
        return commit(tmp, final, entries=entries, expected=expected, header=header)

    def _give_up(self, step: int, needed: int, failures: list[SystemFailure], tmp: Path | None) -> None:
        """Remove what was written, say what happened, and let the run go on."""
        self.consecutive_failures += 1
        if self.collective.rank != 0:
            return
        free, not_removed = None, None
        try:
            free = files.free_bytes(self.folder)
            if tmp is not None and tmp.is_dir():
                store.delete(tmp)
            store.recover(self.folder)
        except OSError as error:
            not_removed = f"{error.strerror} ({error.filename})"
        first = failures[0]
        self._event(
            "checkpoint_failed",
            step=step,
            cause=first.cause,
            message=first.message,
            path=first.path,
            ranks=[failure.rank for failure in failures],
            bytes_needed=needed,
            bytes_free=free,
            consecutive_failures=self.consecutive_failures,
            not_removed=not_removed,
        )

    def _succeed(self, info: CheckpointInfo, seconds: float) -> None:
        """Say that it is durable, then retention on rank 0, while the others go on; it never ends the run."""
        self.consecutive_failures, self._parent_step = 0, info.step
        self._verified.add(info.digest)
        if self.collective.rank != 0:
            return
        self._event(
            "checkpoint_durable",
            step=info.step,
            folder=info.folder.name,
            bytes=info.nbytes,
            seconds=round(seconds, 3),
            digest=info.digest,
        )
        if store.claimed(self.folder) > self.attempt:
            return  # what it would delete may be what the later attempt went on from
        try:
            store.write_latest(self.folder, info.folder)
            report = store.prune(
                self.folder,
                self.keep_last,
                verified=self._verified,
                attempt=self.attempt,
                facts=self._facts,
            )
        except OSError as error:
            self._event("checkpoint_retention_failed", step=info.step, message=str(error))
            return
        for broken in report.damaged:
            self._tell_damage(_Doubt(broken.folder, broken.step, Problem.of(broken.error)))
        for stray in report.fenced:
            fence = store.superseded_by(stray.attempt, stray.step, self._facts)
            reason = _reason(_Doubt(stray.folder, stray.step, fence=fence))
            self._event("checkpoint_set_aside", step=stray.step, folder=stray.folder.name, reason=reason)
        if report.deleted:
            steps = [old.step for old in report.deleted]
            self._event("checkpoint_pruned", step=info.step, steps=steps, bytes_freed=report.bytes_freed)

    # --- find ----------------------------------------------------------------------------------------------

    def find(self, facts: Iterable[ResumeFact] = (), *, fresh: bool = False) -> CheckpointReader | None:
        """The newest checkpoint that verifies, opened on every rank; None where the run starts from step 0.

        The ranks share the reading: each verifies some of the files. Folders that are damaged or fenced off
        are set aside once it is clear where the run goes on; where nothing is left to go on from, all stay.

        Args:
            facts: where earlier attempts went on from, see `store.superseded_by`; rank 0's count.
            fresh: start from step 0 whatever is there; all checkpoints are set aside.

        Raises:
            DamagedCheckpointError: there are checkpoints and none of them can be used.
            ConfigurationError: they are another run's, a later attempt uses them, or not all ranks see the same.
        """
        past = [ResumeFact(*fact) for fact in self.collective.broadcast_object([tuple(f) for f in facts])]
        names, failures = on_first(self.collective, lambda: self._list(fresh))
        raise_failures(failures)
        doubts: list[_Doubt] = []
        for name in names or []:
            doubt, digest = self._judge(self.folder / name, past)
            if doubt is None:
                doubt = self._verify_together(self.folder / name, digest)
            if doubt is not None:
                doubts.append(doubt)
                if doubt.problem:
                    self._tell_damage(doubt)
                continue
            self._set_aside(doubts)
            reader = CheckpointReader.open(self.folder / name)
            self._verified.add(reader.digest)
            self._go_on_from(reader.step, past)
            return reader
        if not fresh:
            self._check_nothing_lost(doubts)
        self._set_aside(doubts)
        self._go_on_from(None, past)
        return None

    def _go_on_from(self, step: int | None, past: list[ResumeFact]) -> None:
        """Remember where this attempt starts: retention counts nothing that this fences off."""
        self._parent_step = step
        self._facts = [*past, ResumeFact(self.attempt, step or 0)]

    def _list(self, fresh: bool) -> list[str]:
        """Rank 0: names of the folders to try, newest first; with `fresh` none, and all are set aside."""
        self._check_not_superseded()
        self._claim()
        if self.folder.is_dir():
            store.recover(self.folder)
        names = store.candidates(self.folder)
        if fresh:
            for folder in (*names, *store.replaced(self.folder), *store.set_aside_for(self.folder, "damaged")):
                store.set_aside(folder, "fresh")
            names = []
        return [folder.name for folder in names]

    def _claim(self) -> None:
        """Tell older attempts to leave, where the folder can be written to."""
        try:
            store.claim(self.folder, self.attempt)
        except OSError as error:
            self._event("checkpoint_claim_failed", message=str(error))

    def _judge(self, folder: Path, past: list[ResumeFact]) -> tuple[_Doubt | None, str]:
        """Whether the manifest, as rank 0 reads it, speaks for this folder; and its digest."""

        def look() -> tuple[_Doubt | None, str, str]:
            found = store.inspect(folder)
            if isinstance(found, DamagedFolder):
                return _Doubt(folder, found.step, Problem.of(found.error)), "", self.run_id
            fence = store.superseded_by(found.attempt, found.step, past)
            return _Doubt(folder, found.step, fence=fence) if fence else None, found.digest, found.run_id

        seen, failures = on_first(self.collective, look)
        raise_failures(failures)
        assert seen is not None, "a rank that has no failure has a value"
        doubt, digest, run_id = seen
        if run_id != self.run_id:
            raise refusals.another_run(folder, run_id, self.run_id)
        return (replace(doubt, folder=folder) if doubt else None), digest  # each rank's own path

    def _verify_together(self, folder: Path, digest: str) -> _Doubt | None:
        """Every rank reads the manifest and its share of the files; what is wrong, the same on every rank."""

        def look() -> tuple[str, bool, str, Problem | None]:
            try:
                reader = CheckpointReader.open(folder)
                reader.verify(reader.share(self.collective.rank, self.collective.size))
            except DamagedCheckpointError as error:
                return str(folder), True, "", Problem.of(error)
            except FileNotFoundError:
                return str(folder), False, "", None
            return str(folder), True, reader.digest, None

        probes, failures = together(self.collective, look)
        raise_failures(failures)
        if not all(visible for _, visible, _, _ in probes):
            raise refusals.not_shared([(path, visible) for path, visible, _, _ in probes])
        for *_, problem in probes:
            if problem is not None:
                return _Doubt(folder, store.step_of(folder), problem)
        if {seen for _, _, seen, _ in probes} != {digest}:
            raise refusals.different_bytes(folder.name, [seen for _, _, seen, _ in probes])
        return None

    def _check_nothing_lost(self, doubts: list[_Doubt]) -> None:
        """DamagedCheckpointError where starting from step 0 would throw away what a checkpoint holds."""
        kept, failures = on_first(
            self.collective, lambda: [path.name for path in store.set_aside_for(self.folder, "damaged")]
        )
        raise_failures(failures)
        lost = [doubt for doubt in doubts if doubt.problem or (doubt.fence and doubt.fence.resumed_step > 0)]
        if not lost and not kept:
            return
        got = [f"{doubt.folder.name}: {_reason(doubt)}" for doubt in lost] + [f"{name}: damaged" for name in kept or []]
        raise refusals.nothing_left(self.folder, got)

    def _set_aside(self, doubts: list[_Doubt]) -> None:
        """Rank 0: rename what is not to be used. Where that fails (read-only), it is found again."""
        for doubt in doubts if self.collective.rank == 0 else []:
            try:
                target = store.set_aside(doubt.folder, "damaged" if doubt.problem else "fenced").name
            except OSError as error:
                target = f"not renamed: {error.strerror}"
            self._event(
                "checkpoint_set_aside",
                step=doubt.step,
                folder=doubt.folder.name,
                reason=_reason(doubt),
                renamed_to=target,
            )

    def _tell_damage(self, doubt: _Doubt) -> None:
        problem = doubt.problem
        assert problem is not None, "only damage is told"
        self._event(
            "checkpoint_damaged",
            step=doubt.step,
            folder=doubt.folder.name,
            what=problem.what,
            got=problem.got,
            rule=problem.rule,
        )


def _reason(doubt: _Doubt) -> str:
    if doubt.fence is not None:
        return f"attempt {doubt.fence.attempt} went on from step {doubt.fence.resumed_step}"
    assert doubt.problem is not None, "a doubt has a reason"
    return f"{doubt.problem.what}: got {doubt.problem.got}, not {doubt.problem.rule}"


def _merged(parts: list[dict[Any, V]]) -> dict[Any, V]:
    """The union of what the ranks know. ValueError where two ranks differ."""
    union: dict[Any, V] = {}
    for rank, part in enumerate(parts):
        for key, value in part.items():
            if union.setdefault(key, value) != value:
                raise ValueError(f"{key}: rank {rank} has {value}, a lower rank has {union[key]}")
    return union
