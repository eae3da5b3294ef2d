"""File primitives: durable replacement, reads that follow no link and block on no pipe, digests of the disk's bytes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import xxhash

from solomonov.checkpoint import files


def test_digest_file_spans_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 1000)
    data = os.urandom(3001)
    with files.new_file(tmp_path / "x") as descriptor:
        files.write_all(descriptor, data)
    assert (tmp_path / "x").read_bytes() == data
    assert files.digest_file(tmp_path / "x") == (3001, xxhash.xxh3_128_hexdigest(data))


def test_new_file_never_replaces(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(FileExistsError), files.new_file(tmp_path / "x"):
        raise AssertionError("the block must not run")
    assert (tmp_path / "x").read_bytes() == b"old"


def test_write_atomically_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    for data in (b"one", b"two"):
        files.write_atomically(tmp_path / "x", data)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"two")]


def test_write_atomically_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"old")
    (tmp_path / "x.tmp").symlink_to("victim")
    with pytest.raises(OSError, match="symbolic"):
        files.write_atomically(tmp_path / "x", b"new")
    assert (tmp_path / "victim").read_bytes() == b"old"


def test_open_regular_refuses_links_pipes_and_folders(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"x")
    (tmp_path / "link").symlink_to("target")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("link", "pipe", "folder"):
        with pytest.raises(OSError), files.open_regular(tmp_path / name):
            raise AssertionError("the block must not run")


def test_read_small_has_a_cap(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    assert files.read_small(tmp_path / "x", 5) == b"12345"
    with pytest.raises(OSError, match="at most 4"):
        files.read_small(tmp_path / "x", 4)


def test_read_into_stops_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    target = bytearray(4)
    with files.open_regular(tmp_path / "x") as descriptor:
        assert files.read_into(descriptor, memoryview(target), 3) == 2
    assert target == b"45\0\0"


def test_make_folder_makes_parents_and_keeps_what_is_there(tmp_path: Path) -> None:
    files.make_folder(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / "x").touch()
    files.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "x").exists()
    assert files.free_bytes(tmp_path / "a") > 0
