"""Shards: writing blocks as WebDataset tars with an index beside each. The only importer of `webdataset`.

A block is one sample: `KEY.documents.json` (where each document comes from), `KEY.lengths.bin` (uint32,
tokens of each document) and `KEY.tokens.bin` (token ids one after the other). Members have mtime, uid and
gid 0 and no owner names, so equal blocks give equal bytes.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DamagedDataError
from data_pipeline.files import write_atomically, write_json
from data_pipeline.manifest import BLOCK_DTYPE, FileRecord, digest_hex

INDEX_SCHEMA_VERSION: Final = 1
LENGTH_DTYPE: Final = np.dtype("<u4")
MEMBERS: Final = ("documents.json", "lengths.bin", "tokens.bin")
"""Members of a block, in the order of the tar."""


@dataclass(frozen=True, slots=True)
class Block:
    """One block, ready to be written."""

    tokens: NDArray[Any]
    """(tokens,): token ids in the stored type."""
    lengths: NDArray[np.int64]
    """(documents,): tokens of each document or part."""
    documents: list[dict[str, str | int]]
    """Origin of each document or part."""
    text_bytes: int
    """UTF-8 bytes of the text."""


def shard_name(source: str, split: str, number: int) -> str:
    """Path of a shard below the dataset folder."""
    return f"shards/{source}-{split}-{number:06d}.tar"


def index_name(shard: str) -> str:
    """Path of the index beside a shard."""
    return shard.removesuffix(".tar") + ".index.json"


def provenance_bytes(documents: list[dict[str, str | int]]) -> bytes:
    """The documents.json member of a block."""
    return json.dumps(documents, sort_keys=True, separators=(",", ":")).encode("ascii")


def write_shard(folder: Path, aside: Path, shard: str, blocks: Iterable[Block]) -> int:
    """Writes a shard and its index, each aside first and then renamed; returns the number of blocks.

    Raises:
        OSError: a file cannot be written.
        DamagedDataError: what was written does not read back as it should.
    """
    contents: list[dict[str, int]] = []
    digests: list[tuple[str, int, str]] = []
    members: list[dict[str, str | int]] = []

    def write(file: IO[bytes]) -> None:
        # webdataset imports torch if it is there (a second); only this task pays for it.
        import webdataset

        writer = webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="")
        for number, block in enumerate(blocks):
            assert int(block.lengths.sum()) == len(block.tokens), f"block {number}: lengths do not add up"
            assert len(block.lengths) == len(block.documents), f"block {number}: origins do not add up"
            key = f"{number:06d}"
            payload = (
                provenance_bytes(block.documents),
                block.lengths.astype(LENGTH_DTYPE).tobytes(),
                block.tokens.astype(block.tokens.dtype.newbyteorder("<")).tobytes(),
            )
            writer.write({"__key__": key, **dict(zip(MEMBERS, payload, strict=True))})
            for member, data in zip(MEMBERS, payload, strict=True):
                digests.append((f"{key}.{member}", len(data), digest_hex(data)))
            contents.append(
                {
                    "documents": len(block.lengths),
                    "tokens": len(block.tokens),
                    "bytes": block.text_bytes,
                }
            )
        writer.close()
        file.flush()
        members.extend(_members(Path(file.name), shard, digests))

    write_atomically(folder / shard, aside, write)
    index = {"schema_version": INDEX_SCHEMA_VERSION, "shard": shard, "members": members, "blocks": contents}
    write_json(folder / index_name(shard), aside, index)
    return len(contents)


def _members(path: Path, shard: str, written: list[tuple[str, int, str]]) -> list[dict[str, str | int]]:
    """Where the members lie, read back from the file itself."""
    with tarfile.open(path, "r:") as tar:
        found = [(member.name, member.offset_data, member.size) for member in tar]
    if [(name, size) for name, _, size in found] != [(name, size) for name, size, _ in written]:
        raise DamagedDataError(
            f"{shard} does not read back as it was written.",
            got=f"{len(found)} members",
            rule=f"the {len(written)} members that were written, with their names and sizes",
            remedy="check the disk and run `solomonov prepare` again",
        )
    return [
        {"name": name, "offset": offset, "size": size, "xxh3_128": digest}
        for (name, offset, size), (_, _, digest) in zip(found, written, strict=True)
    ]


def read_index(path: Path) -> dict[str, Any]:
    """The index of a shard.

    Raises:
        DamagedDataError: it is not an index that this version wrote.
    """
    try:
        index = json.loads(path.read_bytes())
        known = index["schema_version"] == INDEX_SCHEMA_VERSION
        whole = len(index["members"]) == len(MEMBERS) * len(index["blocks"])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged_index(path, repr(error)) from error
    if not known or not whole:
        raise _damaged_index(path, "another schema, or members that do not match the blocks")
    assert isinstance(index, dict), "an index with keys is a dict"
    return index


def block_records(folder: Path, shards: list[str]) -> NDArray[Any]:
    """The block array of a split, from the indexes of its shards in order."""
    parts = [np.zeros(0, dtype=BLOCK_DTYPE)]
    for number, shard in enumerate(shards):
        index = read_index(folder / index_name(shard))
        members = {member["name"]: member for member in index["members"]}
        records = np.zeros(len(index["blocks"]), dtype=BLOCK_DTYPE)
        for block, content in enumerate(index["blocks"]):
            record = records[block]
            record["shard"] = number
            for what in ("tokens", "lengths"):
                member = members[f"{block:06d}.{what}.bin"]
                record[f"{what}_offset"], record[f"{what}_size"] = member["offset"], member["size"]
                digest = int(member["xxh3_128"], 16)
                record[f"digest_{what}"] = (digest >> 64, digest & 0xFFFFFFFFFFFFFFFF)
            record["documents"], record["tokens"] = content["documents"], content["tokens"]
            record["text_bytes"] = content["bytes"]
        parts.append(records)
    return np.concatenate(parts)


def file_record(folder: Path, file: str) -> dict[str, str | int]:
    """Name, size and digest of a file of the dataset, as a task reports them."""
    record: dict[str, str | int] = FileRecord.of(folder, file).model_dump(mode="json")
    return record


def _damaged_index(path: Path, got: str) -> DamagedDataError:
    return DamagedDataError(
        f"{path} is damaged.",
        got=got,
        rule="the index that `prepare` wrote beside the shard",
        remedy="run `solomonov prepare` again: it rebuilds the shard",
    )
