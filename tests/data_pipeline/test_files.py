"""Atomic writes: the old file or the whole new one; full disks and permissions as one message."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from data_pipeline.errors import DataConfigurationError
from data_pipeline.files import (
    explained_os_errors,
    json_bytes,
    open_array,
    write_array,
    write_atomically,
    write_bytes,
    write_json,
)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_aside(tmp_path: Path) -> None:
    path, aside = tmp_path / "deep" / "file", tmp_path / "aside"
    write_bytes(path, aside, b"old")

    def half(file: IO[bytes]) -> None:
        file.write(b"half of the new")
        file.flush()
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(path, aside, half)
    assert path.read_bytes() == b"old"
    assert list(aside.iterdir()) == []
    write_bytes(path, aside, b"new")
    assert path.read_bytes() == b"new"


def test_json_is_canonical_and_arrays_come_back(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", tmp_path, {"b": [1, "é"], "a": None})
    assert (tmp_path / "a.json").read_bytes() == json_bytes({"a": None, "b": [1, "é"]})
    with pytest.raises(ValueError, match="JSON"):
        json_bytes(float("nan"))
    array = np.arange(10, dtype="<u8")[::2]
    write_array(tmp_path / "a.npy", tmp_path, array)
    assert (open_array(tmp_path / "a.npy") == array).all()


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
def test_a_full_disk_is_explained(tmp_path: Path) -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(DataConfigurationError, match="disk is full") as caught, explained_os_errors(tmp_path):
            os.write(descriptor, b"x")
    finally:
        os.close(descriptor)
    assert str(tmp_path) in caught.value.got
    assert "finished tasks are kept" in caught.value.remedy


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), explained_os_errors(tmp_path):
        (tmp_path / "none").read_bytes()
