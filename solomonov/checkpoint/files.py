"""Files, as a checkpoint needs them: durable writes, reads that follow no link, digests of what lies on disk.

Everything goes through the functions of `os`, one system call each: the tests end the process before and
in the middle of every one of them.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

CHUNK_BYTES = 8 << 20
"""What one read or write asks for: large enough for any disk, small beside a model."""


def digest_bytes(data: bytes | bytearray | memoryview) -> str:
    """xxh3-128 in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(data)


def write_all(descriptor: int, data: memoryview | bytes) -> None:
    """Write all of `data`, in chunks."""
    view = memoryview(data)
    while view.nbytes:
        view = view[os.write(descriptor, view[:CHUNK_BYTES]) :]


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Give errors of calls on a descriptor the name of the file, which the system does not know."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def new_file(path: Path) -> Iterator[int]:
    """A descriptor to write a file that must not exist yet; synced to disk and closed after the block."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    with _named(path):
        try:
            yield descriptor
            os.fsync(descriptor)
            _forget_cache(descriptor)
        finally:
            os.close(descriptor)


def _forget_cache(descriptor: int) -> None:
    """Ask the kernel to drop the file's clean pages, so that reading it back reads the storage."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def sync_folder(folder: Path) -> None:
    """Make creations, renames and removals inside the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with _named(folder):
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file: whoever opens `path` finds the old bytes or all of the new ones, also after a crash."""
    aside = path.with_name(path.name + ".tmp")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with _named(path):
        try:
            write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    os.replace(aside, path)
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, each durable; existing ones are fine."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    try:
        os.mkdir(folder)
    except FileExistsError:
        return
    sync_folder(folder.parent)


@contextmanager
def open_regular(path: Path) -> Iterator[int]:
    """A descriptor to read a regular file. OSError(ELOOP, EINVAL) on a link, a pipe or a folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        yield descriptor
    finally:
        os.close(descriptor)


def read_into(descriptor: int, target: memoryview, offset: int) -> int:
    """Fill `target` from `offset`; the bytes read, fewer only at the end of the file."""
    done = 0
    while done < target.nbytes:
        count = os.preadv(descriptor, [target[done : done + CHUNK_BYTES]], offset + done)
        if not count:
            break
        done += count
    return done


def read_small(path: Path, max_bytes: int) -> bytes:
    """A whole file of at most `max_bytes`, else OSError(EFBIG)."""
    with open_regular(path) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > max_bytes:
            raise OSError(errno.EFBIG, f"{size} bytes, at most {max_bytes} are believable", str(path))
        data = bytearray(size)
        return bytes(data[: read_into(descriptor, memoryview(data), 0)])


def digest_file(path: Path) -> tuple[int, str]:
    """(size in bytes, xxh3-128) of what lies on disk, read in chunks."""
    hasher, buffer, size = xxhash.xxh3_128(), memoryview(bytearray(CHUNK_BYTES)), 0
    with open_regular(path) as descriptor:
        while count := read_into(descriptor, buffer, size):
            hasher.update(buffer[:count])
            size += count
    return size, hasher.hexdigest()


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write to the file system of a folder."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize
