"""The heartbeat reader against records packed by hand, byte by byte, and against damaged ones."""

from __future__ import annotations

import os
import time
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.heartbeat import FORMAT, RECORD_BYTES, decode, read_heartbeat


def record(*, monotonic_ns: int = 5, step: int = 7, section: int = 3, pid: int = 11, name: bytes = b"data") -> bytes:
    """A record made field by field, without the struct format of the module."""
    body = b"SOLOHB01"
    body += monotonic_ns.to_bytes(8, "little")
    body += step.to_bytes(8, "little", signed=True)
    body += section.to_bytes(4, "little")
    body += pid.to_bytes(4, "little")
    body += name.ljust(24, b"\0")
    return body + zlib.crc32(body).to_bytes(8, "little")


def test_a_record_is_64_bytes_of_the_published_format() -> None:
    assert (FORMAT, RECORD_BYTES, len(record())) == ("<8sQqII24sQ", 64, 64)


@given(
    st.integers(0, 2**64 - 1),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**32 - 1),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6),
)
def test_every_record_is_read_back(monotonic_ns: int, step: int, number: int, name: str) -> None:
    beat = decode(record(monotonic_ns=monotonic_ns, step=step, section=number, pid=number, name=name.encode("utf-8")))
    assert beat is not None
    assert (beat.monotonic_ns, beat.step, beat.section_id, beat.pid, beat.section) == (
        monotonic_ns,
        step,
        number,
        number,
        name,
    )


@given(st.integers(0, 64 * 8 - 1))
def test_any_flipped_bit_reads_as_none(bit: int) -> None:
    damaged = bytearray(record())
    damaged[bit // 8] ^= 1 << (bit % 8)
    assert decode(bytes(damaged)) is None


@pytest.mark.parametrize("content", [b"", record()[:63], record() + b"x", b"\0" * 64])
def test_torn_records_read_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "heartbeat").write_bytes(content)
    assert read_heartbeat(tmp_path / "heartbeat") is None


def test_absent_and_unreadable_files_read_as_none(tmp_path: Path) -> None:
    assert read_heartbeat(tmp_path / "missing") is None
    assert read_heartbeat(tmp_path) is None


def test_a_name_cut_inside_a_character_is_still_read() -> None:
    beat = decode(record(name="ü".encode() * 12))
    assert beat is not None
    assert beat.section == "ü" * 12
    cut = decode(record(name=("x" + "ü" * 12).encode()[:24]))
    assert cut is not None
    assert cut.section.startswith("xüü")


def test_rewriting_in_place_and_age(tmp_path: Path) -> None:
    path = tmp_path / "heartbeat"
    before = time.monotonic_ns()
    with path.open("wb") as file:
        for step in range(3):
            os.pwrite(file.fileno(), record(step=step, monotonic_ns=before), 0)
    beat = read_heartbeat(path)
    assert beat is not None
    assert beat.step == 2
    assert 0.0 <= beat.age_seconds() <= (time.monotonic_ns() - before) / 1e9
    assert beat.age_seconds() > 0.0
