"""The folder that holds a run's checkpoints: which are there, which one to use, which ones to remove.

Names inside it; only the first is ever taken for a checkpoint:

    step-00000200                          a checkpoint
    step-00000200.tmp-a3-1f0c77d2          being written by attempt 3
    step-00000200.replaced-1f0c77d2        moved aside for another of the same step, see `recover`
    step-00000200.deleted-1f0c77d2         being deleted
    step-00000200.set-aside-damaged-1f0c77d2    kept for people; nothing of ours deletes it unasked
    latest                                 a hint for people; never read
    attempt                                number of the newest attempt that looked here: an older one leaves
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from solomonov.checkpoint import files
from solomonov.checkpoint.format import Manifest
from solomonov.checkpoint.verify import damaged, open_manifest, verify_files
from solomonov.errors import DamagedCheckpointError

LATEST = "latest"
CLAIM = "attempt"
_FOLDER = re.compile(r"^step-([0-9]{8,18})$")
_ASIDE = re.compile(r"^(step-[0-9]{8,18})\.(tmp-a([0-9]+)|replaced|deleted|set-aside-([a-z]+))-[0-9a-f]{8}$")


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint whose manifest is intact; its files may not have been verified."""

    folder: Path
    step: int
    run_id: str
    attempt: int
    parent_step: int | None
    created: float
    """Wall clock, seconds since 1970; checkpoints are ordered by step, never by this."""
    nbytes: int
    digest: str
    """xxh3-128 of MANIFEST.json."""


@dataclass(frozen=True)
class DamagedFolder:
    """A folder that is named like a checkpoint and is none."""

    folder: Path
    step: int
    error: DamagedCheckpointError


class ResumeFact(NamedTuple):
    """What an attempt journalled when it had chosen where to go on; step 0 is the beginning."""

    attempt: int
    resumed_step: int


def superseded_by(attempt: int, step: int, facts: Iterable[ResumeFact]) -> ResumeFact | None:
    """The fact that fences a checkpoint off, if any.

    Attempt K went on from step S: what an earlier attempt wrote above S is not on K's line of history,
    even if it appears later, written by a process that would not die. Of several such facts, the last.
    """
    fencing = [fact for fact in facts if fact.attempt > attempt and step > fact.resumed_step]
    return max(fencing, key=lambda fact: fact.attempt, default=None)


def folder_name(step: int) -> str:
    """Name of the folder of a checkpoint."""
    return f"step-{step:08d}"


def temporary_name(step: int, attempt: int) -> str:
    """A new name to write a checkpoint under."""
    return f"{folder_name(step)}.tmp-a{attempt}-{secrets.token_hex(4)}"


def info_of(folder: Path, manifest: Manifest, raw: bytes) -> CheckpointInfo:
    """What the manifest of a checkpoint says, in short."""
    return CheckpointInfo(
        folder=folder,
        step=manifest.step,
        run_id=manifest.run_id,
        attempt=manifest.attempt,
        parent_step=manifest.parent_step,
        created=manifest.created,
        nbytes=manifest.nbytes + len(raw),
        digest=files.digest_bytes(raw),
    )


def _entries(checkpoints: Path) -> list[str]:
    """Names of the real folders inside; links are not followed, a missing folder is empty."""
    try:
        with os.scandir(checkpoints) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return []


def _asides(checkpoints: Path) -> list[tuple[Path, re.Match[str]]]:
    """Folders that were moved aside, with the match of their names."""
    matches = ((name, _ASIDE.fullmatch(name)) for name in _entries(checkpoints))
    return [(checkpoints / name, match) for name, match in matches if match]


def candidates(checkpoints: Path) -> list[Path]:
    """Folders that are named like a checkpoint, newest step first, unread."""
    steps = [(int(match[1]), name) for name in _entries(checkpoints) if (match := _FOLDER.fullmatch(name))]
    return [checkpoints / name for _, name in sorted(steps, reverse=True)]


def step_of(folder: Path) -> int:
    """The step in the name of a folder that `candidates` gave."""
    match = _FOLDER.fullmatch(folder.name)
    assert match, f"{folder} is not named like a checkpoint"
    return int(match[1])


def inspect(folder: Path) -> CheckpointInfo | DamagedFolder:
    """Read the manifest of one folder; its step and the folder's name must agree.

    Raises:
        ConfigurationError: not readable, or of a later release.
    """
    step = step_of(folder)
    try:
        manifest, raw = open_manifest(folder)
        if manifest.step != step:
            rule = f"step {step}, as the folder's name says"
            raise damaged(folder, got=f"a manifest of step {manifest.step}", rule=rule)
    except DamagedCheckpointError as error:
        return DamagedFolder(folder, step, error)
    return info_of(folder, manifest, raw)


def survey(checkpoints: Path) -> list[CheckpointInfo | DamagedFolder]:
    """All folders that are named like a checkpoint, newest step first, with what is wrong with them."""
    return [inspect(folder) for folder in candidates(checkpoints)]


def scan(checkpoints: Path) -> list[CheckpointInfo]:
    """Checkpoints whose manifest is intact, newest step first. Their files were not verified."""
    return [found for found in survey(checkpoints) if isinstance(found, CheckpointInfo)]


def verify_checkpoint(info: CheckpointInfo) -> int:
    """Read all files and compare them; the bytes read. DamagedCheckpointError names the first bad file."""
    manifest, raw = open_manifest(info.folder)
    if files.digest_bytes(raw) != info.digest:
        got = f"manifest xxh3-128 {files.digest_bytes(raw)}"
        raise damaged(info.folder, got=got, rule=f"{info.digest}, as when it was listed")
    return verify_files(info.folder, manifest) + len(raw)


def check(folder: Path) -> CheckpointInfo | DamagedFolder:
    """Like `inspect`, and every byte is read and verified. What is no folder at all is damaged, too."""
    if folder.is_symlink() or not folder.is_dir():
        return DamagedFolder(folder, step_of(folder), damaged(folder, got="no folder", rule="a folder stands here"))
    return _checked(inspect(folder), set())


def _checked(found: CheckpointInfo | DamagedFolder, known: set[str]) -> CheckpointInfo | DamagedFolder:
    """Verify all of a checkpoint, unless its digest is known already; then it is."""
    if isinstance(found, DamagedFolder) or found.digest in known:
        return found
    try:
        verify_checkpoint(found)
    except DamagedCheckpointError as error:
        return DamagedFolder(found.folder, found.step, error)
    known.add(found.digest)
    return found


def newest_verified(checkpoints: Path, facts: Iterable[ResumeFact] = ()) -> CheckpointInfo | None:
    """The newest checkpoint that is not fenced off and of which every byte verifies; changes nothing."""
    known = list(facts)
    for info in scan(checkpoints):
        if superseded_by(info.attempt, info.step, known):
            continue
        if isinstance(checked := _checked(info, set()), CheckpointInfo):
            return checked
    return None


def publish(tmp: Path, final: Path) -> None:
    """Give a complete, synced folder its final name, durably; what has the name is moved aside first."""
    if os.path.lexists(final):
        os.rename(final, final.with_name(f"{final.name}.replaced-{secrets.token_hex(4)}"))
    os.rename(tmp, final)
    files.sync_folder(final.parent)


def recover(checkpoints: Path) -> list[Path]:
    """Give back its name to what `publish` had moved aside when it was killed; the folders restored."""
    restored = []
    for path, match in _asides(checkpoints):
        final = checkpoints / match[1]
        if match[2] == "replaced" and not os.path.lexists(final):
            os.rename(path, final)
            restored.append(final)
    if restored:
        files.sync_folder(checkpoints)
    return restored


def set_aside(folder: Path, reason: str) -> Path:
    """Rename a folder so that it is never taken for a checkpoint again; its new path.

    Args:
        folder: a checkpoint, damaged or not.
        reason: one word of small letters, part of the new name (`damaged`, `fenced`, `fresh`).
    """
    target = folder.with_name(f"{folder.name.split('.')[0]}.set-aside-{reason}-{secrets.token_hex(4)}")
    assert _ASIDE.fullmatch(target.name), f"{target.name} would not be known again"
    os.rename(folder, target)
    files.sync_folder(folder.parent)
    return target


def set_aside_for(checkpoints: Path, reason: str) -> list[Path]:
    """Folders that were set aside for a reason."""
    return [path for path, match in _asides(checkpoints) if match[4] == reason]


def replaced(checkpoints: Path) -> list[Path]:
    """Folders that were moved aside for another of the same step, and not yet deleted."""
    return [path for path, match in _asides(checkpoints) if match[2] == "replaced"]


def delete(folder: Path) -> None:
    """Delete a folder; whenever this is interrupted, nothing is left that looks like a checkpoint."""
    match = _ASIDE.fullmatch(folder.name)
    doomed = folder
    if not match or match[2] != "deleted":
        doomed = folder.with_name(f"{folder.name.split('.')[0]}.deleted-{secrets.token_hex(4)}")
        os.rename(folder, doomed)
        files.sync_folder(folder.parent)
    shutil.rmtree(doomed)


def write_latest(checkpoints: Path, folder: Path) -> None:
    """Write the hint for people."""
    files.write_atomically(checkpoints / LATEST, f"{folder.name}\n".encode())


def claim(checkpoints: Path, attempt: int) -> None:
    """Tell older attempts that may still be alive to leave; an older one claims nothing."""
    if claimed(checkpoints) < attempt:
        files.make_folder(checkpoints)
        files.write_atomically(checkpoints / CLAIM, f"{attempt}\n".encode())


def claimed(checkpoints: Path) -> int:
    """The newest attempt that claimed; 0 where none did, or the file is no more what it was.

    It only makes a second writer leave early. What decides is `superseded_by`, when checkpoints are read.
    """
    try:
        text = files.read_small(checkpoints / CLAIM, 32).strip()
    except OSError:
        return 0
    return int(text) if text.isdigit() else 0


@dataclass(frozen=True)
class PruneReport:
    """What retention found and did (or would do)."""

    kept: list[CheckpointInfo] = field(default_factory=list)
    """Verified, newest first."""
    deleted: list[CheckpointInfo] = field(default_factory=list)
    damaged: list[DamagedFolder] = field(default_factory=list)
    """Not counted; set aside unless nothing else is left."""
    fenced: list[CheckpointInfo] = field(default_factory=list)
    """Superseded by a later attempt; not counted; set aside unless nothing else is left."""
    leftovers: list[Path] = field(default_factory=list)
    """Of writers and deleters that were killed; deleted."""

    @property
    def bytes_freed(self) -> int:
        """Size of the checkpoints that were deleted."""
        return sum(info.nbytes for info in self.deleted)


def prune(
    checkpoints: Path,
    keep_last: int,
    *,
    verified: set[str] | None = None,
    attempt: int | None = None,
    facts: Iterable[ResumeFact] = (),
    dry_run: bool = False,
) -> PruneReport:
    """Keep the newest `keep_last` checkpoints that verify, delete older ones; never the last that verifies.

    What is kept is verified first, whole, unless its digest is in `verified`: so what is damaged is not
    counted, and as long as nothing verifies nothing is deleted.

    Args:
        checkpoints: the folder.
        keep_last: at least 1.
        verified: digests of manifests whose checkpoints this process wrote or verified; added to.
        attempt: the attempt that calls. Checkpoints of later attempts are left alone: whoever would not die
            deletes nothing of its successors. Leftovers of writers up to it are deleted; None deletes none that
            a living writer might still use.
        facts: see `superseded_by`.
        dry_run: only report.
    """
    assert keep_last >= 1, f"keep_last is {keep_last}: the last checkpoint is never deleted"
    known, past = set() if verified is None else verified, list(facts)
    report = PruneReport()
    for found in survey(checkpoints):
        if isinstance(found, CheckpointInfo):
            if attempt is not None and found.attempt > attempt:
                continue
            if superseded_by(found.attempt, found.step, past):
                report.fenced.append(found)
                continue
            if len(report.kept) == keep_last:
                report.deleted.append(found)
                continue
        checked = _checked(found, known)
        if isinstance(checked, CheckpointInfo):
            report.kept.append(checked)
        else:
            report.damaged.append(checked)
    bad = {broken.folder for broken in report.damaged}
    report.leftovers.extend(_leftovers(checkpoints, attempt, bad))
    if not dry_run:
        _apply(report)
    return report


def _leftovers(checkpoints: Path, attempt: int | None, bad: set[Path]) -> list[Path]:
    """Folders that nobody will finish: of deleters, of writers up to `attempt`, replaced ones."""
    found = []
    for path, match in _asides(checkpoints):
        stale = match[3] is not None and attempt is not None and int(match[3]) <= attempt
        successor = checkpoints / match[1]
        replaced = match[2] == "replaced" and successor.is_dir() and successor not in bad
        if stale or replaced or match[2] == "deleted":
            found.append(path)
    return found


def _apply(report: PruneReport) -> None:
    if report.kept:
        for broken in report.damaged:
            set_aside(broken.folder, "damaged")
        for stray in report.fenced:
            set_aside(stray.folder, "fenced")
        # Oldest first: whatever interrupts this, the newest ones stand.
        for info in reversed(report.deleted):
            delete(info.folder)
    for path in report.leftovers:
        delete(path)
