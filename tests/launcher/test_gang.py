"""The ranks of one attempt: their environment, the order of their ends, and that none is left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.errors import LaunchConfigurationError
from launcher.exits import RankExit
from launcher.gang import LocalGang, rank_environment, usable_cores
from launcher.job import JobSpec
from launcher.rank_env import RankEnvironment
from tests.support.processes import assert_no_process, wait_for

PLACE = RankEnvironment(
    rank=1,
    world_size=2,
    local_rank=1,
    local_world_size=2,
    group_rank=0,
    master_addr="127.0.0.1",
    master_port=9,
)


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """Both ends of a pipe."""
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


def shell(script: str, folder: Path, *words: str, ranks: int = 2) -> JobSpec:
    """A shell script as a job."""
    return JobSpec(command=["sh", "-c", script, "sh", *words], log_folder=folder, ranks=ranks)


def all_ends(gang: LocalGang) -> list[RankExit]:
    """Wait for every rank."""
    ends = []
    while gang.alive:
        ends += gang.wait(30.0)
    return ends


def test_what_a_rank_gets(tmp_path: Path) -> None:
    spec = JobSpec(["true"], tmp_path, ranks=2, environment={"EXTRA": "x", "RANK": "77", "BOTH": "spec"})
    got = rank_environment(spec, PLACE, tmp_path, 3, {"BOTH": "inherited", "KEPT": "k", "WORLD_SIZE": "9"})
    assert got == {
        **PLACE.to_environment(),
        "EXTRA": "x",
        "BOTH": "spec",
        "KEPT": "k",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(max(1, usable_cores() // 2)),
        "SOLOMONOV_HEARTBEAT": str(tmp_path / "heartbeat-1"),
        "SOLOMONOV_ATTEMPT": "3",
    }


@pytest.mark.parametrize("by_spec", [True, False])
def test_threads_that_the_user_chose_are_kept(tmp_path: Path, by_spec: bool) -> None:
    chosen = {"OMP_NUM_THREADS": "7"}
    spec = JobSpec(["true"], tmp_path, environment=chosen if by_spec else {})
    assert rank_environment(spec, PLACE, tmp_path, 1, {} if by_spec else chosen)["OMP_NUM_THREADS"] == "7"


def test_more_ranks_than_cores_get_one_thread_each(tmp_path: Path) -> None:
    place = RankEnvironment(0, 4096, 0, 4096, 0, "127.0.0.1", 9)
    assert rank_environment(JobSpec(["true"], tmp_path), place, tmp_path, 1, {})["OMP_NUM_THREADS"] == "1"


def test_ends_come_in_order_of_death(tmp_path: Path) -> None:
    script = 'if [ $RANK = 0 ]; then while [ ! -e "$1/first" ]; do sleep 0.02; done; exit 4; fi; exit 3'
    with (
        pipe() as (wake, _),
        LocalGang(shell(script, tmp_path, str(tmp_path)), tmp_path, attempt=1, master_port=9, wake_fd=wake) as gang,
    ):
        first = gang.wait(30.0)
        assert [(end.rank, end.code, end.pid) for end in first] == [(1, 3, gang.pids[1])]
        assert gang.alive
        (tmp_path / "first").touch()
        assert [(end.rank, end.code, end.killed) for end in all_ends(gang)] == [(0, 4, False)]


def test_a_wake_up_returns_without_ends(tmp_path: Path) -> None:
    with (
        pipe() as (wake, writer),
        LocalGang(shell("sleep 600", tmp_path), tmp_path, attempt=1, master_port=9, wake_fd=wake) as gang,
    ):
        os.write(writer, b"!")
        assert gang.wait(None) == []
        gang.kill()
        os.read(wake, 1)
        assert [(end.code, end.killed) for end in all_ends(gang)] == [(-9, True)] * 2


def test_terminate_reaches_every_living_rank(tmp_path: Path) -> None:
    script = 'trap "exit 75" TERM; : > "$1/ready-$RANK"; while :; do sleep 0.02; done'
    with (
        pipe() as (wake, _),
        LocalGang(shell(script, tmp_path, str(tmp_path)), tmp_path, attempt=1, master_port=9, wake_fd=wake) as gang,
    ):
        wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2, deadline=30.0, what="both ranks trap")
        gang.terminate()
        assert [end.code for end in all_ends(gang)] == [75, 75]


def test_leaving_ends_ranks_and_their_helpers(tmp_path: Path) -> None:
    token = f"gang-{tmp_path}"
    script = 'sh -c "trap : TERM; while :; do sleep 600; done" "$1" & : > "$2/up-$RANK"; wait'
    spec = shell(script, tmp_path, token, str(tmp_path))
    with pipe() as (wake, _):
        with LocalGang(spec, tmp_path, attempt=1, master_port=9, wake_fd=wake):
            wait_for(lambda: len(list(tmp_path.glob("up-*"))) == 2, deadline=30.0, what="both helpers run")
        assert_no_process(token)


def test_a_stale_heartbeat_is_not_taken_for_news(tmp_path: Path) -> None:
    (tmp_path / "heartbeat-0").write_bytes(b"from an earlier attempt")
    with (
        pipe() as (wake, _),
        LocalGang(shell("exit 1", tmp_path, ranks=1), tmp_path, attempt=1, master_port=9, wake_fd=wake) as gang,
    ):
        (end,) = all_ends(gang)
    assert (end.step, end.section, end.heartbeat_age_seconds) == (None, None, None)
    assert not (tmp_path / "heartbeat-0").exists()


def test_ranks_that_were_started_end_when_a_later_one_cannot_be(tmp_path: Path) -> None:
    token = f"partial-{tmp_path}"
    (tmp_path / "rank-1.log").mkdir()
    with pipe() as (wake, _), pytest.raises(LaunchConfigurationError, match=r"rank-1\.log"):
        LocalGang(shell("sleep 600", tmp_path, token), tmp_path, attempt=1, master_port=9, wake_fd=wake)
    assert_no_process(token)
