"""Write a checkpoint: one safetensors file a rank, then the manifest, then one rename.

Steps of a commit: every rank's file is written, synced and read back; the fragments are checked to tile every
tensor exactly once; `state.json`, then `MANIFEST.json` (aside, sync, rename, sync); the folder is renamed and
its parent synced. Before that last sync nothing may be called durable.
"""

from __future__ import annotations

import errno
import itertools
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from solomonov.checkpoint import files, store
from solomonov.checkpoint.format import (
    MANIFEST,
    SCHEMA_VERSION,
    STATE,
    FileEntry,
    Manifest,
    RankEntry,
    TensorId,
    TensorRecord,
    canonical,
    check_tiling,
    encode_manifest,
)
from solomonov.checkpoint.fragments import Fragment, host_bytes


@dataclass(frozen=True)
class Header:
    """What a checkpoint says besides its tensors."""

    run_id: str
    step: int
    attempt: int
    parent_step: int | None = None
    topology: Mapping[str, Any] = field(default_factory=dict)
    scalars: Mapping[str, Any] = field(default_factory=dict)
    """Optimizer state that is one number, such as `step`; plain JSON, finite."""
    state: Mapping[str, Any] = field(default_factory=dict)
    """Everything else that is needed to go on: data position, schedule, digests; plain JSON, finite."""


def rank_file(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def safetensors_header(fragments: Sequence[Fragment]) -> bytes:
    """Length and JSON header of a safetensors file that holds the fragments in the given order."""
    table: dict[str, Any] = {}
    offset = 0
    for fragment in fragments:
        shape, offsets = [fragment.end - fragment.start], [offset, offset + fragment.nbytes]
        table[fragment.key] = {"dtype": fragment.dtype, "shape": shape, "data_offsets": offsets}
        offset += fragment.nbytes
    text = json.dumps(table, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_rank_file(folder: Path, rank: int, fragments: Iterable[Fragment]) -> RankEntry:
    """Write one rank's fragments to `folder`, sync the file, read it back and compare.

    Fragments are streamed: the host holds no copy of them, and one at a time of those on a device. Empty
    ones of tensors that have elements are left out.

    Raises:
        ValueError: the same (kind, name, start) twice.
        OSError: disk full and the like; EIO where the bytes read back are not those written.
    """
    assert sys.byteorder == "little", "safetensors holds little-endian numbers; so must this machine"
    # Wide elements first: every tensor in the file is then aligned to its own element size.
    kept = sorted(
        (fragment for fragment in fragments if not fragment.empty),
        key=lambda f: (-f.data.element_size(), f.kind, f.name, f.start),
    )
    for before, after in itertools.pairwise(kept):
        if before.key == after.key:
            raise ValueError(f"rank {rank} holds the fragment {after.key} twice")
    path = folder / rank_file(rank)
    header = safetensors_header(kept)
    written, digests = xxhash.xxh3_128(header), []
    with files.new_file(path) as descriptor:
        files.write_all(descriptor, header)
        for fragment in kept:
            data = host_bytes(fragment.data)
            digests.append(files.digest_bytes(data))
            written.update(data)
            files.write_all(descriptor, data)
    size, found = files.digest_file(path)
    expected_size = len(header) + sum(fragment.nbytes for fragment in kept)
    if (size, found) != (expected_size, written.hexdigest()):
        raise OSError(
            errno.EIO,
            f"read back {size} bytes of xxh3-128 {found}, wrote {expected_size} of {written.hexdigest()}",
            str(path),
        )
    records = tuple(
        TensorRecord(
            name=fragment.name,
            kind=fragment.kind,
            dtype=fragment.dtype,
            shape=fragment.shape,
            start=fragment.start,
            end=fragment.end,
            file=path.name,
            key=fragment.key,
            xxh3_128=digest,
        )
        for fragment, digest in zip(kept, digests, strict=True)
    )
    return RankEntry(rank=rank, file=path.name, entry=FileEntry(size=size, xxh3_128=found), records=records)


def commit(
    tmp: Path,
    final: Path,
    *,
    entries: Sequence[RankEntry],
    expected: Mapping[TensorId, tuple[int, ...]],
    header: Header,
) -> store.CheckpointInfo:
    """Turn a folder of rank files into a checkpoint, durable when this returns.

    Args:
        tmp: folder beside `final` that holds the ranks' files.
        final: folder to be; a checkpoint that stands there is moved aside first (`store.move_aside`).
        entries: what every rank reported.
        expected: (name, kind) -> shape of every tensor that must be there.
        header: the rest.

    Raises:
        TilingError: the fragments do not tile what is expected exactly once; nothing was renamed.
        ValueError: state or scalars are not plain finite JSON, or two entries are of the same rank.
        OSError: disk full and the like.
    """
    if len({entry.rank for entry in entries}) != len(entries):
        raise ValueError(f"two entries of one rank: {sorted(entry.rank for entry in entries)}")
    records = [record for entry in entries for record in entry.records]
    check_tiling(records, expected)
    listed = {entry.file: entry.entry for entry in entries}
    for name, entry in listed.items():
        size = (tmp / name).stat().st_size
        if size != entry.size:
            raise OSError(errno.EIO, f"{size} bytes here, {entry.size} where it was written", str(tmp / name))
    state = canonical({"schema_version": SCHEMA_VERSION, "scalars": dict(header.scalars), "state": dict(header.state)})
    listed[STATE] = _write_checked(tmp / STATE, state)
    manifest = Manifest(
        run_id=header.run_id,
        step=header.step,
        parent_step=header.parent_step,
        attempt=header.attempt,
        created=time.time(),
        topology=dict(header.topology),
        files=listed,
        tensors=tuple(sorted(records, key=lambda r: (r.kind, r.name, r.start))),
    )
    raw = encode_manifest(manifest)
    _write_checked(tmp / MANIFEST, raw)
    store.publish(tmp, final)
    return store.info_of(final, manifest, raw)


def _write_checked(path: Path, data: bytes) -> FileEntry:
    """Write a small file durably and compare what lies on disk; OSError(EIO) where it differs."""
    files.write_atomically(path, data)
    size, digest = files.digest_file(path)
    if digest != files.digest_bytes(data):
        raise OSError(errno.EIO, "bytes read back are not those written", str(path))
    return FileEntry(size=size, xxh3_128=digest)
