"""Runs on a real Slurm: preempted, out of time, cancelled, a node lost; none loses or repeats a row.

Each test submits with the user's command and asserts from the run's own records. The digests of all steps must be
those of the order function, and those of the undisturbed run where that went as far.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.__main__ import write_job
from launcher.config import LaunchConfig
from launcher.job import JobSpec
from launcher.slurm import SlurmLauncher, SlurmRequest
from launcher.slurm_commands import parse_job
from solomonov.proof import prove_record
from solomonov.runfolder import RunFolder
from tests.support.processes import ROOT, wait_for
from tests.support.sampling import sampler
from tests.support.slurm import (
    SlurmCluster,
    first_node,
    nothing_left,
    number_of,
    slurm,
    state_of_job,
    wait_for_state,
)
from tests.support.user import User, unexpected

pytestmark = [pytest.mark.e2e, pytest.mark.slurm, pytest.mark.timeout(600)]

TWO_BY_TWO = ("--nodes", "2", "training.micro_batch_sequences=2", "launch.slurm.gpus_per_node=0")
LONG = ("training.total_steps=4000",)
INTERVAL = 5


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path) as found:
        yield found


def submit(user: User, *words: str) -> str:
    """Submit the user's run to Slurm; returns the number of the job."""
    return number_of(user.must("submit", "own.yaml", "--on", "slurm", *words))


def reached(user: User, step: int) -> None:
    """Wait until so many updates are done."""
    wait_for(lambda: user.steps_done() >= step, deadline=180, what=f"{step} updates are done")


def digests(user: User) -> list[tuple[int, str]]:
    return [(line["step"], line["data_digest"]) for line in user.metrics()]


def assert_no_row_lost(user: User) -> None:
    """Every step of the record is there once, with the rows that the order function names."""
    with contextlib.chdir(user.folder):
        proof = prove_record(RunFolder(Path("runs/own")))
    assert proof.holds, proof


def status(user: User) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(user.must("status", "own", "--json"))
    return found


@pytest.mark.sampled(2, group="Slurm")
@pytest.mark.spare
def test_preempted_saved_queued_again_and_finished(user: User, undisturbed: User, cluster: SlurmCluster) -> None:
    job = submit(user, *TWO_BY_TWO, "launch.partition=low")
    reached(user, sampler("preemption by Slurm").randrange(3, 15))
    cluster.urgent(nodes=4)
    assert user.command("wait", "own").wait(deadline=240) == 0
    for looked in user.journal("preflight"):
        assert (looked["verdict"], looked["ranks"], len(looked["nodes"])) == ("good", 4, 2)
        assert looked["slowest_links_bytes_per_second"]["0-1"] > 0
    assert len(user.journal("preflight")) == len(user.journal("resumed")), "before each attempt"
    first, second = user.journal("resumed")
    (requeued,) = user.journal("requeued")
    assert (requeued["job"], requeued["reason"]) == (job, "preempted")
    assert 0 < requeued["step"] == second["step"], "what was saved is what it went on from"
    assert user.journal("preempted")[0]["step"] == second["step"], "all ranks saved at that step"
    assert [event["restart"] for event in user.journal("job_started")] == [0, 1]
    assert (first["layout"]["world"], second["layout"]["world"]) == (4, 4)
    assert digests(user) == digests(undisturbed)
    assert not (user.run() / "metrics.superseded.jsonl").exists(), "a clean stop replays nothing"
    assert not unexpected(user.journal())
    hosts = {event["host"] for event in user.journal("rank_exited")}
    assert len(hosts) >= 2, "ranks ran on two nodes"
    assert status(user)["state"] == "done"
    nothing_left(user.folder)


@pytest.mark.sampled(2, group="Slurm")
@pytest.mark.spare
def test_saved_before_the_time_limit_and_queued_again(user: User, cluster: SlurmCluster) -> None:
    """Slurm counts in minutes, and warns some 20 s earlier than it was asked to."""
    limit = ("launch.slurm.time_minutes=1", "launch.slurm.save_seconds=5", "launch.max_no_progress=9")
    job = submit(user, *LONG, *limit, "launch.slurm.gpus_per_node=0")

    def kept() -> list[dict[str, Any]]:
        """The requeues that kept something: on a busy machine the first starts may not get to a step."""
        return [event for event in user.journal("requeued") if event["step"]]

    wait_for(lambda: len(kept()) >= 1, deadline=400, what="it was queued again")
    requeued = kept()[0]
    wait_for(lambda: user.journal("resumed")[-1]["time"] > requeued["time"], deadline=240, what="it goes on")
    second = user.journal("resumed")[-1]
    assert requeued["reason"] == "saved before the time limit"
    assert 0 < requeued["step"] == second["step"]
    user.must("cancel", "own")
    assert user.command("wait", "own").wait(deadline=120) == 75
    assert state_of_job(job) in ("FAILED", "COMPLETING"), "75 is what the job left with"
    assert status(user)["state"] == "saved"
    assert_no_row_lost(user)
    assert not unexpected(user.journal())


@pytest.mark.sampled(2, group="Slurm")
@pytest.mark.spare
def test_cancelled_it_saves_and_resume_goes_on(user: User, cluster: SlurmCluster) -> None:
    """By our own command; then by Slurm's, and Slurm does not start it again."""
    submit(user, *LONG, "launch.slurm.gpus_per_node=0")
    reached(user, 4)
    refused = user.command("submit", "own.yaml", "--on", "slurm")
    assert refused.wait(deadline=60) == 78
    assert "the run is running" in refused.output()
    user.must("cancel", "own")
    assert user.command("wait", "own").wait(deadline=120) == 75
    saved = user.journal("left")[-1]
    assert saved["reason"] == "cancelled"
    again = number_of(user.must("resume", "own"))
    reached(user, saved["step"] + 3)
    slurm("scancel", again)
    assert wait_for_state(again, "CANCELLED") == "CANCELLED"
    wait_for(lambda: len(user.journal("finished")) == 2, deadline=60, what="its ranks have saved and left")
    assert status(user)["state"] == "saved"
    nothing_left(user.folder)
    user.must("resume", "own")
    reached(user, user.steps_done() + 3)
    user.must("cancel", "own")
    assert user.command("wait", "own").wait(deadline=120) == 75
    steps = [event["step"] for event in user.journal("resumed")]
    assert steps == sorted(steps)
    assert steps[1] == saved["step"] > 0
    assert_no_row_lost(user)
    assert not (user.run() / "metrics.superseded.jsonl").exists()
    assert not unexpected(user.journal())


@pytest.mark.sampled(2, group="Slurm")
@pytest.mark.spare
def test_a_lost_node_is_replaced_and_its_orphans_are_fenced_off(user: User, cluster: SlurmCluster) -> None:
    """The daemon of the first node dies; its ranks and their supervisor live on and know nothing of it."""
    job = submit(user, *LONG, "launch.slurm.gpus_per_node=0", "launch.partition=main")
    reached(user, INTERVAL + 2)
    node = first_node(job)
    cluster.kill_node(node)
    wait_for(lambda: len(user.journal("job_started")) == 2, deadline=240, what="Slurm has started it elsewhere")
    wait_for(lambda: len(user.journal("resumed")) == 2, deadline=240, what="it goes on")
    assert first_node(job) != node
    wait_for(lambda: user.journal("superseded"), deadline=60, what="the orphans see that they were replaced")
    orphans, replaced = user.journal("superseded")[0], user.journal("resumed")[1]
    assert (orphans["attempt"], replaced["attempt"]) == (1, 2)
    assert replaced["step"] > 0
    reached(user, replaced["step"] + 3)
    user.must("cancel", "own")
    assert user.command("wait", "own").wait(deadline=120) == 75
    wait_for(lambda: len(user.journal("left")) == 2, deadline=60, what="both scripts have left")
    assert {event["reason"] for event in user.journal("left")} == {
        "cancelled",
        "Slurm has started the job anew meanwhile: that one goes on",
    }
    assert not user.journal("requeued"), "the orphan did not disturb the job that has its number"
    assert_no_row_lost(user)
    assert not unexpected(user.journal(), "superseded")
    nothing_left(user.folder)


@pytest.mark.measured
@pytest.mark.parametrize("killed", ["rank", "agent"])
def test_a_node_on_which_ranks_crash_is_avoided(killed: str, tmp_path: Path, cluster: SlurmCluster) -> None:
    """The job is two ranks on two nodes; the first rank names its node, and from then on ranks crash there. Its peer
    raises first, as one that has lost its connection; in the second attempt it waits, as one that did not notice. Of a
    rank whose agent was killed, and which went with it, nobody reports.
    """
    victim = {"rank": "$$", "agent": "$PPID"}[killed]
    script = f"""
        [ $RANK = 0 ] && [ ! -e "$1/bad" ] && echo "$SOLOMONOV_NODE" > "$1/bad"
        while [ ! -e "$1/bad" ]; do sleep 0.05; done
        echo "$SOLOMONOV_NODE" >> "$1/nodes"
        [ "$SOLOMONOV_NODE" = "$(cat "$1/bad")" ] && kill -9 {victim} && sleep 600
        case ${{SLURM_RESTART_COUNT:-0}}-$SOLOMONOV_ATTEMPT in 0-1) sleep 0.2; exit 1;; 0-2) sleep 600;; esac
        sleep 2
    """
    (tmp_path / "logs").mkdir()
    config = LaunchConfig(nodes=2, partition="main", restart_backoff_seconds=0.1, max_no_progress=2)
    spec = JobSpec(["sh", "-c", script, "sh", str(tmp_path)], tmp_path / "logs", nodes=2)
    write_job(tmp_path, spec, config, ROOT / "slurm" / "rank.sh")
    script_file = ROOT / "slurm" / "train.sbatch"
    request = SlurmRequest("bad node", tmp_path, tmp_path / "logs", config, 1, script_file, module="launcher")
    job = SlurmLauncher().submit(request)
    assert job.wait(240.0) == 0, (tmp_path / "logs" / f"slurm-{job.job_id}.log").read_text()
    bad = (tmp_path / "bad").read_text().strip()
    log = (tmp_path / "logs" / f"slurm-{job.job_id}.log").read_text()
    assert f"every crash began on {bad}: again without it" in log
    shown = parse_job(slurm("scontrol", "show", "job", job.job_id))
    assert (shown["Restarts"], shown["ExcNodeList"]) == ("1", bad)
    assert bad not in (tmp_path / "nodes").read_text().split()[-2:]


@pytest.mark.ray
@pytest.mark.spare
def test_data_workers_on_a_private_ray_of_the_job(
    user: User, undisturbed: User, cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ray in the allocation, a node of it on each of its machines; torn down with the job."""
    temporary = Path(tempfile.mkdtemp(prefix="m", dir="/tmp"))  # a short one: sockets are put below it
    monkeypatch.setenv("TMPDIR", str(temporary))
    job = submit(user, *TWO_BY_TWO, "data.workers.backend=ray", "data.workers.count=2")
    assert user.command("wait", "own").wait(deadline=240) == 0
    assert digests(user) == digests(undisturbed)
    [started] = user.journal("data_service_started")
    assert len({worker["worker_node"] for worker in started["workers"]}) == 2, "a data worker on each machine"
    served = user.journal("data_served")
    assert len({int(pid) for event in served for pid in event["rows_by_pid"]}) == 2
    assert not any(event["rows_inline"] for event in served)
    assert not unexpected(user.journal())
    assert wait_for_state(job, "COMPLETED") == "COMPLETED"
    nothing_left(user.folder)
    assert not list(temporary.glob("sol-*"))
    shutil.rmtree(temporary)  # torch has put an empty folder there


@pytest.mark.sampled(2, group="Slurm")
@pytest.mark.spare
def test_a_sweep_is_an_array_of_runs(user: User, undisturbed: User, cluster: SlurmCluster) -> None:
    """One at a time; the second one, long enough to be met at work, is cancelled, its element alone, and resumed."""
    words = ("--sweep", "run.seed=5,6", "launch.slurm.array_at_once=1", "launch.slurm.gpus_per_node=0")
    steps = 600
    output = user.must("submit", "own.yaml", "--on", "slurm", "--json", f"training.total_steps={steps}", *words)
    first, second = (json.loads(line) for line in output.splitlines() if line.startswith("{"))
    assert (first["run"], second["run"]) == ("runs/own-0", "runs/own-1")
    array = first["job"].removesuffix("_0")
    assert second["job"] == f"{array}_1"
    wait_for(lambda: user.steps_done("own-1") >= 3, deadline=240, what="the second run trains")
    assert user.steps_done("own-0") == steps, "one at a time"
    user.must("cancel", "own-1")
    assert user.command("wait", "own-1").wait(deadline=120) == 75
    assert user.command("wait", "own-0").wait(deadline=60) == 0
    [left] = user.journal("left", name="own-1")
    assert (left["job"], left["reason"]) == (second["job"], "cancelled")
    assert (user.run("own-1") / "logs" / f"slurm-{second['job']}.log").exists()
    user.must("resume", "own-1")
    assert user.command("wait", "own-1").wait(deadline=240) == 0
    assert [event["step"] for event in user.journal("resumed", name="own-1")] == [0, left["step"]]
    seeds = [[line["data_digest"] for line in user.metrics(name)] for name in ("own-0", "own-1")]
    same = [digest for _, digest in digests(undisturbed)]
    assert seeds[0][: len(same)] == same, "seed 5"
    assert [len(column) for column in seeds] == [steps, steps]
    assert not set(seeds[0]) & set(seeds[1]), "seed 6"
    assert not unexpected(user.journal(name="own-0") + user.journal(name="own-1"))
    nothing_left(user.folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("launch.partition=nowhere",), "there is no such partition"),
        (
            ("--nodes", "8", "launch.ranks_per_node=1", "training.micro_batch_sequences=1"),
            "fewer nodes than the run wants",
        ),
        (("--sweep", "launch.nodes=1,2"), "this is no sweep"),
        (("--sweep", "run.seed=1,2", "run.folder=runs-%a"), "the folder of a sweep cannot be told to Slurm"),
        (("launch.slurm.gpus_per_node=3",), "fewer GPUs than the run wants"),
        (("run.folder=/dev/shm/solomonov-runs",), "the run's folder is not on shared storage"),
        (("launch.slurm.setup_script=nowhere.sh",), "the setup script cannot be read"),
        (("launch.slurm.container_image=torch.sqsh",), "this cluster starts no containers"),
        (("launch.slurm.options=[--reservation=nowhere]",), "sbatch failed"),
    ],
)
def test_what_cannot_work_is_refused_at_submission(
    words: tuple[str, ...], message: str, user: User, cluster: SlurmCluster
) -> None:
    command = user.command("submit", "own.yaml", "--on", "slurm", *words)
    assert command.wait(deadline=60) == 78
    assert message in command.output()
    assert "remedy:" in command.output()
    assert "Traceback" not in command.output()


def test_without_slurm_on_the_path(user: User) -> None:
    command = user.command("submit", "own.yaml", "--on", "slurm", PATH="/nowhere")
    assert command.wait(deadline=60) == 78
    assert "is not on the PATH" in command.output()


def test_a_dry_run_shows_all_and_does_nothing(user: User, cluster: SlurmCluster) -> None:
    shown = user.must("submit", "own.yaml", "--on", "slurm", "--dry-run", *TWO_BY_TWO)
    assert "sbatch --parsable --job-name=own --nodes=2 --ntasks-per-node=2" in shown
    assert (Path(__file__).parents[2] / "slurm" / "train.sbatch").read_text() in shown
    assert not (user.folder / "runs").exists()
