"""The z-loss in all layouts, against plain PyTorch with whole logits."""

from __future__ import annotations

import pytest
import torch

from solomonov.distributed import Control
from solomonov.model.transformer import Transformer
from tests.distributed.test_engine import STEPS, assert_equal_within, mean_z, reference
from tests.support import tiny
from tests.support.ranks import run_ranks
from tests.support.tiny import Layout, Outcome

pytestmark = [pytest.mark.dist, pytest.mark.spare]

Z_LOSS = 0.002
"""Twenty times the usual one: without it, or with another weight of a token, norms differ by far more than 1e-5."""


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, Layout(zero_stage=0, accumulation=4, z_loss=Z_LOSS)),
        (2, Layout(zero_stage=2, accumulation=2, z_loss=Z_LOSS)),
        (2, Layout(zero_stage=3, z_loss=Z_LOSS, recompute="full")),
        (2, Layout(zero_stage=1, accumulation=2, pipeline=2, z_loss=Z_LOSS)),
        (4, Layout(zero_stage=1, accumulation=2, pipeline=2, tied=True, z_loss=Z_LOSS)),
    ],
    ids=str,
)
def test_z_loss_is_weighed_by_the_tokens_of_the_whole_update(world: int, layout: Layout) -> None:
    """The state is that of the reference; the loss that is told is the cross-entropy; ln^2 Z is told beside it."""
    expected = reference(layout.tied, Z_LOSS)
    for outcome, z_mean, evaluated in run_ranks(run_with_z, world, layout):
        assert_equal_within(outcome, expected, 1e-5)
        assert z_mean == pytest.approx(float(z_of_first_step(layout.tied)), rel=1e-5)
        assert evaluated == pytest.approx(cross_entropy_after_training(layout), rel=1e-5)
    without = reference(layout.tied)
    assert expected.losses[0] == pytest.approx(without.losses[0], rel=1e-12), "the first step has equal weights"
    assert expected.norms[0] != pytest.approx(without.norms[0], rel=1e-4), "the z-loss is too weak to be seen"


@torch.no_grad()
def z_of_first_step(tied: bool) -> torch.Tensor:
    """The mean of ln^2 Z at the initial weights."""
    model = Transformer(tiny.tiny_model(tied), tiny.VOCAB, seed=tiny.SEED)
    return mean_z(model, tiny.batch(0, list(range(tiny.ROWS))))


@torch.no_grad()
def cross_entropy_after_training(layout: Layout) -> float:
    """Of all rows of step 3, on the reference's weights."""
    model = Transformer(tiny.tiny_model(layout.tied), tiny.VOCAB, seed=tiny.SEED)
    masters = reference(layout.tied, Z_LOSS).state
    for name, parameter in model.named_parameters():
        parameter.copy_(masters[name, "master"].view_as(parameter))
    rows = tiny.batch(3, list(range(tiny.EVALUATED_ROWS)))
    return float(model(rows.input_ids, rows.document_ids, rows.labels))


def run_with_z(layout: Layout) -> tuple[Outcome, float, float]:
    """A run; the mean of ln^2 Z of its first step; and the cross-entropy of an evaluation after it."""
    engine = tiny.make_engine(layout)
    losses, norms = tiny.train(engine, 0, 1)
    tokens = tiny.batch(0, list(range(tiny.ROWS))).valid_tokens
    z_mean = Control().sum_floats([engine.z_sum])[0] / tokens
    more = tiny.train(engine, 1, STEPS)
    state = tiny.whole_state(engine)
    return Outcome(losses + more[0], norms + more[1], engine.layout, state), z_mean, tiny.evaluate(engine)
