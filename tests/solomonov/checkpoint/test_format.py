"""The manifest: every single bit of one, every kind of wrong tiling, and manifests written by someone hostile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import xxhash

from solomonov.checkpoint.format import (
    SELF_DIGEST,
    FileEntry,
    FormatError,
    Manifest,
    TensorRecord,
    TilingError,
    UnsupportedVersionError,
    canonical,
    check_tiling,
    decode_manifest,
    encode_manifest,
    parse_canonical,
)

DIGEST = "0123456789abcdef" * 2


def record(start: int, end: int, *, shape: tuple[int, ...] = (10,), **fields: Any) -> TensorRecord:
    given = {"name": "w", "kind": "master", "dtype": "F32", "file": "rank-00000.safetensors"} | fields
    key = f"{given['kind']}/{given['name']}/{start}"
    return TensorRecord.model_validate(
        {"shape": shape, "start": start, "end": end, "key": key, "xxh3_128": DIGEST} | given
    )


def manifest() -> Manifest:
    return Manifest(
        run_id="run",
        step=200,
        parent_step=None,
        attempt=1,
        created=1.5e-07,
        topology={"ranks": 2},
        files={
            "rank-00000.safetensors": FileEntry(size=1000, xxh3_128=DIGEST),
            "state.json": FileEntry(size=10, xxh3_128=DIGEST),
        },
        tensors=(record(0, 4), record(4, 10)),
    )


def sealed(document: dict[str, Any]) -> bytes:
    """What someone who knows the format, and means harm, would write."""
    return canonical(document | {SELF_DIGEST: xxhash.xxh3_128_hexdigest(canonical(document))})


def test_round_trip() -> None:
    raw = encode_manifest(manifest())
    assert decode_manifest(raw) == manifest()
    assert raw == sealed(manifest().model_dump(mode="json"))


def test_every_single_bit_flip_is_refused() -> None:
    """Exhaustive; among them the flips that leave the JSON's meaning alone, such as 1e-07 to 1E-07."""
    raw = bytearray(encode_manifest(manifest()))
    for bit in range(len(raw) * 8):
        raw[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            decode_manifest(bytes(raw))
        raw[bit // 8] ^= 1 << bit % 8
    decode_manifest(bytes(raw))


def test_every_truncation_is_refused() -> None:
    raw = encode_manifest(manifest())
    for length in range(len(raw)):
        with pytest.raises(FormatError):
            decode_manifest(raw[:length])


@pytest.mark.parametrize(
    "raw",
    [
        *[b"", b"[]\n", b"{}", b'{"a":1,"a":1}\n', b'{"a": 1}\n', b'{"a":NaN}\n', b'{"a":1e999}\n', b"\xff\n"],
        *[b"[" * 100_000, b'{"a":' * 100_000, b'{"a":' + b"9" * 10_000 + b"}\n"],
    ],
    ids=lambda raw: repr(raw[:16]),
)
def test_refuses_what_is_not_canonical_json(raw: bytes) -> None:
    with pytest.raises(FormatError):
        parse_canonical(raw)


def edit(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        target: Any = document
        for part in path[:-1]:
            target = target[part]
        target[path[-1]] = value

    return change


def rename_file(name: str) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document["files"][name] = document["files"].pop("rank-00000.safetensors")
        for tensor in document["tensors"]:
            tensor["file"] = name

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (rename_file("../rank-00000.safetensors"), "file name"),
        (rename_file("/etc/passwd"), "file name"),
        (rename_file("rank-00000.safetensors\n"), "file name"),
        (rename_file("rank-00000.pt"), "file name"),
        (edit("tensors", 0, "file", value="state.json"), "no tensor file"),
        (edit("tensors", 0, "file", value="rank-00001.safetensors"), "no tensor file"),
        (lambda d: d["files"].pop("state.json"), "state.json is not listed"),
        (edit("tensors", 0, "start", value=-1), "start"),
        (edit("tensors", 0, "end", value=1 << 62), "end"),
        (edit("tensors", 0, "end", value=10**30), "end"),
        (edit("tensors", 0, "end", value=True), "end"),
        (edit("tensors", 0, "end", value=4.0), "end"),
        (edit("tensors", 0, "end", value=5), "overlaps"),
        (edit("tensors", 0, "end", value=3), "hole"),
        (edit("tensors", 1, "end", value=11), "does not lie within"),
        (edit("tensors", 1, "end", value=2), "does not lie within"),
        (edit("tensors", 0, "shape", value=[-10]), "shape"),
        (edit("tensors", 0, "shape", value=[5, 2]), "disagree"),
        (edit("tensors", 0, "shape", value=[1] * 65), "shape"),
        (edit("tensors", 0, "dtype", value="I32"), "disagree"),
        (edit("tensors", 0, "dtype", value="PICKLE"), "unknown dtype"),
        (edit("tensors", 0, "slices", value=[[0, 1]]), "slices"),
        (edit("tensors", 0, "xxh3_128", value="0" * 31), "xxh3_128"),
        (edit("tensors", 0, "name", value="a\0b"), "name"),
        (edit("tensors", 1, "key", value="master/w/0"), "stands twice"),
        (edit("tensors", 0, "extra", value=1), "extra"),
        (edit("files", "rank-00000.safetensors", value={"size": 39, "xxh3_128": DIGEST}), "cannot hold"),
        (edit("files", "state.json", value={"size": -1, "xxh3_128": DIGEST}), "size"),
        (edit("step", value=-1), "step"),
        (edit("schema_version", value=0), "schema_version"),
        (edit("schema_version", value="1"), "schema_version"),
        (edit("ledger", value={}), "ledger"),
        (edit("extra", value=1), "extra"),
    ],
)
def test_hostile_manifests_with_a_right_digest_are_refused(change: Callable[[dict[str, Any]], None], why: str) -> None:
    document = manifest().model_dump(mode="json")
    change(document)
    with pytest.raises(FormatError, match=why):
        decode_manifest(sealed(document))


def test_an_intact_manifest_of_a_later_release_is_not_called_damaged() -> None:
    document = manifest().model_dump(mode="json") | {"schema_version": 2, "new_field": 1}
    with pytest.raises(UnsupportedVersionError, match="schema version 2"):
        decode_manifest(sealed(document))


EXPECTED = {("w", "master"): (10,)}


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ([record(0, 4)], r"master/w: hole \[4, 10\)"),
        ([record(4, 10)], r"hole \[0, 4\)"),
        ([record(0, 4), record(5, 10)], r"hole \[4, 5\)"),
        ([record(0, 5), record(4, 10)], r"\[4, 10\) overlaps what covers \[0, 5\)"),
        ([record(0, 10), record(0, 10)], "overlaps"),
        ([record(0, 10), record(3, 3)], "overlaps"),
        ([record(0, 11)], r"does not lie within \[0, 10\)"),
        ([], "1 tensors were not written, first master/w"),
        ([record(0, 10), record(0, 10, name="v")], "1 tensors were not expected, first master/v"),
        ([record(0, 10, kind="ema")], "not written"),
        ([record(0, 10, shape=(5, 2))], "disagree"),
        ([record(0, 5), record(5, 10, dtype="F16")], "disagree"),
    ],
)
def test_tiling_names_the_tensor_and_the_ranges(records: list[TensorRecord], why: str) -> None:
    with pytest.raises(TilingError, match=why):
        check_tiling(records, EXPECTED)


def test_tilings_that_are_right() -> None:
    check_tiling([record(4, 10), record(0, 4)], EXPECTED)
    check_tiling([record(0, 1, shape=())], {("w", "master"): ()})
    check_tiling([record(0, 0, shape=(0, 3))], {("w", "master"): (0, 3)})
    check_tiling([], {})
    with pytest.raises(TilingError, match="2 fragments"):
        check_tiling([record(0, 0, shape=(0, 3)), record(0, 0, shape=(0, 3))], {("w", "master"): (0, 3)})
