"""What a supervisor derives before it starts anything; the starts themselves are in tests/e2e."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import pytest

from launcher.errors import LaunchConfigurationError
from launcher.gang import LocalGang
from solomonov.config import Config, parse_config
from solomonov.errors import ConfigurationError
from solomonov.heartbeat import EVERY_STEP, SECTIONS
from solomonov.runfolder import LockOwner
from solomonov.supervise import (
    Place,
    hang_limits,
    launch_section,
    legal_worlds,
    requeue,
    slurm_scripts,
    submitted,
    supervise,
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
    from launcher.slurm_step import Allocation

    place = Place(Allocation("12", 3, 2, "node[1-2]"))
    assert not place.is_here
    assert place.owner == LockOwner("slurm 12", 3)
    assert place.owner != Place(Allocation("12", 4, 2, "node[1-2]")).owner


def test_a_container_and_the_cpus_of_a_rank_reach_srun() -> None:
    from launcher.slurm_step import Allocation

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
