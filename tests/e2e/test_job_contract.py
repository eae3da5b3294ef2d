"""The contract of a submitted job, on every kind of place: this machine, Slurm, Ray.

A job is a shell script that is started once a rank, on two nodes where the place has nodes. tests/launcher/test_job.py
has what only concerns the supervisor, which is the same one everywhere.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import pytest

from launcher.__main__ import write_job
from launcher.config import LaunchConfig
from launcher.job import Job, JobSpec, JobState
from launcher.local import LocalJob, LocalLauncher
from launcher.ray_jobs import RayLauncher, RayRequest, request_file
from launcher.slurm import SlurmJob, SlurmLauncher, SlurmRequest
from tests.support.processes import ROOT, wait_for
from tests.support.ray_cluster import RayCluster
from tests.support.slurm import SlurmCluster, nothing_left

pytestmark = [pytest.mark.e2e, pytest.mark.measured, pytest.mark.timeout(400)]
SECONDS = 240.0
HOSTILE = "a 'b' \"c\" $(touch gotcha) `touch gotcha` ; touch gotcha # \\ % ü \t"


class Submit(Protocol):
    """Starts a shell script as a job of two ranks, on two nodes where there are nodes; `$1` is the test's folder."""

    place: str

    def __call__(self, script: str, *, options: dict[str, object] | None = None, **fields: object) -> Job: ...

    def preempt(self, job: Job) -> None:
        """Have the place take the job's machines away, as it does with those who may be preempted."""


READY = ': > "$1/ready-$RANK"; while :; do sleep 0.05; done'
TRAP = f'trap "echo saved > \\"$1/saved-$RANK\\"; exit 75" TERM USR1; {READY}'


@pytest.fixture(scope="module")
def ray() -> Iterator[RayCluster]:
    """A Ray that takes jobs."""
    with RayCluster((1, 1), dashboard=True) as cluster, pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.environment.items():
            patch.setenv(name, value)
        yield cluster


@pytest.fixture(
    params=["local", pytest.param("slurm", marks=pytest.mark.slurm), pytest.param("ray", marks=pytest.mark.ray)]
)
def submit(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Submit]:
    place = request.param
    folder = tmp_path / "the job's folder"
    (folder / "logs").mkdir(parents=True)

    def start(script: str, *, options: dict[str, object] | None = None, **fields: object) -> Job:
        nodes, ranks = (1, 2) if place == "local" else (2, 1)
        config = LaunchConfig.model_validate({"restart_backoff_seconds": 0.0, "nodes": nodes, **(options or {})})
        name = f"{tmp_path.name}-{os.getpid()}"
        spec = JobSpec(
            ["sh", "-c", script, "sh", str(tmp_path)],
            folder / "logs",
            ranks=ranks,
            nodes=nodes,
            request_file=request_file(folder / "logs", name) if place == "ray" else folder / "logs" / "request",
            **fields,  # type: ignore[arg-type]
        )
        if place == "local":
            return LocalLauncher(config).submit(spec)
        write_job(folder, spec, config, ROOT / "slurm" / "rank.sh")
        common = {"config": config, "module": "launcher", "environment": {"PYTHONPATH": str(ROOT)}}
        if place == "slurm":
            script_file = ROOT / "slurm" / "train.sbatch"
            return SlurmLauncher().submit(
                SlurmRequest(
                    HOSTILE.strip(), folder, folder / "logs", ranks_per_node=ranks, script=script_file, **common
                )  # type: ignore[arg-type]
            )
        address = request.getfixturevalue("ray").address
        common["config"] = config.model_copy(update={"ray_address": address})
        return RayLauncher().submit(RayRequest(name, folder, folder / "logs", python=sys.executable, **common))  # type: ignore[arg-type]

    def preempt(job: Job) -> None:
        if place == "local":
            assert isinstance(job, LocalJob)
            for pid in job.attempts[-1].pids:
                os.kill(pid, signal.SIGUSR1)
        elif place == "slurm":
            slurm.urgent(nodes=4)
        else:
            request.getfixturevalue("ray").drain_node(1)

    with ExitStack() as stack:
        if place == "slurm":
            slurm = stack.enter_context(SlurmCluster(tmp_path))
        start.place, start.preempt = place, preempt  # type: ignore[attr-defined]
        yield start  # type: ignore[misc]
    nothing_left(tmp_path)
    assert not list(Path.cwd().glob("gotcha"))


def ready(folder: Path) -> None:
    """Wait until both ranks have said that they are ready."""
    wait_for(lambda: len(list(folder.glob("ready-*"))) == 2, deadline=SECONDS, what="ranks are ready")


def names(folder: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))


def test_success_logs_and_environment(submit: Submit, tmp_path: Path) -> None:
    """Two ranks meet: each waits for the file of the other. Logs hold both streams, the environment is whole."""
    script = """
        : > "$1/here-$RANK"; while [ ! -e "$1/here-$((1 - RANK))" ]; do sleep 0.02; done
        echo "$RANK of $WORLD_SIZE, local $LOCAL_RANK of $LOCAL_WORLD_SIZE, at $MASTER_ADDR:$MASTER_PORT"
        echo "extra=$EXTRA" >&2; pwd >&2
    """
    (tmp_path / "work here").mkdir()
    job = submit(script, environment={"EXTRA": HOSTILE}, working_directory=tmp_path / "work here")
    assert job.wait(SECONDS) == 0
    assert (job.state, job.exit_code) == (JobState.DONE, 0)
    texts = [path.read_text() for path in job.logs()]
    assert len(texts) == 2
    local = 1 if isinstance(job, SlurmJob) or hasattr(job, "dashboard") else 2
    meeting = {text.splitlines()[0].rpartition("at ")[2] for text in texts}
    assert len(meeting) == 1, "all ranks are told the same place"
    for rank, text in enumerate(texts):
        first, *rest = text.splitlines()
        assert first.startswith(f"{rank} of 2, local {rank if local == 2 else 0} of {local}, at ")
        assert rest == [f"extra={HOSTILE}", str(tmp_path / "work here")]


@pytest.mark.sampled(1)
def test_failure_passes_its_code_through(submit: Submit) -> None:
    """A verdict, which is not retried, and is waited for although the other rank never ends by itself."""
    job = submit("[ $RANK = 1 ] && exit 78; exec sleep 600")
    assert job.wait(SECONDS) == 78
    assert (job.state, job.exit_code) == (JobState.FAILED, 78)
    assert job.logs()[0].parent.name == "attempt-1"


@pytest.mark.sampled(1)
def test_a_killed_rank_is_started_again(submit: Submit, tmp_path: Path) -> None:
    """Rank 1 kills itself in its first attempt; rank 0, as in a broken collective, never ends by itself then."""
    script = """
        echo x >> "$1/tries-$RANK"
        [ $(wc -l < "$1/tries-$RANK") -gt 1 ] && exit 0
        [ $RANK = 1 ] && kill -9 $$
        exec sleep 600
    """
    job = submit(script)
    assert job.wait(SECONDS) == 0
    assert job.logs()[0].parent.name == "attempt-2"


@pytest.mark.sampled(1)
def test_cancel_saves(submit: Submit, tmp_path: Path) -> None:
    job = submit(TRAP)
    ready(tmp_path)
    # Its ranks may be quicker than the supervisor that notes that they run.
    wait_for(lambda: job.state is JobState.RUNNING, deadline=SECONDS, what="it is known to run")
    assert job.exit_code is None
    with pytest.raises(TimeoutError):
        job.wait(0.01)
    assert job.cancel()
    assert job.wait(SECONDS) == 75
    assert (job.state, job.exit_code) == (JobState.SAVED, 75)
    assert names(tmp_path, "saved-*") == ["saved-0", "saved-1"]
    assert not job.cancel(), "it has ended"


@pytest.mark.sampled(1)
def test_cancel_now_does_not(submit: Submit, tmp_path: Path) -> None:
    slow = f'trap "sleep 2; : > \\"$1/saved-$RANK\\"; exit 75" TERM USR1; {READY}'
    job = submit(slow)
    ready(tmp_path)
    assert job.cancel(now=True)
    assert job.wait(SECONDS) == 130
    assert job.state is JobState.CANCELLED
    assert not names(tmp_path, "saved-*")


@pytest.mark.sampled(1)
def test_preempted_it_saves_and_goes_on_where_there_is_a_place(submit: Submit, tmp_path: Path) -> None:
    """A signal to the ranks here; the partition that goes first on Slurm; a node that is drained on Ray. On a cluster
    the job is started again by itself, on Ray with the ranks that there is room for.

    The last one of this module: the node stays drained.
    """
    places: dict[str, dict[str, object]] = {
        "local": {},
        "slurm": {"partition": "low"},
        "ray": {"ray": {"min_ranks": 1}},
    }
    again = f'[ -e "$1/saved-$RANK" ] && {{ echo $WORLD_SIZE >> "$1/again"; exit 0; }}; {TRAP}'
    job = submit(again, options=places[submit.place])
    ready(tmp_path)
    submit.preempt(job)
    assert job.wait(SECONDS) == (75 if submit.place == "local" else 0)
    assert names(tmp_path, "saved-*") == ["saved-0", "saved-1"], "both ranks, whichever was told"
    ranks = (tmp_path / "again").read_text().split() if submit.place != "local" else []
    assert ranks == {"local": [], "slurm": ["2", "2"], "ray": ["1"]}[submit.place]
    assert job.state is (JobState.SAVED if submit.place == "local" else JobState.DONE)


@pytest.mark.slurm
def test_a_preempted_job_of_slurm_is_queued_again_until_it_gets_nowhere(tmp_path: Path) -> None:
    """Its ranks leave with 75 each time, and nothing newer is kept: the third start is the last one."""
    (tmp_path / "logs").mkdir()
    config = LaunchConfig(max_no_progress=2)
    spec = JobSpec(["sh", "-c", 'echo x >> "$1/tries"; exit 75', "sh", str(tmp_path)], tmp_path / "logs")
    write_job(tmp_path, spec, config, ROOT / "slurm" / "rank.sh")
    with SlurmCluster(tmp_path):
        job = SlurmLauncher().submit(
            SlurmRequest(
                "loop", tmp_path, tmp_path / "logs", config, 1, ROOT / "slurm" / "train.sbatch", module="launcher"
            )
        )
        assert job.wait(SECONDS) == 1
    assert (tmp_path / "tries").read_text() == "x\n" * 2
    log = (tmp_path / "logs" / f"slurm-{job.job_id}.log").read_text()
    assert "2 starts of the job in a row came to no newer checkpoint" in log
