"""Illegal layouts are refused before anything is allocated, with the nearest legal one."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solomonov.errors import ConfigurationError
from solomonov.model.config import ModelConfig
from solomonov.parallel import ParallelConfig, check_layout


def check(world: int = 4, precision: str = "fp32", layers: int = 12, heads: int = 4, **keys: Any) -> int:
    model = ModelConfig(layers=layers, heads=heads, d_model=16 * heads)
    parallel = ParallelConfig.model_validate(keys)
    return check_layout(parallel, precision=precision, world=world, model=model, sequence_tokens=64)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_all_ranks_are_data_parallel(stage: int) -> None:
    assert check(world=6, zero_stage=stage) == 6


def test_bf16_needs_stage_1() -> None:
    assert check(world=2, precision="bf16_autocast", zero_stage=0) == 2
    with pytest.raises(ConfigurationError, match=r"zero_stage to 1"):
        check(world=2, precision="bf16", zero_stage=0)


@pytest.mark.parametrize(("world", "ranks", "copies"), [(2, 2, 1), (4, 2, 2), (12, 4, 3), (4, 4, 1)])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ranks_that_share_rows_see_the_same_ones(world: int, ranks: int, copies: int, stage: int) -> None:
    assert check(world=world, sequence=ranks, zero_stage=stage) == copies


@pytest.mark.parametrize(
    ("keys", "what", "remedy"),
    [
        ({"world": 6, "sequence": 4}, "the ranks", "set parallel.sequence to 2"),
        ({"world": 12, "sequence": 3}, "model.heads", "set parallel.sequence to 2"),
        ({"world": 12, "heads": 12, "sequence": 12}, "data.sequence_tokens", "set parallel.sequence to 4"),
        ({"sequence": 2, "pipeline": 2}, "a pipeline does not share rows", "set parallel.pipeline to 1, or"),
    ],
)
def test_what_cannot_share_rows_is_told_what_can(keys: dict[str, Any], what: str, remedy: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check(**keys)
    assert what in caught.value.what
    assert caught.value.remedy.startswith(remedy)


def test_a_row_with_a_source_is_not_shared_and_an_encoder_s_is() -> None:
    """The remedy's layouts, taken at their word, are legal."""
    two = ModelConfig(architecture="encoder_decoder", layers=2, encoder_layers=3, heads=4, d_model=64)
    encoder = ModelConfig(architecture="encoder", layers=2, heads=4, d_model=64)

    def copies(model: ModelConfig, world: int = 4, **keys: Any) -> int:
        parallel = ParallelConfig.model_validate(keys)
        return check_layout(parallel, precision="fp32", world=world, model=model, sequence_tokens=64)

    assert copies(encoder, sequence=4) == 1
    with pytest.raises(ConfigurationError, match="rows with a source are not shared") as caught:
        copies(two, sequence=4)
    assert "set parallel.sequence to 1; where rows do not fit, parallel.pipeline to as many" in caught.value.remedy
    assert (copies(two), copies(two, pipeline=4), copies(two, world=5, pipeline=5)) == (4, 1, 1)
    with pytest.raises(ConfigurationError, match="there are more pipeline stages than layers"):
        copies(two, world=6, pipeline=6)


@given(world=st.integers(1, 64), layers=st.integers(1, 32), stages=st.integers(2, 48))
def test_the_named_number_of_stages_is_legal(world: int, layers: int, stages: int) -> None:
    """The remedy of a pipeline that does not fit, taken at its word; a legal one is not refused."""
    model = ModelConfig(layers=layers, heads=4, d_model=64)

    def check_stages(count: int) -> int:
        parallel = ParallelConfig(zero_stage=1, pipeline=count)
        return check_layout(parallel, precision="fp32", world=world, model=model, sequence_tokens=64)

    if stages <= layers and world % stages == 0:
        assert check_stages(stages) == world // stages
        return
    with pytest.raises(ConfigurationError) as caught:
        check_stages(stages)
    named = re.match(r"set parallel.pipeline to (\d+)", caught.value.remedy)
    assert named, caught.value.remedy
    assert check_stages(int(named[1])) == world // int(named[1])


@pytest.mark.parametrize(("world", "stages", "copies"), [(2, 2, 1), (4, 2, 2), (12, 4, 3), (12, 12, 1)])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "auto"])
def test_the_ranks_of_a_stage_are_data_parallel(world: int, stages: int, copies: int, precision: str) -> None:
    assert check(world=world, precision=precision, pipeline=stages) == copies
    if precision != "bf16":
        assert check(world=world, precision=precision, pipeline=stages, zero_stage=0) == copies


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"zero_stage": 0, "precision": "bf16"},
            "set parallel.zero_stage to 1 (right on one rank as well), or training.precision to fp32",
        ),
        ({"zero_stage": 2}, "set parallel.zero_stage to 1"),
        ({"zero_stage": 3}, "set parallel.zero_stage to 1"),
        ({"precision": "bf16_autocast"}, "set training.precision to bf16 or fp32"),
        ({"layers": 1}, "set parallel.pipeline to 1"),
        ({"world": 5}, "set parallel.pipeline to 1, or use 4 ranks"),
        ({"world": 1}, "set parallel.pipeline to 1, or use 2 ranks"),
    ],
)
def test_what_a_pipeline_excludes(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check(pipeline=2, **keys)
    assert caught.value.remedy == said


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"offload": "optimizer", "zero_stage": 0},
            "set parallel.zero_stage to 1 (right on one rank as well), or parallel.offload to none",
        ),
        ({"offload": "parameters", "zero_stage": 0}, "set parallel.zero_stage to 3"),
        (
            {"offload": "parameters", "zero_stage": 2},
            "set parallel.zero_stage to 3, or parallel.offload to optimizer",
        ),
        (
            {"offload": "parameters", "zero_stage": 3, "pipeline": 2},
            "set parallel.offload to optimizer and parallel.zero_stage to 1, or parallel.pipeline to 1",
        ),
        ({"offload": "optimizer", "zero_stage": 2, "pipeline": 2}, "set parallel.zero_stage to 1"),
    ],
)
def test_what_cannot_be_offloaded(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check(**keys)
    assert caught.value.remedy == said


@given(st.sampled_from(["none", "optimizer", "parameters"]), st.sampled_from([0, 1, 2, 3]), st.sampled_from([1, 2]))
def test_whatever_is_offloaded_one_step_from_a_refusal_is_legal(offload: str, stage: int, pipeline: int) -> None:
    """What the remedy sets, taken at its word, is a legal layout."""
    keys: dict[str, Any] = {"offload": offload, "zero_stage": stage, "pipeline": pipeline}
    try:
        assert check(**keys) == 4 // pipeline
        assert offload == "none" or stage >= (3 if offload == "parameters" else 1)
    except ConfigurationError as error:
        for way in error.remedy.split(", or "):
            changes = re.findall(r"parallel\.(\w+) to (\w+)", way)
            assert changes, "a remedy names keys"
            changed = keys | {key: int(value) if value.isdigit() else value for key, value in changes}
            assert check(**changed) == 4 // changed["pipeline"]


@given(st.integers(1, 64), st.integers(2, 16), st.integers(1, 40))
def test_what_is_refused_names_something_legal(world: int, stages: int, layers: int) -> None:
    try:
        assert check(world=world, pipeline=stages, layers=layers) * stages == world
    except ConfigurationError as error:
        assert stages > layers or world % stages
        numbers = [int(word.rstrip(",")) for word in error.remedy.split() if word.rstrip(",").isdigit()]
        assert numbers
        if stages <= layers:
            assert check(world=world, pipeline=numbers[0], layers=layers) * numbers[0] == world
            assert check(world=numbers[1], pipeline=stages, layers=layers) * stages == numbers[1]
