"""Runs on a real Ray of several nodes: a rank, a node and the driver die; no row is lost or repeated."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from solomonov.proof import prove_record
from solomonov.runfolder import RunFolder
from tests.support.processes import wait_for
from tests.support.ray_cluster import RayCluster
from tests.support.slurm import nothing_left, processes_of
from tests.support.user import User, unexpected

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.timeout(900)]
LONG = ("training.total_steps=4000", "training.micro_batch_sequences=2", "launch.nodes=2")
SECONDS = 240.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """A Ray that takes jobs, with two nodes of three CPUs: none is full, and so a dead one seems to have room."""
    with RayCluster((3, 3), dashboard=True) as found, pytest.MonkeyPatch.context() as patch:
        for name, value in found.environment.items():
            patch.setenv(name, value)
        yield found


def resumed(user: User, count: int) -> list[tuple[int, int]]:
    """Wait for so many starts; (world size, step) of each."""
    wait_for(lambda: len(user.journal("resumed")) >= count, deadline=SECONDS, what=f"start {count}")
    return [(event["layout"]["world"], event["step"]) for event in user.journal("resumed")]


def ranks_of(user: User) -> list[psutil.Process]:
    """Its live ranks, on whichever node."""
    found = []
    for process in processes_of(Path("solomonov.rank")):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[1:3] == ["-m", "solomonov.rank"] and Path(process.cwd()) == user.folder:
                found.append(process)
    return found


def reached(user: User, step: int) -> None:
    wait_for(lambda: user.steps_done() >= step, deadline=SECONDS, what=f"{step} updates are done")


@pytest.mark.spare
def test_a_start_that_times_out_ends_the_attempt(user: User, cluster: RayCluster) -> None:
    """Ray Train would try the same start again for ever; an attempt that ends is counted, and says why."""
    late = ("launch.ray.start_seconds=0.01", "launch.max_no_progress=1")  # no process starts within 10 ms
    user.must("submit", "own.yaml", "--on", "ray", f"launch.ray_address={cluster.address}", *late)
    assert user.command("wait", "own").wait(deadline=SECONDS) == 1
    assert len(user.journal("attempt_started")) == 1
    assert "[ray] The worker group startup timed out after 0.01 seconds" in user.must("logs", "own")


@pytest.mark.spare
def test_whatever_dies_it_goes_on_with_what_is_there(user: User, cluster: RayCluster) -> None:
    """A rank is killed; a node is lost: half of the ranks; a node comes: all of them; the driver is killed: resume."""
    user.must(
        "submit", "own.yaml", "--on", "ray", f"launch.ray_address={cluster.address}", *LONG, "launch.ray.min_ranks=2"
    )
    assert resumed(user, 1) == [(4, 0)]
    reached(user, 7)
    next(rank for rank in ranks_of(user) if rank.environ()["RANK"] == "3").send_signal(signal.SIGKILL)
    assert [world for world, _ in resumed(user, 2)] == [4, 4]
    reached(user, resumed(user, 2)[1][1] + 7)

    cluster.kill_node(1)
    assert [world for world, _ in resumed(user, 3)] == [4, 4, 2], "it goes on with the node that is left"
    reached(user, resumed(user, 3)[2][1] + 7)
    cluster.add_node(3)
    assert [world for world, _ in resumed(user, 4)] == [4, 4, 2, 4], "and with both when there are two again"
    assert user.journal("resize")[-1]["reason"] == "there is room for 4 ranks instead of 2"

    reached(user, resumed(user, 4)[3][1] + 7)
    supervisor = psutil.Process(user.journal("attempt_started")[-1]["pid"])
    supervisor.send_signal(signal.SIGKILL)
    wait_for(lambda: not ranks_of(user), deadline=30, what="no rank outlives its supervisor")
    user.must("resume", "own")
    starts = resumed(user, 5)
    user.must("cancel", "own")
    assert user.command("wait", "own").wait(deadline=SECONDS) == 75
    steps = [step for _, step in starts]
    assert all(step > 0 for step in steps[1:]), "never anew"
    assert steps == sorted(steps)
    assert all(event["steps_lost"] <= 5 for event in user.journal("incident"))
    with contextlib.chdir(user.folder):
        proof = prove_record(RunFolder(Path("runs/own")))
    assert proof.holds, proof
    assert not unexpected(user.journal())
    nothing_left(user.folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no Ray cluster is named"),
        (("launch.ray_address=127.0.0.1:9",), "no Ray cluster can be reached at 127.0.0.1:9"),
        (("launch.ray_address=auto",), "this is not the address of a Ray cluster"),
    ],
)
def test_what_cannot_work_is_refused_at_submission(words: tuple[str, ...], message: str, user: User) -> None:
    command = user.command("submit", "own.yaml", "--on", "ray", *words)
    assert command.wait(deadline=60) == 78
    assert message in command.output()
    assert "remedy:" in command.output()
    assert not (user.folder / "runs").exists()


def test_a_cluster_without_a_dashboard_takes_no_jobs(user: User, ray_cluster: RayCluster) -> None:
    command = user.command(
        "submit", "own.yaml", "--on", "ray", f"launch.ray_address={ray_cluster.address}", **ray_cluster.environment
    )
    assert command.wait(deadline=60) == 78
    assert "the Ray cluster takes no jobs" in command.output()
