"""The manifest: canonical bytes, and that no altered byte, file or path goes unnoticed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from data_pipeline.errors import DamagedDataError, DataConfigurationError
from data_pipeline.manifest import (
    BLOCK_DTYPE,
    MANIFEST_FILE,
    FileRecord,
    Manifest,
    digest_file,
    digest_hex,
    digest_pair,
    pair_hex,
    parse_manifest,
)
from tests.support.datasets import make_documents, write_dataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    documents = make_documents(1, 150, 20)
    write_dataset(
        tmp_path / "data",
        {"own": documents, "two": documents[:120]},
        sequence_tokens=16,
        packing="best_fit",
        held_out={"own": make_documents(2, 9, 20)},
    )
    return tmp_path / "data"


def reseal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the manifest's content as its writer would have written it."""
    content = json.loads((folder / MANIFEST_FILE).read_bytes())
    del content["seal"]
    change(content)
    bare = json.dumps(content, sort_keys=True, indent=1).encode() + b"\n"
    content["seal"] = xxhash.xxh3_128_hexdigest(bare)
    (folder / MANIFEST_FILE).write_bytes(json.dumps(content, sort_keys=True, indent=1).encode() + b"\n")


def test_it_reads_back_as_it_was_written(folder: Path) -> None:
    manifest = Manifest.load(folder)
    raw = (folder / MANIFEST_FILE).read_bytes()
    assert manifest.to_bytes() == raw
    assert manifest.digest == xxhash.xxh3_128_hexdigest(raw)
    assert parse_manifest(raw, folder).digest == manifest.digest
    assert manifest.folder == folder
    assert manifest.source_names == ("own", "two")
    assert manifest.vocab_size == 512
    assert manifest.tokenizer_digest == digest_file(folder / "tokenizer/tokenizer.model")
    assert [name for name, _ in manifest.sources[0].splits()] == ["train", "held_out"]
    assert [name for name, _ in manifest.sources[1].splits()] == ["train"]


def test_bytes_have_sorted_keys_and_no_trace_of_time_or_place(folder: Path) -> None:
    raw = (folder / MANIFEST_FILE).read_bytes()
    content = json.loads(raw)
    assert raw == json.dumps(content, sort_keys=True, indent=1).encode() + b"\n"
    assert str(folder).encode() not in raw
    Manifest.load(folder).write(folder)
    assert (folder / MANIFEST_FILE).read_bytes() == raw
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST_FILE, "blocks", "rows", "shards", "tokenizer"]


def test_it_vouches_for_every_file_of_the_folder(folder: Path) -> None:
    manifest = Manifest.load(folder)
    there = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    named = {record.file: record for record in manifest.files()}
    assert named.keys() == there.keys() - {MANIFEST_FILE}
    for file, record in named.items():
        assert record.size == there[file].stat().st_size
        assert record.xxh3_128 == xxhash.xxh3_128_hexdigest(there[file].read_bytes())
    assert manifest.verify() == sum(record.size for record in named.values())


def test_each_file_missing_or_cut_short_is_found_at_load(folder: Path) -> None:
    for record in list(Manifest.load(folder).files()):
        path = folder / record.file
        whole = path.read_bytes()
        for damage, got in ((whole[:-1], f"{record.size - 1} bytes"), (None, "No such file or directory")):
            path.unlink() if damage is None else path.write_bytes(damage)
            with pytest.raises(DamagedDataError) as raised:
                Manifest.load(folder)
            assert record.file in raised.value.what
            assert raised.value.got == got
            assert record.xxh3_128 in raised.value.rule
            assert raised.value.exit_code == 74
        path.mkdir()
        with pytest.raises(DamagedDataError) as raised:
            Manifest.load(folder)
        assert raised.value.got == "not a file"
        path.rmdir()
        path.write_bytes(whole)
    Manifest.load(folder)


def test_each_file_with_one_flipped_bit_is_found_by_verify(folder: Path) -> None:
    manifest = Manifest.load(folder)
    for record in manifest.files():
        path = folder / record.file
        whole = path.read_bytes()
        at = len(whole) // 2
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DamagedDataError) as raised:
            Manifest.load(folder).verify()
        assert record.file in raised.value.what
        assert digest_file(path) in raised.value.got
        assert record.xxh3_128 in raised.value.rule
        assert "solomonov prepare" in raised.value.remedy
        path.write_bytes(whole)


def test_any_altered_byte_of_the_manifest_is_refused(folder: Path) -> None:
    raw = (folder / MANIFEST_FILE).read_bytes()
    for at in range(0, len(raw), 97):
        for altered in (raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :], raw[:at], raw[:at] + b" " + raw[at:]):
            with pytest.raises(DataConfigurationError) as raised:
                parse_manifest(altered, folder / MANIFEST_FILE)
            assert "solomonov prepare" in raised.value.remedy
            assert MANIFEST_FILE in raised.value.what


@pytest.mark.parametrize("raw", [b"", b"[]", b"null", b"\xff\xfe", b'{"schema_version": NaN}', b"{"])
def test_what_is_no_manifest_is_refused(raw: bytes) -> None:
    with pytest.raises(DataConfigurationError) as raised:
        parse_manifest(raw, Path(MANIFEST_FILE))
    assert raised.value.exit_code == 78


@pytest.mark.parametrize("version", [0, 2, "1", None, True])
def test_an_unknown_schema_is_named(folder: Path, version: object) -> None:
    reseal(folder, lambda content: content.update(schema_version=version))
    with pytest.raises(DataConfigurationError, match="schema") as raised:
        Manifest.load(folder)
    assert repr(version) in raised.value.got
    assert "solomonov prepare" in raised.value.remedy


def test_a_folder_without_manifest_says_what_to_run(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataConfigurationError, match="no prepared dataset") as raised:
            Manifest.load(folder)
        assert "solomonov prepare" in raised.value.remedy


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../outside", "shards/../../outside", "a\\b", "", ".", "./a", "a//b", "a\0b", "a/"]
)
def test_paths_that_leave_the_folder_are_refused(folder: Path, path: str) -> None:
    (folder.parent / "outside").write_bytes(b"outside")
    reseal(folder, lambda content: content["tokenizer"].update(file=path))
    with pytest.raises(DataConfigurationError) as raised:
        Manifest.load(folder)
    assert "tokenizer.file" in raised.value.got


def test_links_that_leave_the_folder_are_refused(folder: Path) -> None:
    shard = folder / Manifest.load(folder).sources[0].train.shards[0].file
    shard.rename(folder.parent / "moved.tar")
    shard.symlink_to(folder.parent / "moved.tar")
    with pytest.raises(DataConfigurationError, match="leads out of the dataset folder"):
        Manifest.load(folder)
    os.remove(shard)
    (folder.parent / "moved.tar").rename(folder / "moved.tar")
    shard.symlink_to(folder / "moved.tar")
    Manifest.load(folder).verify()
    (folder.parent / "elsewhere").symlink_to(folder)
    Manifest.load(folder.parent / "elsewhere").verify()


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(lanes=3),
        lambda content: content.update(lanes=1024),
        lambda content: content.update(sources=[]),
        lambda content: content.update(surprise=1),
        lambda content: content["sources"][1].update(name="own"),
        lambda content: content["sources"][0].update(weight=-1.0),
        lambda content: content["sources"][0]["train"].update(block_count=1),
        lambda content: content["sources"][0]["train"]["blocks"].update(xxh3_128="ABC"),
        lambda content: content["sources"][0]["train"]["blocks"].update(file="tokenizer/tokenizer.model"),
    ],
    ids=["lanes", "too many lanes", "no sources", "key", "names", "weight", "blocks", "digest", "same file"],
)
def test_a_manifest_that_contradicts_itself_is_refused(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    reseal(folder, change)
    with pytest.raises(DataConfigurationError, match="not a valid manifest"):
        Manifest.load(folder)


def test_rows_are_found_by_length_and_packing(folder: Path) -> None:
    train = Manifest.load(folder).sources[0].train
    record = train.rows_record(16, "best_fit")
    assert record is not None
    assert record.rows == int(np.load(folder / record.file, allow_pickle=False).sum())
    assert train.rows_record(16, "concat") is None
    assert train.rows_record(32, "best_fit") is None


def test_digests_in_their_two_forms_agree(tmp_path: Path) -> None:
    data = b"\0" * 7 + b"solomonov"
    (tmp_path / "f").write_bytes(data)
    assert pair_hex(digest_pair(data)) == digest_hex(data) == digest_file(tmp_path / "f")
    assert pair_hex((1, 2)) == "00000000000000010000000000000002"
    assert FileRecord.of(tmp_path, "f").model_dump() == {"file": "f", "size": 16, "xxh3_128": digest_hex(data)}


def test_the_block_record_is_a_format() -> None:
    assert BLOCK_DTYPE.itemsize == 88
    assert BLOCK_DTYPE.names == (
        "shard",
        "tokens_offset",
        "tokens_size",
        "lengths_offset",
        "lengths_size",
        "documents",
        "tokens",
        "text_bytes",
        "digest_tokens",
        "digest_lengths",
    )


def test_content_digest_ignores_weights_and_rows_arrays_only(tmp_path: Path) -> None:
    """A run in progress stays on its data when rows for another length are added; other data is another digest."""
    documents = make_documents(1, 60, 40.0)
    first = write_dataset(tmp_path / "a", {"own": documents}, sequence_tokens=16, packing="concat")
    longer = write_dataset(tmp_path / "b", {"own": documents}, sequence_tokens=16, packing="best_fit")
    (source,) = first.sources
    heavier = first.model_copy(update={"sources": (source.model_copy(update={"weight": 3.5}),)})
    other = write_dataset(tmp_path / "c", {"own": documents[::-1]}, sequence_tokens=16, packing="concat")
    assert first.content_digest == longer.content_digest == heavier.content_digest
    assert len({first.digest, longer.digest, heavier.digest}) == 3
    assert other.content_digest != first.content_digest
