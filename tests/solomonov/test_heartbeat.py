"""The record that a rank writes is the one that the launcher reads: two implementations of one layout."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from launcher.heartbeat import read_heartbeat
from solomonov.heartbeat import SECTIONS, Heartbeat


@pytest.mark.parametrize("section", SECTIONS)
def test_launcher_reads_what_the_rank_writes(section: str, tmp_path: Path) -> None:
    heartbeat = Heartbeat(str(tmp_path / "beat"))
    before = time.monotonic_ns()
    heartbeat.beat(section, 12)
    record = read_heartbeat(tmp_path / "beat")
    assert record is not None
    assert (record.step, record.section, record.pid) == (12, section, os.getpid())
    assert before <= record.monotonic_ns <= time.monotonic_ns()
    assert (tmp_path / "beat").stat().st_size == 64
    heartbeat.beat("leave")
    again = read_heartbeat(tmp_path / "beat")
    assert again is not None
    assert again.step == 12
    heartbeat.close()


def test_without_a_file_it_does_nothing() -> None:
    heartbeat = Heartbeat(None)
    heartbeat.beat("data", 3)
    assert heartbeat.step == 3
    heartbeat.close()
