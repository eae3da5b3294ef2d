"""Temporary folders on a real file system: of owners that live, that were killed, and that another's sweep meets."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

import launcher.scratch
from launcher.errors import LaunchConfigurationError
from launcher.scratch import LENGTH, ScratchFolder, lock_folder, remove_stale_folders
from tests.support.processes import Program, program_environment

PREFIX = "sol-test-"


def test_folders_of_dead_owners_are_removed_and_others_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "sol-test-stale123" / "t").mkdir(parents=True)
    (tmp_path / "sol-test-file1234").touch()
    (tmp_path / "sol-test-link1234").symlink_to(tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    held = tmp_path / "sol-test-held1234"
    held.mkdir()
    lock = lock_folder(held)
    assert lock is not None
    try:
        assert lock_folder(held) is None
        remove_stale_folders(PREFIX)
        left = ["kept", "sol-test-file1234", "sol-test-held1234", "sol-test-link1234"]
        assert sorted(path.name for path in tmp_path.iterdir()) == left
    finally:
        os.close(lock)
    remove_stale_folders(PREFIX)
    assert not held.exists()
    assert lock_folder(held) is None


def test_an_owner_that_is_killed_holds_nothing(tmp_path: Path) -> None:
    script = f"""
import os
from launcher.scratch import ScratchFolder
print(ScratchFolder({PREFIX!r}).path, flush=True)
os.kill(os.getpid(), 9)
"""
    with Program([sys.executable, "-c", script], log=tmp_path / "log", env=program_environment()) as program:
        program.wait(deadline=60.0)
        folder = Path(program.output().strip())
    assert folder.is_dir()
    remove_stale_folders(PREFIX)
    assert not folder.exists()


def test_it_is_short_private_and_locked_until_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for base in (str(tmp_path / ("long" * 10)), "/tmp"):
        monkeypatch.setattr(tempfile, "tempdir", base)
        scratch = ScratchFolder(PREFIX)
        try:
            assert scratch.path.parent == Path("/tmp")
            assert len(str(scratch.path)) <= LENGTH
            assert scratch.path.stat().st_mode & 0o777 == 0o700
            assert lock_folder(scratch.path) is None
            (scratch.path / "inside").mkdir()
        finally:
            scratch.remove()
        assert not scratch.path.exists()


def test_one_that_a_sweep_took_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def swept(folder: Path) -> int | None:
        made.append(folder)
        if len(made) == 1:
            folder.rmdir()
        return lock_folder(folder)

    monkeypatch.setattr(launcher.scratch, "lock_folder", swept)
    scratch = ScratchFolder(PREFIX)
    scratch.remove()
    assert (len(made), made[-1]) == (2, scratch.path)


def test_a_sweep_that_took_it_before_it_was_locked_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock = launcher.scratch.fcntl.flock

    def replaced(descriptor: int, operation: int) -> None:
        flock(descriptor, operation)
        tmp_path.joinpath("folder").rmdir()

    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(launcher.scratch.fcntl, "flock", replaced)
    assert lock_folder(tmp_path / "folder") is None


def test_one_that_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/self/fdinfo")
    with pytest.raises(LaunchConfigurationError, match="cannot be made") as caught:
        ScratchFolder(PREFIX)
    assert "/proc/self/fdinfo" in caught.value.got
