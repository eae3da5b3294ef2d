"""The torchrun variables: written as torchrun writes them, read back, refused when they make no sense."""

from __future__ import annotations

import dataclasses

import pytest

from launcher.errors import LaunchConfigurationError
from launcher.rank_env import RankEnvironment

PLACE = RankEnvironment(
    rank=5,
    world_size=8,
    local_rank=1,
    local_world_size=4,
    group_rank=1,
    master_addr="10.0.0.1",
    master_port=29500,
)


def test_the_variables_are_those_of_torchrun() -> None:
    assert PLACE.to_environment() == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "GROUP_RANK": "1",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29500",
    }


def test_written_and_read_back() -> None:
    assert RankEnvironment.from_environment(PLACE.to_environment()) == PLACE


def test_this_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLACE.to_environment().items():
        monkeypatch.setenv(name, value)
    assert RankEnvironment.from_environment() == PLACE


@pytest.mark.parametrize("name", sorted(PLACE.to_environment()))
def test_each_variable_is_needed(name: str) -> None:
    environment = PLACE.to_environment()
    del environment[name]
    with pytest.raises(LaunchConfigurationError, match=f"{name} is not set"):
        RankEnvironment.from_environment(environment)


@pytest.mark.parametrize("value", ["", "-1", "1.0", "one", "²", " 1"])
def test_a_rank_that_is_no_number_is_refused(value: str) -> None:
    with pytest.raises(LaunchConfigurationError, match="RANK"):
        RankEnvironment.from_environment({**PLACE.to_environment(), "RANK": value})


@pytest.mark.parametrize(
    "wrong", [{"rank": 8}, {"local_rank": 4}, {"rank": 0}, {"local_world_size": 9}, {"master_port": 65536}]
)
def test_contradictions_are_refused_with_all_values(wrong: dict[str, int]) -> None:
    environment = dataclasses.replace(PLACE, **wrong).to_environment()  # type: ignore[arg-type]
    with pytest.raises(LaunchConfigurationError) as caught:
        RankEnvironment.from_environment(environment)
    assert caught.value.exit_code == 78
    assert all(f"{name}={value}" in caught.value.got for name, value in environment.items())
