"""What a supervisor derives before it starts anything; the starts themselves are in tests/e2e."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import LaunchConfigurationError, SlurmError
from launcher.gang import LocalGang
from launcher.job import JobSpec, take_request, write_request
from launcher.local import LocalJob, LocalLauncher
from launcher.ray import client_environment
from launcher.ray_gang import RayGang, RayRoom
from launcher.slurm_commands import JobRecord
from launcher.slurm_cycle import Cycle
from launcher.slurm_step import Allocation
from solomonov import supervise as module
from solomonov.config import Config, parse_config
from solomonov.display import TrainingDisplay
from solomonov.errors import ConfigurationError
from solomonov.heartbeat import EVERY_STEP, SECTIONS
from solomonov.runfolder import LockOwner, RunFolder, run_lock
from solomonov.start import prepare_run
from solomonov.supervise import (
    Place,
    Session,
    hang_limits,
    launch_section,
    legal_worlds,
    request_file,
    requeue,
    slurm_scripts,
    submitted,
    supervise,
    train,
)
from tests.support.runs import begin_run, load
from tests.support.user import User

TEXT = """
run: {name: tiny}
model: {layers: 2, d_model: 32, heads: 4, kv_heads: 2, d_ff: 64}
tokenizer: {vocab_size: 320}
data: {folder: d, sources: [{name: one, path: x}], sequence_tokens: 32}
training: {total_steps: 10, global_batch_tokens: 384, micro_batch_sequences: 1}
"""


def config(*overrides: str) -> Config:
    return parse_config(TEXT, overrides, where="tiny").config


def worlds(*overrides: str) -> list[int]:
    loaded = parse_config(TEXT, overrides, where="tiny")
    return legal_worlds(loaded.config, launch_section(loaded))


def test_an_elastic_run_has_the_worlds_that_divide_its_batch() -> None:
    """384 tokens are 12 rows of 32."""
    naive = [ranks for ranks in range(2, 13) if 12 % ranks == 0]
    assert worlds("launch.nodes=3", "launch.ranks_per_node=4", "launch.ray.min_ranks=2") == naive
    assert worlds("launch.nodes=3", "launch.ranks_per_node=4") == [12], "without a minimum there is one"
    assert worlds("launch.ranks_per_node=4", "launch.ray.min_ranks=4") == [4]


def test_a_rank_may_wait_for_its_workers_and_for_a_slow_disk() -> None:
    plain = hang_limits(config("resilience.hang_minimum_seconds=7.0", "resilience.hang_start_seconds=99.0"))
    assert (plain.minimum_seconds, plain.start_seconds) == (7.0, 99.0)
    assert "data" not in plain.allowances
    patient = hang_limits(config("data.workers.backend=ray", "data.workers.patience_seconds=33.0"))
    assert patient.allowances["data"] > 33.0
    for limits in (plain, patient):
        assert limits.allowances["save"] >= 60.0
        assert set(limits.every_step) == set(EVERY_STEP) < set(SECTIONS)


def test_without_a_cluster_the_ranks_are_children_of_ours() -> None:
    place = Place()
    assert place.is_here
    assert place.is_current()
    assert place.owner is None
    loaded = parse_config(TEXT, (), where="tiny")
    assert place.start_gang(launch_section(loaded), [1]) is LocalGang


def test_a_start_of_a_slurm_job_owns_the_lock_by_job_and_count(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(Allocation("12", 3, 2, "node[1-2]"))
    assert not place.is_here
    assert place.owner == LockOwner("slurm 12", 3)
    assert place.owner != Place(Allocation("12", 4, 2, "node[1-2]")).owner


def test_a_container_and_the_cpus_of_a_rank_reach_srun() -> None:
    overrides = ("launch.slurm.container_image=image.sqsh", "launch.slurm.container_mounts=/a:/b")
    launch = launch_section(parse_config(TEXT, (*overrides, "launch.slurm.cpus_per_rank=6"), where="tiny"))
    start = Place(Allocation("12", 0, 2, "node[1-2]")).start_gang(launch, [2])
    given = start.keywords  # type: ignore[attr-defined]
    wanted = ["--container-image=image.sqsh", "--container-mounts=/a:/b", "--cpus-per-task=6"]
    assert given["srun_options"] == wanted
    assert given["rank_script"] == slurm_scripts() / "rank.sh"


def test_the_scripts_are_there() -> None:
    assert {path.name for path in slurm_scripts().iterdir()} >= {"train.sbatch", "rank.sh"}


def test_a_submitted_run_is_read_as_it_was_submitted(user: User) -> None:
    run = begin_run(user, "training.total_steps=7")
    with contextlib.chdir(user.folder.parent):
        loaded = submitted(run.path, [])
        assert Path.cwd() == user.folder, "its paths count from where it was submitted"
    assert loaded.config == load(user, "training.total_steps=7").config
    again = submitted(user.folder / "own.yaml", ["launch.nodes=3"])
    assert launch_section(again).nodes == 3
    assert dataclasses.replace(again, overrides=()).config == load(user).config


def test_outside_of_slurm_there_is_nothing_to_queue_again(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(LaunchConfigurationError, match="not in a Slurm job"):
        requeue(user.folder / "own.yaml", 75)


def test_what_is_no_run_is_not_supervised(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="not the folder of a run"):
        supervise(tmp_path)


# --- requests to leave -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("now", "code"), [(False, 75), (True, 130)])
def test_a_request_that_came_before_the_supervisor_listened_is_obeyed(now: bool, code: int, user: User) -> None:
    """As by `cancel` of a run that was only just submitted. It is obeyed once: the next start is not asked."""
    run = begin_run(user, "training.total_steps=3")
    write_request(request_file(run), now=now)
    assert supervise(run.path) == code
    assert not list(run.journal.events("attempt_started"))
    assert run.journal.last("stopping") is not None
    assert not list(run.logs.glob("request*"))


def finished_run(user: User) -> RunFolder:
    """One in which nothing is left to train."""
    run = begin_run(user)
    run.journal.write("training_finished", step=60)
    (run.checkpoints / "step-00000060").mkdir()
    (run.checkpoints / "step-00000060" / "MANIFEST.json").touch()
    return run


def test_a_request_that_was_meant_for_an_earlier_command_is_forgotten(user: User) -> None:
    run = finished_run(user)
    write_request(request_file(run), now=True)
    assert train(user.folder / "own.yaml") == 0
    assert not request_file(run).exists()


def test_a_request_to_the_command_that_works_on_the_run_is_left_to_it(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run(user)
    monkeypatch.setattr(module, "run_lock", partial(run_lock, wait_seconds=0.0))
    with run_lock(run):
        write_request(request_file(run), now=False)
        with pytest.raises(ConfigurationError, match="another command is working on this run"):
            train(user.folder / "own.yaml")
    assert take_request(request_file(run)) == "save"


# --- where the ranks run ---------------------------------------------------------------------------------------------


def ray_room(*overrides: str) -> RayRoom:
    """What a start on a Ray cluster asks for."""
    launch = launch_section(parse_config(TEXT, overrides, where="tiny"))
    start = Place(ray_address="host:1").start_gang(launch, [2, 4])
    assert start.func is RayGang  # type: ignore[attr-defined]
    room = start.keywords["room"]  # type: ignore[attr-defined]
    assert isinstance(room, RayRoom)
    return room


def test_what_is_asked_of_ray_is_what_was_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "visible_gpus", lambda: 8)
    options = ("launch.ray.cpus_per_rank=2.5", "launch.ray.gpus_per_rank=0.5", "launch.ray.start_seconds=7.0")
    environment = client_environment()
    assert ray_room(*options) == RayRoom("host:1", [2, 4], 2.5, 0.5, environment, 7.0)
    assert ray_room("launch.ray.gpus_per_rank=0.0").gpus == 0.0, "none is a choice too"
    assert ray_room().gpus == 1.0, "one a rank, however many this machine has"
    monkeypatch.setattr(module, "visible_gpus", lambda: 0)
    assert ray_room().gpus == 0.0
    place = Place(ray_address="host:1")
    assert not place.is_here, "what is passed to children does not reach its ranks"
    assert place.owner is None


SHOWN = JobRecord("RUNNING", "None", 3, 0, False, False, "node[1-2]", "", "main", 4)


@pytest.mark.parametrize(
    ("shown", "current"),
    [
        (SHOWN, True),
        (dataclasses.replace(SHOWN, restarts=4), False),
        (None, True),  # forgotten
        (SlurmError("Slurm does not answer", got="", rule="", remedy=""), True),
    ],
)
def test_a_start_of_a_slurm_job_ends_with_the_next_one(
    shown: JobRecord | SlurmError | None, current: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def show_job(job: str) -> JobRecord | None:
        assert job == "12"
        if isinstance(shown, SlurmError):
            raise shown
        return shown

    monkeypatch.setattr("launcher.slurm_commands.show_job", show_job)
    assert Place(Allocation("12", 3, 2, "node[1-2]")).is_current() is current


@pytest.mark.parametrize(
    ("in_slurm", "grace", "save", "expected"),
    [
        (True, 300.0, 120, 110.0),  # the defaults: the ranks are killed before Slurm ends the job
        (True, 60.0, 120, 60.0),
        (True, 300.0, 600, 300.0),
        (True, 300.0, 11, 1.0),
        (True, 300.0, 5, 1.0),
        (True, 0.5, 5, 0.5),
        (False, 300.0, 5, 300.0),
    ],
)
def test_in_a_slurm_job_the_grace_ends_before_the_job_does(
    in_slurm: bool, grace: float, save: int, expected: float, user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session is asked to leave before it begins, so that it starts no rank."""
    configured = []

    class Recorded(LocalLauncher):
        def run(self, spec: JobSpec) -> LocalJob:
            configured.append(self.config)
            return super().run(spec)

    monkeypatch.setattr("launcher.local.LocalLauncher", Recorded)
    place = Place(Allocation("12", 3, 1, "node1")) if in_slurm else Place()
    made = session(user, overrides=(f"launch.grace_seconds={grace}", f"launch.slurm.save_seconds={save}"), place=place)
    write_request(request_file(made._run), now=False)
    assert made.run() == 75
    [found] = configured
    assert found.grace_seconds == expected
    assert found == made._launch.model_copy(update={"grace_seconds": expected}), "and nothing else is changed"


# --- what is said of a fault -----------------------------------------------------------------------------------------


def session(
    user: User, cycle: Cycle | None = None, overrides: Sequence[str] = (), place: Place | None = None
) -> Session:
    """That of a run whose newest checkpoint is of step 10, about to start attempt 1."""
    loaded = load(user, *overrides)
    prepared = prepare_run(loaded, ranks_per_node=2, launch={"ranks_per_node": 2})
    prepared.write()
    prepared.run.journal.write("checkpoint_durable", step=10)
    made = Session(prepared, launch_section(loaded), place or Place(), 0, None, cycle)
    made._display = TrainingDisplay(prepared.run, 60, "")
    return made


def started(made: Session, attempt: int) -> None:
    made._on_event("attempt_started", attempt=attempt, ranks=2, pids=[], master_port=1)


def ended(made: Session, rank: int, code: int | None, step: int | None = 15, *, killed: bool = False) -> None:
    """`code`: None: of a signal."""
    fields = {"attempt": made._attempt, "host": f"node{rank}", "killed_by_launcher": killed, "section": "forward"}
    made._on_event("rank_exited", rank=rank, exit_code=code, step=step, signal=None, **fields)


def restarted(made: Session, rank: int | None = 1) -> None:
    made._on_event("restart", attempt=made._attempt + 1, cause="rank 1 crashed", rank=rank, backoff_seconds=0.5)


def finished(made: Session, code: int, rank: int | None = 0) -> None:
    made._on_event("finished", exit_code=code, attempts=1, reason="used up", rank=rank)


def incidents(made: Session) -> list[dict[str, Any]]:
    return list(made._run.journal.events("incident"))


def test_an_incident_tells_the_rank_that_the_launcher_blames(user: User) -> None:
    made = session(user)
    started(made, 1)
    ended(made, 1, None)
    ended(made, 0, 1, killed=True)
    restarted(made, rank=1)
    (found,) = incidents(made)
    told = {name: found[name] for name in ("what", "attempt", "rank", "host", "section", "call", "step", "done")}
    assert told == {
        "what": "rank 1 crashed",
        "attempt": 1,
        "rank": 1,
        "host": "node1",
        "section": "forward",
        "call": None,
        "step": 15,
        "done": "attempt 2 begins in 0.5 s",
    }
    assert (found["durable_step"], found["steps_lost"]) == (10, 4), "updates 11 to 14 were done, 15 was under way"


@pytest.mark.parametrize(("step", "lost"), [(11, 0), (10, 0), (12, 1), (None, None)])
def test_updates_that_are_lost(step: int | None, lost: int | None, user: User) -> None:
    """The checkpoint of a step stands while the heartbeat still names that step."""
    made = session(user)
    started(made, 1)
    ended(made, 1, None, step)
    restarted(made)
    assert [found["steps_lost"] for found in incidents(made)] == [lost]


def test_a_hang_is_told_with_its_call_and_not_by_those_that_were_killed_for_it(user: User) -> None:
    made = session(user)
    started(made, 1)
    made._on_event("hang", attempt=1, rank=1, step=13, section="data", seconds=9.0, limit_seconds=8.0, call="f (x:1)")
    ended(made, 0, None, 14, killed=True)
    ended(made, 1, None, 13, killed=True)
    restarted(made)
    (found,) = incidents(made)
    assert (found["rank"], found["section"], found["call"], found["steps_lost"]) == (1, "data", "f (x:1)", 2)


def test_an_incident_keeps_the_last_lines_of_the_rank(user: User) -> None:
    made = session(user)
    started(made, 1)
    for rank in (0, 1):
        log = made._run.logs / "attempt-1" / f"rank-{rank}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("".join(f"line {n} of rank {rank}\n" for n in range(20)))
    ended(made, 1, 1)
    restarted(made)
    (found,) = incidents(made)
    assert found["last_lines"] == [f"line {n} of rank 1" for n in range(8, 20)]


def test_each_attempt_has_its_own_incident(user: User) -> None:
    made = session(user)
    started(made, 1)
    ended(made, 0, 1)
    made._on_event("hang", attempt=1, rank=0, step=13, section="data", seconds=9.0, limit_seconds=8.0, call="f (x:1)")
    restarted(made, rank=0)
    started(made, 2)
    ended(made, 1, None)
    finished(made, 137, rank=1)
    found = incidents(made)
    assert [(each["attempt"], each["rank"], each["call"]) for each in found] == [(1, 0, "f (x:1)"), (2, 1, None)]
    assert (found[1]["what"], found[1]["done"]) == ("used up", "given up")


def test_ranks_that_save_for_another_number_of_them_are_no_incident(user: User) -> None:
    made = session(user)
    started(made, 1)
    made._on_event("resize", attempt=1, reason="a node is about to leave")
    for rank in (0, 1):
        ended(made, rank, 75)
    restarted(made, rank=None)
    started(made, 2)
    ended(made, 0, 0)
    finished(made, 0)
    assert incidents(made) == []


@pytest.mark.parametrize(("number", "told"), [("SIGTERM", 0), ("SIGSEGV", 1)])
def test_a_rank_that_was_asked_before_it_could_save_is_no_incident(number: str, told: int, user: User) -> None:
    made = session(user)
    started(made, 1)
    made._on_event("resize", attempt=1, reason="a node is about to leave")
    end = {"attempt": 1, "rank": 0, "exit_code": None, "signal": number, "host": None, "step": None, "section": None}
    made._on_event("rank_exited", **end, killed_by_launcher=False)
    restarted(made, rank=0)
    assert len(incidents(made)) == told


def test_a_rank_that_crashes_before_a_resize_is_an_incident(user: User) -> None:
    """As on a node that is lost while it is being left: the peer that is killed for it is not to blame."""
    made = session(user)
    started(made, 1)
    ended(made, 1, None)
    made._on_event("resize", attempt=1, reason="a node is about to leave")
    ended(made, 0, None, killed=True)
    restarted(made)
    assert [each["rank"] for each in incidents(made)] == [1]


@pytest.mark.parametrize(("code", "told"), [(0, False), (75, False), (130, False), (1, True), (70, True), (78, True)])
def test_an_end_that_was_asked_for_is_no_incident(code: int, told: bool, user: User) -> None:
    made = session(user)
    started(made, 1)
    ended(made, 0, None if code == 130 else code, killed=code == 130)
    finished(made, code)
    assert bool(incidents(made)) is told


def test_a_run_without_a_checkpoint_loses_all(user: User) -> None:
    made = session(user)
    made._run.journal.path.unlink()
    started(made, 1)
    ended(made, 1, None)
    restarted(made)
    assert [(found["durable_step"], found["steps_lost"]) for found in incidents(made)] == [(0, 14)]


def test_another_command_that_has_begun_an_attempt_ends_ours(user: User) -> None:
    made = session(user)
    assert made._still_ours()
    started(made, 1)
    assert made._still_ours()
    made._run.journal.write("attempt_started", attempt=2)
    assert not made._still_ours()


def test_a_slurm_job_takes_note_of_crashes(user: User, tmp_path: Path) -> None:
    """They are what a node is suspected by: that of the rank to blame, however late its end is known."""
    cycle = Cycle(tmp_path, Allocation("12", 3, 2, "node[1-2]"))
    made = session(user, cycle)
    started(made, 1)
    ended(made, 0, 1)
    ended(made, 1, None)
    restarted(made, rank=1)
    assert cycle.hosts_of_crashes == {1: "node1"}
