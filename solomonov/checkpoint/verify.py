"""Believe nothing of a checkpoint before its digests agree. Needs no torch."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from solomonov.checkpoint import files
from solomonov.checkpoint.format import (
    MANIFEST,
    MAX_JSON_BYTES,
    STATE,
    FormatError,
    Manifest,
    TensorRecord,
    UnsupportedVersionError,
    decode_manifest,
    parse_canonical,
)
from solomonov.errors import ConfigurationError, DamagedCheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The safetensors library refuses longer headers too."""

_DAMAGE = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.EINVAL,
    errno.ENXIO,
    errno.EFBIG,
    errno.EIO,
}
"""What opening or reading gives where a file is missing, is a link or no file, or its medium fails."""


def damaged(path: Path, *, got: str, rule: str) -> DamagedCheckpointError:
    """The error for a file whose bytes are not those that were committed."""
    return DamagedCheckpointError(
        f"the checkpoint file {path} is damaged",
        got=got,
        rule=rule,
        remedy="use an older checkpoint (a resuming run does so by itself), or restore the file from a copy",
    )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what the system says of a damaged or forbidden file into the error that the reader needs."""
    try:
        yield
    except OSError as error:
        if error.errno in _DAMAGE:
            raise damaged(path, got=str(error.strerror), rule="a regular, readable file stands here") from error
        if isinstance(error, PermissionError):
            raise ConfigurationError(
                f"no permission to read {path}",
                got=str(error.strerror),
                rule="the user who resumes or reads a run can read its checkpoints",
                remedy="change the file's owner or mode",
            ) from error
        raise


def open_manifest(folder: Path) -> tuple[Manifest, bytes]:
    """The manifest of a checkpoint and its bytes, verified in itself; no other file is touched.

    Raises:
        DamagedCheckpointError: missing, truncated, altered, or not believable.
        ConfigurationError: not readable by this user, or written by a later release.
        FileNotFoundError: there is no such folder.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such checkpoint folder", str(folder))
    with _reading(path):
        raw = files.read_small(path, MAX_JSON_BYTES)
    try:
        return decode_manifest(raw), raw
    except FormatError as error:
        raise damaged(path, got=str(error), rule="a manifest vouches for every bit of itself") from error
    except UnsupportedVersionError as error:
        raise ConfigurationError(
            f"the checkpoint {folder} was written by a later release",
            got=str(error),
            rule="a release reads its own format and those of the two before",
            remedy="install the release that wrote it, or a newer one",
        ) from error


def read_state(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """The document in state.json, after its digest was checked."""
    path = folder / STATE
    with _reading(path):
        raw = files.read_small(path, MAX_JSON_BYTES)
    _compare(path, manifest, len(raw), files.digest_bytes(raw))
    try:
        document = parse_canonical(raw)
    except FormatError as error:
        raise damaged(path, got=str(error), rule="canonical JSON") from error
    if not isinstance(document.get("scalars"), dict) or not isinstance(document.get("state"), dict):
        raise damaged(path, got=f"fields {sorted(document)}", rule="it holds `scalars` and `state`")
    return document


def verify_files(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> int:
    """Compare the digests of whole files with the manifest, and the tables of tensor files with its records.

    Args:
        folder: the checkpoint.
        manifest: as `open_manifest` gave it.
        names: files to verify; None is all of them.

    Returns:
        The number of bytes that were read and found good.

    Raises:
        DamagedCheckpointError: names the first damaged file, both sizes and both digests.
    """
    total = 0
    for name in sorted(manifest.files) if names is None else names:
        path = folder / name
        with _reading(path):
            size, digest = files.digest_file(path)
        _compare(path, manifest, size, digest)
        if name == STATE:
            read_state(folder, manifest)
        else:
            tensor_table(folder, name, [r for r in manifest.tensors if r.file == name])
        total += size
    return total


def _compare(path: Path, manifest: Manifest, size: int, digest: str) -> None:
    entry = manifest.files[path.name]
    if (size, digest) != (entry.size, entry.xxh3_128):
        got, rule = f"{size} bytes, xxh3-128 {digest}", f"{entry.size} bytes, xxh3-128 {entry.xxh3_128}"
        raise damaged(path, got=got, rule=f"{rule}, says the manifest")


def tensor_table(folder: Path, name: str, records: Iterable[TensorRecord]) -> dict[str, tuple[int, int]]:
    """Where the fragments of one safetensors file lie: key -> (first byte, bytes), within the file.

    Only says where to look: what is found there is believed after its own digest.

    Raises:
        DamagedCheckpointError: the header is no safetensors header, or differs from the records.
    """
    path = folder / name
    with _reading(path), files.open_regular(path) as descriptor:
        size, head = os.fstat(descriptor).st_size, bytearray(8)
        files.read_into(descriptor, memoryview(head), 0)
        length = int.from_bytes(head, "little")
        if length > min(MAX_HEADER_BYTES, size):
            raise damaged(path, got=f"a header of {length} bytes", rule=f"at most {MAX_HEADER_BYTES}, in the file")
        text = bytearray(length)
        found = files.read_into(descriptor, memoryview(text), 8)
    if found != length:
        raise damaged(path, got=f"{found} bytes of header", rule=f"{length}, as the file's first 8 bytes say")
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(path, got=f"a header that is not JSON: {error}", rule="a safetensors header") from error
    by_key = {record.key: record for record in records}
    if not isinstance(table, dict) or table.keys() != by_key.keys():
        raise damaged(path, got="a header of other tensors", rule="the tensors that the manifest lists")
    return {key: _place(path, table[key], record, 8 + length, size) for key, record in by_key.items()}


def _place(path: Path, entry: Any, record: TensorRecord, base: int, size: int) -> tuple[int, int]:
    """First byte and length of one fragment, where its header entry agrees with its record."""
    offsets = entry.get("data_offsets") if isinstance(entry, Mapping) else None
    if not isinstance(offsets, list) or not all(type(offset) is int for offset in offsets) or len(offsets) != 2:
        _no_place(path, record, entry)
    begin, end = offsets
    shape = [record.end - record.start]
    if entry.get("dtype") != record.dtype or entry.get("shape") != shape or end - begin != record.nbytes:
        _no_place(path, record, entry)
    if begin < 0 or base + end > size:
        _no_place(path, record, entry)
    return base + begin, record.nbytes


def _no_place(path: Path, record: TensorRecord, entry: Any) -> NoReturn:
    rule = f"{record.dtype}, {record.end - record.start} elements, {record.nbytes} bytes within the file"
    raise damaged(path, got=f"header entry {record.key}: {str(entry)[:200]}", rule=rule)


def read_fragment(folder: Path, record: TensorRecord, offset: int, target: memoryview) -> None:
    """Fill `target` with the bytes of one fragment and compare their digest with its record's.

    Raises:
        DamagedCheckpointError: the file ends too early, or has other bytes.
    """
    path = folder / record.file
    with _reading(path), files.open_regular(path) as descriptor:
        found = files.read_into(descriptor, target, offset)
    digest = files.digest_bytes(target)
    if found != target.nbytes or digest != record.xxh3_128:
        got = f"{record.key}: {found} bytes, xxh3-128 {digest}"
        raise damaged(path, got=got, rule=f"{target.nbytes} bytes, xxh3-128 {record.xxh3_128}")
