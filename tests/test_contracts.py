"""What two packages agree on without importing each other: one side's writer against the other's reader."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import launcher.exits
import launcher.heartbeat
import solomonov.exits
import solomonov.heartbeat
from data_pipeline.errors import DataError
from launcher.errors import LauncherError
from launcher.rank_env import RankEnvironment
from solomonov.errors import SolomonovError
from tests.support.source_tree import PACKAGES, ROOT


def test_section_copies_are_equal() -> None:
    texts = {(ROOT / name / "section.py").read_bytes() for name in PACKAGES}
    assert len(texts) == 1, "the packages' copies of section.py differ"


def test_exit_codes_mean_the_same_to_both_sides() -> None:
    ours = {name: value for name, value in vars(solomonov.exits).items() if name.isupper()}
    assert ours.pop("DIFFERS") == 1, "a command's alone: a rank that ends with 1 crashed"
    theirs = {code.name: int(code) for code in launcher.exits.ExitCode}
    assert ours == theirs, "solomonov/exits.py and launcher/exits.py differ"


@pytest.mark.parametrize("base", [DataError, LauncherError, SolomonovError])
def test_errors_leave_with_codes_that_have_a_meaning(base: type[Exception]) -> None:
    known = {int(code) for code in launcher.exits.ExitCode}
    leaves = base.__subclasses__()
    assert leaves, f"{base.__name__} has no subclass"
    for error in leaves:
        assert error.exit_code in known, f"{error.__name__} leaves with {error.exit_code}"  # type: ignore[attr-defined]


def test_launcher_reads_the_heartbeat_that_a_rank_writes(tmp_path: Path) -> None:
    path = tmp_path / "heartbeat"
    assert launcher.heartbeat.read_heartbeat(path) is None, "no file, no heartbeat"
    for number, section in enumerate(solomonov.heartbeat.SECTIONS):
        writer = solomonov.heartbeat.Heartbeat(str(path))
        writer.beat(section, step=number + 5)
        writer.close()
        read = launcher.heartbeat.read_heartbeat(path)
        assert read is not None, f"the record of section {section} is not understood"
        assert (read.section, read.section_id, read.step) == (section, number, number + 5), "what was written"
        assert read.pid == os.getpid(), "by whom"
        assert read.age_seconds() < 3600, "on the clock that both share"


def test_rank_reads_the_environment_that_the_launcher_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    from solomonov.distributed import RankInfo

    given = RankEnvironment(
        rank=5,
        world_size=8,
        local_rank=1,
        local_world_size=4,
        group_rank=1,
        master_addr="127.0.0.1",
        master_port=40123,
    )
    for name, value in given.to_environment().items():
        monkeypatch.setenv(name, value)
    info = RankInfo.from_environment()
    place = (info.rank, info.local_rank, info.world, info.local_world, info.node)
    assert place == (5, 1, 8, 4, 1), "the torchrun variables carry the rank's place"
