"""The open dataset: blocks equal to the documents that were written, and every damage to a shard found."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline import dataset as dataset_module
from data_pipeline.dataset import BlockCache, Dataset
from data_pipeline.errors import DamagedDataError, DataConfigurationError
from data_pipeline.manifest import Manifest, digest_hex, pair_hex
from data_pipeline.order import RowAddress
from data_pipeline.packing import pack_block
from tests.support.datasets import make_documents, write_dataset

T = 16
DOCUMENTS = make_documents(5, 200, 20)
HELD_OUT = make_documents(6, 12, 20)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(
        tmp_path,
        {"own": DOCUMENTS},
        sequence_tokens=T,
        packing="best_fit",
        held_out={"own": HELD_OUT},
        block_tokens=129,
    )
    return tmp_path


def read_all(folder: Path) -> None:
    with Dataset.open(folder) as dataset:
        for split in ("train", "held_out"):
            for block in range(dataset.split("own", split).block_count):
                dataset.packed_block("own", split, block, T, "best_fit")


def test_blocks_hold_the_documents_in_order(folder: Path) -> None:
    with Dataset.open(folder) as dataset:
        for split, documents in (("train", DOCUMENTS), ("held_out", HELD_OUT)):
            parts = []
            for number, record in enumerate(dataset.blocks("own", split)):
                block = dataset.read_block("own", split, number)
                assert block.tokens.dtype == np.uint16
                assert not block.tokens.flags.writeable
                assert (len(block.lengths), len(block.tokens)) == (record["documents"], record["tokens"])
                parts += np.split(block.tokens, np.cumsum(block.lengths)[:-1])
            whole = [part.tolist() for part in parts if part[0] == 1]
            assert len(whole) == len(documents)
            assert whole == [
                document[:129].tolist() if len(document) > 129 else document.tolist() for document in documents
            ]


def test_large_vocabularies_are_stored_in_four_bytes(tmp_path: Path) -> None:
    documents = make_documents(1, 100, 20, vocab_size=200_000)
    write_dataset(tmp_path, {"own": documents}, sequence_tokens=T, packing="concat", vocab_size=200_000)
    with Dataset.open(tmp_path) as dataset:
        assert dataset.manifest.token_dtype == "uint32"
        block = dataset.read_block("own", "train", 0)
        assert block.tokens[: len(documents[0])].tolist() == documents[0].tolist()


def test_packed_blocks_are_the_packing_of_their_lengths(folder: Path) -> None:
    with Dataset.open(folder) as dataset:
        packed = dataset.packed_block("own", "train", 3, T, "best_fit")
        rows = pack_block(packed.block.lengths, T, "best_fit")
        starts = np.cumsum(packed.block.lengths) - packed.block.lengths
        flat = [(int(starts[document]) + start, positions) for row in rows for document, start, positions in row]
        assert [tuple(piece) for piece in packed.pieces.tolist()] == flat
        assert dataset.rows("own", "train", T, "best_fit")[3] == packed.pack.rows == len(rows)
        assert packed.nbytes > packed.block.tokens.nbytes


@dataclass
class Victim:
    """One member of a block in the middle of the training split, and where it lies."""

    path: Path
    member: str
    offset: int
    size: int
    digest: str
    block: int


def victim(folder: Path, what: str) -> Victim:
    with Dataset.open(folder) as dataset:
        blocks = dataset.blocks("own", "train")
        block = len(blocks) // 2
        record = blocks[block]
        number = block - int(np.flatnonzero(blocks["shard"] == record["shard"])[0])
        path = folder / dataset.split("own", "train").shards[int(record["shard"])].file
        offset, size = int(record[f"{what}_offset"]), int(record[f"{what}_size"])
        digest = pair_hex(tuple(record[f"digest_{what}"].tolist()))
        return Victim(path, f"{number:06d}.{what}.bin", offset, size, digest, block)


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize("what", ["tokens", "lengths"])
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_flipped_bit_is_found_and_the_message_names_it_all(folder: Path, what: str, place: str) -> None:
    hurt = victim(folder, what)
    flip(hurt.path, hurt.offset if place == "first" else hurt.offset + hurt.size - 1)
    damaged = digest_hex(hurt.path.read_bytes()[hurt.offset : hurt.offset + hurt.size])
    with Dataset.open(folder) as dataset:
        dataset.read_block("own", "train", 0)
        with pytest.raises(DamagedDataError) as raised:
            dataset.read_block("own", "train", hurt.block)
    message = str(raised.value)
    for part in (str(hurt.path), hurt.member, hurt.digest, damaged, "solomonov prepare"):
        assert part in message
    assert raised.value.exit_code == 74


def replace_by_another(path: Path) -> None:
    others = sorted(path.parent.glob("own-train-*.tar"))
    data = next(other.read_bytes() for other in others if other != path)
    size = path.stat().st_size
    path.write_bytes(data[:size].ljust(size, b"\0"))


def swap_blocks(path: Path) -> None:
    with tarfile.open(path) as tar:
        first, second = (tar.getmember(f"00000{number}.tokens.bin") for number in (0, 1))
    data = bytearray(path.read_bytes())
    size = min(first.size, second.size)
    a, b = first.offset_data, second.offset_data
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-600]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(bytes(path.stat().st_size)),
        lambda path: path.unlink(),
        lambda path: (path.unlink(), path.mkdir()),
        replace_by_another,
        swap_blocks,
    ],
    ids=["truncated", "emptied", "zeroed", "missing", "a folder", "replaced", "blocks swapped"],
)
def test_a_shard_that_was_changed_after_the_manifest_is_found(folder: Path, damage: Callable[[Path], Any]) -> None:
    read_all(folder)
    path = folder / Manifest.load(folder).sources[0].train.shards[1].file
    damage(path)
    with pytest.raises(DamagedDataError) as raised:
        read_all(folder)
    assert str(path) in str(raised.value)
    assert "digest" in raised.value.rule
    assert "solomonov prepare" in raised.value.remedy


def test_a_shard_that_shrinks_or_goes_while_it_is_open_is_found(folder: Path) -> None:
    with Dataset.open(folder) as dataset:
        shards = dataset.split("own", "train").shards
        os.truncate(folder / shards[0].file, 100)
        with pytest.raises(DamagedDataError, match="damaged") as raised:
            dataset.read_block("own", "train", 0)
        assert "bytes)" in raised.value.got
        (folder / shards[1].file).unlink()
        block = shards[0].blocks
        with pytest.raises(DamagedDataError) as raised:
            dataset.read_block("own", "train", block)
        assert raised.value.got == "No such file or directory"
        assert shards[1].file in raised.value.what
        (folder / shards[2].file).unlink()
        (folder / shards[2].file).mkdir()
        with pytest.raises(DamagedDataError) as raised:
            dataset.read_block("own", "train", block + shards[1].blocks)
        assert raised.value.got == "Is a directory"


@pytest.mark.parametrize("kind", ["blocks", "rows"])
def test_a_flipped_bit_in_an_array_is_found_before_it_is_used(folder: Path, kind: str) -> None:
    train = Manifest.load(folder).sources[0].train
    record = train.blocks if kind == "blocks" else train.rows[0]
    flip(folder / record.file, record.size - 3)
    with Dataset.open(folder) as dataset, pytest.raises(DamagedDataError) as raised:
        dataset.packed_block("own", "train", 0, T, "best_fit")
    assert record.file in raised.value.what
    assert record.xxh3_128 in raised.value.rule


def remake(folder: Path, record: dict[str, Any], array: np.ndarray[Any, Any]) -> None:
    np.save(folder / record["file"], array)
    data = (folder / record["file"]).read_bytes()
    record.update(size=len(data), xxh3_128=digest_hex(data))


def test_counts_that_differ_from_the_packing_are_found(folder: Path) -> None:
    content = Manifest.load(folder).model_dump()
    rows = content["sources"][0]["train"]["rows"][0]
    counted = np.load(folder / rows["file"], allow_pickle=False)
    counted[2] += 1
    remake(folder, rows, counted)
    Manifest.model_validate(content).write(folder)
    with Dataset.open(folder) as dataset, pytest.raises(DamagedDataError, match="another number of rows"):
        dataset.packed_block("own", "train", 2, T, "best_fit")


def test_a_block_array_that_contradicts_its_members_is_found(folder: Path) -> None:
    content = Manifest.load(folder).model_dump()
    record = content["sources"][0]["train"]["blocks"]
    blocks = np.load(folder / record["file"], allow_pickle=False)
    blocks["documents"][1] += 1
    remake(folder, record, blocks)
    Manifest.model_validate(content).write(folder)
    with Dataset.open(folder) as dataset, pytest.raises(DamagedDataError, match="says the block array"):
        dataset.read_block("own", "train", 1)


@pytest.mark.parametrize(
    "array", [np.zeros(3), np.zeros((2, 2), dtype=np.int64), np.array([{"pickled": 1}] * 3, dtype=object)]
)
def test_an_array_of_another_kind_is_refused_and_never_unpickled(folder: Path, array: np.ndarray[Any, Any]) -> None:
    content = Manifest.load(folder).model_dump()
    remake(folder, content["sources"][0]["train"]["rows"][0], array)
    Manifest.model_validate(content).write(folder)
    with Dataset.open(folder) as dataset, pytest.raises(DamagedDataError):
        dataset.rows("own", "train", T, "best_fit")


def test_an_unprepared_row_length_names_what_there_is_and_what_to_run(folder: Path) -> None:
    with Dataset.open(folder) as dataset:
        for length, packing in ((T, "concat"), (2 * T, "best_fit")):
            with pytest.raises(DataConfigurationError) as raised:
                dataset.rows("own", "train", length, packing)
            assert "T=16 best_fit" in raised.value.rule
            assert "solomonov prepare" in raised.value.remedy
            assert raised.value.exit_code == 78


def test_what_is_not_there_is_named(folder: Path) -> None:
    with Dataset.open(folder) as dataset:
        with pytest.raises(DataConfigurationError, match="other"):
            dataset.blocks("other", "train")
        for block in (-1, 10_000):
            with pytest.raises(ValueError, match="blocks"):
                dataset.read_block("own", "train", block)
    with pytest.raises(ValueError, match="closed"):
        dataset.read_block("own", "train", 0)


def test_documents_of_a_row_are_those_whose_tokens_it_has(folder: Path) -> None:
    with Dataset.open(folder) as dataset:
        parts = 0
        for block in range(0, dataset.split("own", "train").block_count, 3):
            packed = dataset.packed_block("own", "train", block, T, "best_fit")
            for row in range(packed.pack.rows):
                found = dataset.documents_of(RowAddress("own", 0, 0, block, row), "best_fit", T)
                first, end = packed.pack.row_offsets[row : row + 2].tolist()
                assert len(found) == end - first
                for piece, (token, positions) in zip(found, packed.pieces[first:end].tolist(), strict=True):
                    assert (piece["source"], piece["path"]) == ("own", "train.txt")
                    part = piece.get("part", 0)
                    parts += part > 0
                    start = part * 128 + piece["first_position"]
                    document = DOCUMENTS[piece["index"]]
                    assert document[start : start + positions].tolist() == (
                        packed.block.tokens[token : token + positions].tolist()
                    )
                    assert piece["positions"] == positions
        assert parts, "no document of this dataset was cut: the test sees less than it means to"


def test_damaged_provenance_is_found(folder: Path) -> None:
    path = folder / Manifest.load(folder).sources[0].train.shards[0].file
    with tarfile.open(path) as tar:
        flip(path, tar.getmember("000000.documents.json").offset_data + 2)
    address = RowAddress("own", 0, 0, 0, 0)
    with Dataset.open(folder) as dataset:
        with pytest.raises(DamagedDataError, match=r"000000\.documents\.json"):
            dataset.documents_of(address, "best_fit", T)
        with pytest.raises(ValueError, match="rows"):
            dataset.documents_of(address._replace(row_in_block=10_000), "best_fit", T)
    index = folder / Manifest.load(folder).sources[0].train.shards[0].index.file
    flip(index, 50)
    with Dataset.open(folder) as dataset, pytest.raises(DamagedDataError, match="index"):
        dataset.documents_of(address, "best_fit", T)


def test_several_threads_read_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two open shards at most: descriptors are dropped while other threads read from them.
    monkeypatch.setattr(dataset_module, "_OPEN_SHARDS", 2)
    with Dataset.open(folder) as dataset:
        count = dataset.split("own", "train").block_count
        expected = [dataset.read_block("own", "train", block).tokens.tolist() for block in range(count)]
        asked = np.random.default_rng(0).integers(0, count, 2000).tolist()
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda block: dataset.read_block("own", "train", block).tokens.tolist(), asked))
        assert found == [expected[block] for block in asked]
        assert len(dataset._shards) <= 2


def test_reads_that_come_in_pieces_are_put_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A network file system may return fewer bytes than were asked for.
    with Dataset.open(folder) as dataset:
        expected = dataset.read_block("own", "train", 1).tokens.tolist()
        pread = os.pread
        monkeypatch.setattr(os, "pread", lambda file, size, offset: pread(file, min(size, 50), offset))
        assert dataset.read_block("own", "train", 1).tokens.tolist() == expected


def test_closing_closes_every_descriptor(folder: Path) -> None:
    def open_files() -> set[str]:
        links = Path("/proc/self/fd")
        return {os.readlink(link) for link in links.iterdir() if link.is_symlink() and link.exists()}

    with Dataset.open(folder) as dataset:
        dataset.read_block("own", "train", 0)
        assert any(file.endswith(".tar") for file in open_files())
    assert not any(file.startswith(str(folder)) for file in open_files())


def test_the_cache_keeps_the_youngest_blocks_within_its_bytes(folder: Path) -> None:
    with Dataset.open(folder) as dataset:
        blocks = [dataset.packed_block("own", "train", block, T, "best_fit") for block in range(4)]
    cache = BlockCache(blocks[0].nbytes + blocks[1].nbytes + blocks[2].nbytes)
    for number in range(3):
        cache.put(number, blocks[number])
    assert cache.get(0) is blocks[0]
    cache.put(3, blocks[1])
    assert cache.get(1) is None, "block 1 was the oldest"
    assert cache.get(0) is blocks[0]
    cache.put(0, blocks[0])
    assert cache.bytes == sum(block.nbytes for block in (cache.get(0), cache.get(2), cache.get(3)) if block)
    assert cache.bytes <= cache.limit_bytes
    small = BlockCache(1)
    small.put("a", blocks[0])
    small.put("b", blocks[1])
    assert small.get("a") is None
    assert small.get("b") is blocks[1], "one block is kept even if it alone is over the limit"
