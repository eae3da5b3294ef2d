"""Which layouts `parallel: auto` considers, and the batch of a configuration in its layout."""

from __future__ import annotations

import pytest

from solomonov.config import Config, parse_config
from solomonov.errors import ConfigurationError
from solomonov.layouts import candidates, legal_batch, offloaded_candidates, one_copy
from solomonov.parallel import check_layout

TEXT = """\
run: {name: tiny}
model: {layers: 6, d_model: 32, heads: 4, d_ff: 64}
data: {folder: dataset, sources: [{name: one, path: x}], sequence_tokens: 32}
training: {total_steps: 10, global_batch_tokens: 384, micro_batch_sequences: 1}
"""


def config(*overrides: str) -> Config:
    return parse_config(TEXT, overrides, where="tiny").config


def test_auto_considers_every_stage_and_every_pipeline_that_divides_plainest_first() -> None:
    found = [(parallel.pipeline, parallel.zero_stage) for parallel in candidates(config(), 12)]
    assert found == [(stages, zero) for stages in (1, 2, 3, 4, 6) for zero in (0, 1, 2, 3)]


def test_what_could_be_offloaded_is_legal_and_complete() -> None:
    """Every layout of a stage above 0 without its optimizer, every stage 3 without its parameters; no pipelines of
    stages 2 and 3 are made legal by that."""
    found = list(offloaded_candidates(config(), 4))
    seen = [(parallel.offload, parallel.pipeline, parallel.zero_stage) for parallel in found]
    assert seen == [
        *[("optimizer", stages, zero) for stages in (1, 2, 4) for zero in (1, 2, 3)],
        ("parameters", 1, 3),
    ]
    assert all(
        check_layout(p, precision="bf16", world=4, model=config().model, sequence_tokens=64)
        for p in found
        if p.zero_stage == 1
    )


def test_the_batch_is_that_of_the_configured_layout() -> None:
    """12 rows over 4 ranks."""
    plan = legal_batch(config("parallel.pipeline=2"), precision="fp32", world=4)
    assert (plan.data_parallel, plan.accumulation) == (2, 6)
    with pytest.raises(ConfigurationError, match="the pipeline does not divide"):
        legal_batch(config("parallel.pipeline=3"), precision="fp32", world=4)


def test_auto_finds_the_plainest_legal_one() -> None:
    auto = config("parallel=auto")
    assert legal_batch(auto, precision="fp32", world=4).data_parallel == 4
    # 12 rows do not divide over 8 or 24 ranks, and over 4 copies of a pipeline they do.
    assert legal_batch(auto, precision="fp32", world=8).data_parallel == 4
    assert legal_batch(auto, precision="bf16", world=24).data_parallel == 12
    with pytest.raises(ConfigurationError, match="the batch does not divide over the ranks"):
        legal_batch(auto, precision="fp32", world=7)


def test_rows_have_a_source_where_the_model_reads_one() -> None:
    two = ("model.architecture=encoder_decoder", "model.encoder_layers=2")
    for overrides, expected in (((), None), (("model.architecture=encoder",), None), (two, 32)):
        assert legal_batch(config(*overrides), precision="fp32", world=2).source_tokens == expected
        assert one_copy(config(*overrides)).source_tokens == expected


def test_the_layers_of_both_stacks_are_pipeline_stages() -> None:
    found = {parallel.pipeline for parallel in candidates(config("model.architecture=encoder_decoder"), 12)}
    assert found == {1, 2, 3, 4, 6, 12}, "6 and 6 layers"
