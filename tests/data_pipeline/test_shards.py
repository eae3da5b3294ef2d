"""Shards read back with webdataset, with tarfile and by the index's own offsets, against the blocks written."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DamagedDataError
from data_pipeline.manifest import digest_hex, pair_hex
from data_pipeline.shards import Block, block_records, file_record, index_name, read_index, shard_name, write_shard

SHARD = shard_name("own", "train", 0)


def make_blocks(count: int = 3, dtype: str = "uint16", seed: int = 0) -> list[Block]:
    draw = np.random.default_rng(seed)
    blocks = []
    for number in range(count):
        lengths = draw.integers(2, 50, size=number + 1)
        tokens = draw.integers(0, 60_000, size=int(lengths.sum())).astype(dtype)
        documents: list[dict[str, str | int]] = [
            {"source": "own", "path": f"é/{each}.txt", "index": each} for each in range(number + 1)
        ]
        blocks.append(Block(tokens, lengths, documents, text_bytes=100 * number))
    return blocks


def write(folder: Path, blocks: list[Block], shard: str = SHARD) -> Path:
    write_shard(folder, folder / "aside", shard, blocks)
    return folder / shard


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_webdataset_and_tarfile_read_what_was_written(tmp_path: Path, dtype: str) -> None:
    import webdataset

    blocks = make_blocks(dtype=dtype)
    path = write(tmp_path, blocks)
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["000000", "000001", "000002"]
    for sample, block in zip(samples, blocks, strict=True):
        assert (np.frombuffer(sample["tokens.bin"], dtype=dtype) == block.tokens).all()
        assert (np.frombuffer(sample["lengths.bin"], dtype="<u4") == block.lengths).all()
        assert json.loads(sample["documents.json"]) == block.documents
    with tarfile.open(path, "r:") as tar:
        members = tar.getmembers()
    assert len(members) == 9
    assert {(each.mtime, each.uid, each.gid, each.uname, each.gname, each.type) for each in members} == {
        (0, 0, 0, "", "", tarfile.REGTYPE)
    }
    assert not any(each.pax_headers for each in members)
    size = sum(-(-each.size // 512) * 512 + 512 for each in members)
    assert path.stat().st_size - size < 2 * 10240, "one header of 512 bytes a member, no more"


def test_the_index_and_the_block_array_locate_every_member(tmp_path: Path) -> None:
    shards = [shard_name("own", "train", number) for number in range(2)]
    blocks = [make_blocks(2, seed=1), make_blocks(3, seed=2)]
    for name, content in zip(shards, blocks, strict=True):
        write(tmp_path, content, name)
        raw = (tmp_path / name).read_bytes()
        for member in read_index(tmp_path / index_name(name))["members"]:
            data = raw[member["offset"] : member["offset"] + member["size"]]
            assert digest_hex(data) == member["xxh3_128"]
    records = block_records(tmp_path, shards)
    flat = [(shard, block) for shard, content in enumerate(blocks) for block in content]
    assert len(records) == len(flat)
    for record, (shard, block) in zip(records, flat, strict=True):
        raw = (tmp_path / shards[shard]).read_bytes()
        assert record["shard"] == shard
        assert (record["documents"], record["tokens"]) == (len(block.lengths), len(block.tokens))
        assert record["text_bytes"] == block.text_bytes
        tokens = raw[int(record["tokens_offset"]) :][: int(record["tokens_size"])]
        lengths = raw[int(record["lengths_offset"]) :][: int(record["lengths_size"])]
        assert (np.frombuffer(tokens, "<u2") == block.tokens).all()
        assert (np.frombuffer(lengths, "<u4") == block.lengths).all()
        assert pair_hex(tuple(record["digest_tokens"].tolist())) == digest_hex(tokens)
        assert pair_hex(tuple(record["digest_lengths"].tolist())) == digest_hex(lengths)


def test_equal_blocks_give_equal_bytes_and_nothing_is_left_aside(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, make_blocks()) for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    assert list((tmp_path / "a" / "aside").iterdir()) == []
    record = file_record(tmp_path / "a", SHARD)
    assert (record["size"], record["xxh3_128"]) == (first.stat().st_size, digest_hex(first.read_bytes()))


def test_a_block_that_does_not_add_up_is_never_written(tmp_path: Path) -> None:
    [block] = make_blocks(1)
    for bad in (
        Block(block.tokens[1:], block.lengths, block.documents, 0),
        Block(block.tokens, block.lengths, [], 0),
    ):
        with pytest.raises(AssertionError, match="do not add up"):
            write(tmp_path, [bad])
    assert not (tmp_path / SHARD).exists()


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"schema_version": 2, "members": [], "blocks": []}', b'{"schema_version": 1}']
)
def test_a_damaged_index_is_refused(tmp_path: Path, damage: bytes) -> None:
    write(tmp_path, make_blocks())
    path = tmp_path / index_name(SHARD)
    path.write_bytes(damage)
    with pytest.raises(DamagedDataError, match=r"index\.json is damaged"):
        read_index(path)
