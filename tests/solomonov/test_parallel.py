"""Illegal layouts are refused before anything is allocated, with the nearest legal one."""

from __future__ import annotations

import pytest

from solomonov.errors import ConfigurationError
from solomonov.parallel import ParallelConfig, check_layout


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_all_ranks_are_data_parallel(stage: int) -> None:
    parallel = ParallelConfig.model_validate({"zero_stage": stage})
    assert check_layout(parallel, precision="fp32", world=6) == 6


def test_bf16_needs_stage_1() -> None:
    parallel = ParallelConfig(zero_stage=0)
    assert check_layout(parallel, precision="bf16_autocast", world=2) == 2
    with pytest.raises(ConfigurationError, match=r"zero_stage to 1"):
        check_layout(parallel, precision="bf16", world=2)


@pytest.mark.parametrize("key", ["pipeline", "sequence"])
def test_degrees_that_are_not_offered_are_refused(key: str) -> None:
    with pytest.raises(ConfigurationError, match=f"parallel.{key}"):
        check_layout(ParallelConfig.model_validate({key: 2}), precision="fp32", world=2)
