"""Writing files so that a name never stands for half a file, and saying clearly why one cannot be written."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from data_pipeline.errors import DataConfigurationError

NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_PERMISSION: Final = (errno.EACCES, errno.EPERM, errno.EROFS)


def write_atomically(path: Path, aside: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Calls `write` on a file in the folder `aside`, fsyncs it, renames it to `path`, fsyncs the folder.

    `aside` must lie on the same file system as `path`. Whatever interrupts this, `path` is either what it was
    or the whole new file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside.mkdir(parents=True, exist_ok=True)
    # A name of its own keeps two processes that write the same file apart: the later rename wins, with equal bytes.
    # On a disk that machines share, their pids would not.
    unfinished = aside / f"{path.parent.name}-{path.name}.{secrets.token_hex(8)}.tmp"
    try:
        with unfinished.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    fsync_folder(path.parent)


def write_bytes(path: Path, aside: Path, content: bytes) -> None:
    """`write_atomically` of bytes."""

    def write(file: IO[bytes]) -> None:
        file.write(content)

    write_atomically(path, aside, write)


def write_json(path: Path, aside: Path, content: object) -> None:
    """`write_atomically` of canonical JSON (sorted keys, ASCII, a newline at the end)."""
    write_bytes(path, aside, json_bytes(content))


def json_bytes(content: object) -> bytes:
    """Canonical bytes of a JSON document."""
    return json.dumps(content, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False).encode() + b"\n"


def write_array(path: Path, aside: Path, array: np.ndarray[Any, Any]) -> None:
    """`write_atomically` of one array in .npy format, without pickle."""

    def write(file: IO[bytes]) -> None:
        np.lib.format.write_array(file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)

    write_atomically(path, aside, write)


def open_array(path: Path) -> np.ndarray[Any, Any]:
    """Memory-maps a .npy file read-only (an empty array is read, as it cannot be mapped)."""
    array: np.ndarray[Any, Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def fsync_folder(folder: Path) -> None:
    """Makes renames within `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explained_os_errors(folder: Path) -> Iterator[None]:
    """Turns a full disk and missing permissions into one clear message; other OSErrors pass.

    Raises:
        DataConfigurationError: the disk is full, or a file may not be read or written.
    """
    try:
        yield
    except OSError as error:
        where = error.filename or folder
        got = f"{where}: {error.strerror}"
        if error.errno in NO_SPACE:
            raise DataConfigurationError(
                "The disk is full, or a limit on file sizes was reached.",
                got=got,
                rule=f"room for the dataset in {folder}",
                remedy="make room (or set data.folder to another disk) and run the same command again: "
                "finished tasks are kept",
            ) from error
        if error.errno in NO_PERMISSION:
            raise DataConfigurationError(
                f"There is no permission to use {where}.",
                got=got,
                rule=f"input files must be readable and {folder} writable for this user",
                remedy="change the permissions, or set data.folder to a folder of yours",
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise DataConfigurationError(
                f"{folder} cannot be used as a dataset folder.",
                got=got,
                rule="data.folder names a folder, or a place where one can be made",
                remedy="set data.folder to another place",
            ) from error
        raise
