"""A temporary folder for as long as its owner lives: what an owner that was killed left behind, the next removes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from launcher.errors import LaunchConfigurationError

LENGTH = 41
"""Characters that the path of a folder may have: Ray puts sockets beneath, whose names have 107 bytes at most."""


class ScratchFolder:
    """A new folder that only this user can read, locked until it is removed.

    Args:
        prefix: what its name begins with, the same for all that `remove_stale_folders` should find.

    Raises:
        LaunchConfigurationError: it cannot be made.
    """

    def __init__(self, prefix: str) -> None:
        base = tempfile.gettempdir()
        if len(f"{base}/{prefix}12345678") > LENGTH:  # mkdtemp adds 8 characters
            base = "/tmp"
        # Between the making and the locking, a sweep of another process may take it for a stale one: make another.
        lock = None
        while lock is None:
            self.path = _make(prefix, base)
            lock = lock_folder(self.path)
        self._lock = lock

    def remove(self) -> None:
        """Remove it with all that is in it; what cannot be removed now, the next owner removes."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def remove_stale_folders(prefix: str) -> None:
    """Remove the folders of this user whose owners are dead."""
    for base in {tempfile.gettempdir(), "/tmp"}:
        for folder in Path(base).glob(f"{prefix}*"):
            with contextlib.suppress(FileNotFoundError):  # another sweep was faster
                if folder.lstat().st_uid == os.getuid() and (lock := lock_folder(folder)) is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                    os.close(lock)


def lock_folder(folder: Path) -> int | None:
    """An exclusive lock on a folder, held while the descriptor is open; None if another has it, or it is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    held = False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = os.path.samestat(os.fstat(descriptor), os.stat(folder))
    except OSError:
        pass  # somebody holds it, or removed it before we held it
    finally:
        if not held:
            os.close(descriptor)
    return descriptor if held else None


def _make(prefix: str, base: str) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix=prefix, dir=base))
    except OSError as error:
        raise LaunchConfigurationError(
            "a temporary folder cannot be made",
            got=f"{base}: {error.strerror}",
            rule="a temporary folder in which this user may create files, on a disk that is not full",
            remedy="mend its permissions, or name another, short one in TMPDIR",
        ) from error
