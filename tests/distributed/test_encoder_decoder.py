"""What only an encoder_decoder has in a pipeline: two tensors with gradients between stages, of which one is handed on
unchanged, a stage on which the encoder ends and the decoder begins, rows of two lengths.

That its layouts train the numbers of plain PyTorch stands in test_engine.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from solomonov import engine as engine_module
from solomonov.model.transformer import Transformer
from solomonov.stages import instructions
from tests.distributed.test_engine import TIED_TWO, TWO, reference
from tests.distributed.test_resharding import assert_same_rest
from tests.support import tiny
from tests.support.ranks import run_ranks
from tests.support.tiny import Layout

pytestmark = [pytest.mark.dist, pytest.mark.spare]

STAGES = replace(TWO, zero_stage=1, accumulation=2, pipeline=3)
"""Cut within the encoder, and behind the first block of the decoder."""


def gradients_of_weights(layout: Layout) -> dict[str, int]:
    """How many times the gradient of each of this rank's weights comes, in one update."""
    engine = tiny.make_engine(layout)
    came: Counter[str] = Counter()
    for parameter, name in engine.names.items():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: came.update([name]))  # type: ignore[misc]
    tiny.train(engine, 0, 1)
    return dict(came)


def gradients_by_deepspeed(layout: Layout) -> dict[str, int]:
    """The same with DeepSpeed's own backward pass of a stage."""
    engine_module.instructions = lambda accumulates: {}
    try:
        return gradients_of_weights(layout)
    finally:
        engine_module.instructions = instructions


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stage_with_the_end_of_the_encoder_goes_back_through_it_once(precision: str) -> None:
    """Once a micro-batch; DeepSpeed goes once for what the decoder's blocks there look at, and once for what is handed
    on."""
    layout = replace(STAGES, precision=precision)
    ours = run_ranks(gradients_of_weights, 3, layout)
    assert {"encoder.layers.2.attention.q.weight", "layers.0.cross_attention.k.weight"} <= ours[1].keys()
    assert {name: count for stage in ours for name, count in stage.items() if count != 2} == {}
    theirs = run_ranks(gradients_by_deepspeed, 3, layout)
    assert theirs[1]["encoder.layers.2.attention.q.weight"] == 4, "there is nothing left to do otherwise"
    assert theirs[1].keys() == ours[1].keys()


@pytest.mark.parametrize("layout", [STAGES, replace(TIED_TWO, zero_stage=1, accumulation=4, pipeline=2)], ids=str)
def test_bf16_losses_stay_near_fp32(layout: Layout) -> None:
    for outcome in run_ranks(tiny.run, layout.pipeline, replace(layout, precision="bf16"), 5):
        assert outcome.layout["precision"] == "bf16"
        expected = reference(layout.tied, 0.0, layout.architecture, layout.attention)
        torch.testing.assert_close(torch.tensor(outcome.losses), torch.tensor(expected.losses), rtol=5e-3, atol=0)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, replace(TWO, zero_stage=1)),
        (2, replace(TWO, zero_stage=3)),
        (4, replace(TWO, zero_stage=1, accumulation=2)),
        (2, replace(TWO, zero_stage=1, accumulation=2, pipeline=2)),
        (4, replace(TWO, zero_stage=1, accumulation=2, pipeline=2)),
    ],
    ids=str,
)
def test_evaluation_sums_over_all_ranks(world: int, layout: Layout) -> None:
    """Micro-batches that are full and one that is short, or, where each rank has one row at a time, missing: padding
    of both lengths."""
    model = Transformer(tiny.model_of(layout), tiny.VOCAB, seed=tiny.SEED)
    rows = tiny.batch(3, list(range(tiny.EVALUATED_ROWS)), source=True)
    with torch.no_grad():
        expected = float(model(rows.input_ids, rows.document_ids, rows.labels, source=rows.source))
    for first, second in run_ranks(tiny.evaluate_twice, world, layout):
        assert first == pytest.approx(expected, rel=1e-5)
        assert second < first, "a step on these rows was taken in between"


RESHARDED = [
    (2, replace(TWO, zero_stage=1), 3, STAGES),
    (3, STAGES, 2, replace(TWO, zero_stage=3, accumulation=2)),
    (2, replace(TIED_TWO, zero_stage=0, accumulation=2, pipeline=2), 1, replace(TIED_TWO, zero_stage=1)),
    (1, replace(TIED_TWO, zero_stage=0), 4, replace(TIED_TWO, zero_stage=1, accumulation=2, pipeline=2)),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("before", "source", "after", "target"), RESHARDED, ids=[f"{b}-{s}-to-{a}-{t}" for b, s, a, t in RESHARDED]
)
def test_a_checkpoint_loads_in_another_layout(
    before: int, source: Layout, after: int, target: Layout, tmp_path: Path
) -> None:
    saved, rest = run_ranks(tiny.run_and_save, before, source, 3, tmp_path / "a")[0]
    restored, goes_on = run_ranks(tiny.restore_and_run, after, target, tmp_path / "a", tmp_path / "b")[0]
    assert restored == saved
    assert_same_rest(goes_on, rest, exact=False)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("world", "layout"), [(3, STAGES), (2, replace(TWO, zero_stage=3, accumulation=2))], ids=str)
def test_the_same_layout_goes_on_to_the_bit(world: int, layout: Layout, tmp_path: Path) -> None:
    results = run_ranks(tiny.run_and_save, world, layout, 3, tmp_path / "a")
    again = run_ranks(tiny.restore_and_run, world, layout, tmp_path / "a", tmp_path / "b")
    for (saved, rest), (restored, goes_on) in zip(results, again, strict=True):
        assert restored == saved
        assert_same_rest(goes_on, rest, exact=True)
