"""The `launch` section against its documented limits."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from launcher.config import LaunchConfig, RayConfig, SlurmConfig


def test_the_defaults_are_the_documented_ones() -> None:
    assert LaunchConfig().model_dump() == {
        "nodes": 1,
        "ranks_per_node": 1,
        "max_restarts": 10,
        "max_no_progress": 3,
        "restart_backoff_seconds": 1.0,
        "grace_seconds": 300.0,
        "master_port": None,
        "partition": None,
        "slurm": SlurmConfig().model_dump(),
        "ray": RayConfig().model_dump(),
        "ray_address": None,
        "shared_folder": "auto",
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"nodes": 0},
        {"ranks_per_node": 0},
        {"max_restarts": -1},
        {"max_no_progress": 0},
        {"restart_backoff_seconds": -0.5},
        {"grace_seconds": 0.0},
        {"grace_seconds": float("nan")},
        {"master_port": 0},
        {"master_port": 65536},
        {"partition": ""},
        {"ranks_per_node": "2"},
        {"rank_per_node": 2},
        {"shared_folder": "no"},
        {"shared_folder": False},
    ],
)
def test_values_out_of_range_and_unknown_keys_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        LaunchConfig.model_validate(wrong)


def test_null_ranks_are_left_to_the_caller() -> None:
    assert LaunchConfig(ranks_per_node=None).ranks_per_node is None


def test_the_word_yes_is_one_though_yaml_reads_it_otherwise() -> None:
    assert LaunchConfig.model_validate({"shared_folder": True}).shared_folder == "yes"
    assert LaunchConfig.model_validate_json('{"shared_folder": true}').shared_folder == "yes"
    assert LaunchConfig(shared_folder="yes").model_dump(mode="json")["shared_folder"] == "yes"
