"""Residual forms, with LayerNorm and GELU, in layouts that cut layers, rows or parameters, against one rank that has
all of them: the bounds are those of `test_engine`."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from solomonov.equivalence import relative
from solomonov.model.residual import MODES, ResidualMode
from solomonov.model.transformer import Transformer
from solomonov.optim import make_optimizer
from tests.distributed.test_engine import assert_equal_within
from tests.solomonov.model.test_stochastic_depth import factors_of, multiplied
from tests.support import tiny
from tests.support.ranks import run_ranks
from tests.support.tiny import Layout, Outcome

STEPS = 4
pytestmark = pytest.mark.dist

LAYOUTS = [
    (1, Layout(zero_stage=3, accumulation=2, recompute="selective")),
    (2, Layout(zero_stage=3)),
    (2, Layout(zero_stage=1, accumulation=2, pipeline=2, tied=True)),
    (2, Layout(zero_stage=1, accumulation=2, pipeline=2, recompute="selective")),
    (2, Layout(zero_stage=1, muon=True)),
]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("world", "layout"), LAYOUTS, ids=[f"ranks{world}-{layout}" for world, layout in LAYOUTS])
def test_every_form_is_the_same_in_every_layout(world: int, layout: Layout, mode: ResidualMode) -> None:
    plain = Layout(zero_stage=0, tied=layout.tied, muon=layout.muon, residual=mode)
    [expected] = run_ranks(tiny.run, 1, plain, STEPS)
    for outcome in run_ranks(tiny.run, world, replace(layout, residual=mode), STEPS):
        assert (outcome.layout["pipeline"], outcome.layout["zero_stage"]) == (layout.pipeline, layout.zero_stage)
        assert_equal_within(outcome, expected, 1e-5)


BIASED_TWO = Layout(zero_stage=0, architecture="encoder_decoder", attention="learned", tied=True)
"""All of the encoder_decoder's parameters have biases, and its head a transform beside the tied matrix."""
BIASED_LAYOUTS = [
    (2, replace(BIASED_TWO, zero_stage=3, accumulation=2, recompute="selective")),
    (3, replace(BIASED_TWO, zero_stage=1, accumulation=2, pipeline=3)),
]


@pytest.mark.parametrize(("world", "layout"), BIASED_LAYOUTS, ids=str)
@pytest.mark.spare
def test_with_biases_and_a_source_too(world: int, layout: Layout) -> None:
    [expected] = run_ranks(tiny.run, 1, BIASED_TWO, STEPS)
    for outcome in run_ranks(tiny.run, world, layout, STEPS):
        assert (outcome.layout["pipeline"], outcome.layout["zero_stage"]) == (layout.pipeline, layout.zero_stage)
        assert_equal_within(outcome, expected, 1e-5)


SWITCHED = Layout(zero_stage=0, switched=True)
SWITCHED_LAYOUTS = [
    *[(1, replace(SWITCHED, zero_stage=stage)) for stage in (0, 1, 2, 3)],
    (1, replace(SWITCHED, zero_stage=3, accumulation=4, recompute="full", every=2)),
    *[(2, replace(SWITCHED, zero_stage=stage, accumulation=2)) for stage in (0, 1, 2, 3)],
    (2, replace(SWITCHED, zero_stage=1, accumulation=2, pipeline=2)),
    (2, replace(SWITCHED, zero_stage=0, accumulation=2, pipeline=2, recompute="full", every=2)),
    (2, replace(SWITCHED, zero_stage=1, accumulation=2, pipeline=2, recompute="selective", residual="keel")),
    (3, replace(SWITCHED, zero_stage=1, accumulation=2, pipeline=3)),
    (2, replace(SWITCHED, zero_stage=2, sequence=2, recompute="full")),
    (1, replace(SWITCHED, zero_stage=3, residual="deepnorm", recompute="selective")),
    (2, replace(SWITCHED, zero_stage=3, residual="peri")),
    *[(2, replace(SWITCHED, zero_stage=stage, accumulation=2, offload="optimizer")) for stage in (1, 2, 3)],
    (2, replace(SWITCHED, zero_stage=3, offload="parameters")),
]
SWITCHED_STEPS = 7
"""Of which the last one passes all blocks by but the first."""


@cache
def in_plain_pytorch(residual: ResidualMode, dtype: torch.dtype = torch.float32) -> Outcome:
    """The same updates without DeepSpeed and without a branch that is left out: each is computed, and multiplied by
    b / p, so that its parameters have the gradient 0 where b is."""
    config = tiny.make_spec(replace(SWITCHED, residual=residual), 1).model
    model = Transformer(config, tiny.VOCAB, seed=tiny.SEED).to(dtype)
    optimizer = make_optimizer(model.named_parameters(), tiny.optimizer_of(SWITCHED), model.config, fused=False)
    losses, norms, drawn = [], [], set()
    for step in range(SWITCHED_STEPS):
        rows, factors = tiny.batch(step, list(range(tiny.ROWS))), factors_of(model.config, step, tiny.SEED)
        drawn |= {(name, factor > 0.0) for name, factor in factors.items()}
        with multiplied(model, factors):
            loss = model(rows.input_ids, rows.document_ids, rows.labels) / rows.valid_tokens
            loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), tiny.CLIPPING)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert len(drawn) == 7, "of four blocks each was there, and each but the first was not"
    state = {}
    for name, parameter in model.named_parameters():
        state[name, "master"] = parameter.detach().reshape(-1)
        for moment in ("exp_avg", "exp_avg_sq"):
            state[name, moment] = optimizer.state[parameter][moment].reshape(-1)
    return Outcome(losses, norms, {}, state)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("world", "layout"), SWITCHED_LAYOUTS, ids=[f"ranks{world}-{layout}" for world, layout in SWITCHED_LAYOUTS]
)
@pytest.mark.spare
def test_value_residual_and_stochastic_depth_are_the_same_in_every_layout(world: int, layout: Layout) -> None:
    for outcome in run_ranks(tiny.run, world, layout, SWITCHED_STEPS):
        ran = outcome.layout
        assert (ran["pipeline"], ran["zero_stage"], ran["offload"]) == (
            layout.pipeline,
            layout.zero_stage,
            layout.offload,
        )
        assert_as_near_as_rounding(outcome, layout.residual)


def assert_as_near_as_rounding(outcome: Outcome, residual: ResidualMode) -> None:
    """Within 1e-5 of plain PyTorch; of the two numbers that mix values, each a sum over all tokens whose terms cancel,
    within four times what plain PyTorch in float32 is off float64, where that is more: rounding leaves so much."""
    plain, exact = in_plain_pytorch(residual), in_plain_pytorch(residual, torch.float64)
    mixes = {key for key in plain.state if key[0].endswith("attention_value_mix")}
    assert_equal_within(outcome, plain, 1e-5, but=mixes)
    for key in mixes:
        bound = max(1e-5, 4.0 * relative(plain.state[key], exact.state[key]))
        assert relative(outcome.state[key], plain.state[key]) <= bound, key


@pytest.mark.parametrize("layout", [replace(SWITCHED, zero_stage=0, muon=True)], ids=str)
@pytest.mark.parametrize(
    ("world", "changes"), [(2, {"zero_stage": 1}), (2, {"zero_stage": 3}), (2, {"zero_stage": 1, "pipeline": 2})]
)
@pytest.mark.spare
def test_with_muon_too(world: int, layout: Layout, changes: dict[str, int]) -> None:
    [expected] = run_ranks(tiny.run, 1, layout, SWITCHED_STEPS)
    for outcome in run_ranks(tiny.run, world, replace(layout, accumulation=2, **changes), SWITCHED_STEPS):
        assert_equal_within(outcome, expected, 1e-5)


@pytest.mark.parametrize(
    ("world", "saved", "restored"),
    [
        (1, replace(SWITCHED, zero_stage=0), replace(SWITCHED, zero_stage=3)),
        (2, replace(SWITCHED, zero_stage=3, accumulation=2), replace(SWITCHED, zero_stage=1, pipeline=2)),
        (2, replace(SWITCHED, zero_stage=3), replace(SWITCHED, zero_stage=3)),
    ],
    ids=str,
)
@pytest.mark.spare
def test_a_resumed_run_drops_what_the_whole_one_does(
    tmp_path: Path, world: int, saved: Layout, restored: Layout
) -> None:
    """The number of the update is the checkpoint's step, in any layout: seven updates, saved after the fifth. At the
    same one it goes on to the bit as the run that was not left."""
    (_, continued), *_ = run_ranks(tiny.run_and_save, world, saved, SWITCHED_STEPS - 2, tmp_path / "run")
    whole = in_plain_pytorch("prenorm")
    rest = replace(whole, losses=whole.losses[-2:], norms=whole.norms[-2:])
    for _, outcome in run_ranks(tiny.restore_and_run, world, restored, tmp_path / "run", tmp_path / "again"):
        assert_equal_within(outcome, rest, 1e-5)
        if restored == saved:
            assert (outcome.losses, outcome.norms) == (continued.losses, continued.norms)
            assert all(torch.equal(tensor, continued.state[key]) for key, tensor in outcome.state.items())


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, replace(SWITCHED, zero_stage=1, precision="bf16")),
        (2, replace(SWITCHED, zero_stage=3, precision="bf16")),
        (2, replace(SWITCHED, zero_stage=2, precision="bf16_autocast", recompute="selective")),
        (2, replace(SWITCHED, zero_stage=1, precision="bf16", accumulation=2, pipeline=2)),
        (2, replace(SWITCHED, zero_stage=2, precision="bf16", accumulation=2, offload="optimizer")),
    ],
    ids=str,
)
@pytest.mark.spare
def test_bf16_stays_near_fp32(world: int, layout: Layout) -> None:
    """Losses within 5e-3, and norms within 2e-2: no gradient is lost of what a stage sends on beside the stream."""
    expected = in_plain_pytorch("prenorm")
    for outcome in run_ranks(tiny.run, world, layout, SWITCHED_STEPS):
        assert outcome.layout["precision"] == layout.precision
        torch.testing.assert_close(torch.tensor(outcome.losses), torch.tensor(expected.losses), rtol=5e-3, atol=0)
        torch.testing.assert_close(torch.tensor(outcome.norms), torch.tensor(expected.norms), rtol=2e-2, atol=0)


@pytest.mark.parametrize(
    ("world", "layout"),
    [(1, replace(SWITCHED, zero_stage=3)), (2, replace(SWITCHED, zero_stage=1, accumulation=2, pipeline=2))],
    ids=str,
)
def test_evaluation_drops_nothing(world: int, layout: Layout) -> None:
    model = Transformer(tiny.make_spec(layout, world).model, tiny.VOCAB, seed=tiny.SEED)
    rows = tiny.batch(3, list(range(tiny.EVALUATED_ROWS)))
    with torch.no_grad():
        expected = float(model(rows.input_ids, rows.document_ids, rows.labels))
    for first, second in run_ranks(tiny.evaluate_twice, world, layout):
        assert first == pytest.approx(expected, rel=1e-5)
        assert second < first, "a step on these rows was taken in between"


def drawn_after_a_skipped_update(layout: Layout) -> tuple[list[bool], dict[str, float]]:
    """Three updates, of which a NaN in the loss skips the second: which were, and what the third multiplies by."""
    engine = tiny.make_engine(layout)
    rows = list(range(tiny.ROWS))
    skipped = []
    for step, factor in enumerate((1.0, float("nan"), 1.0)):
        batch = tiny.batch(step, rows)
        hook = engine._ds.module.register_forward_hook(lambda module, inputs, loss, by=factor: loss * by)
        engine.forward_backward([batch], batch.valid_tokens, tiny.LEARNING_RATE, update=step)
        skipped.append(engine.update().skipped)
        hook.remove()
    return skipped, {f"layers.{block.index}": block._factor for block in engine._dropping}


@pytest.mark.parametrize("stage", [0, 1])
def test_a_skipped_update_is_one_of_those_that_are_drawn_for(stage: int) -> None:
    """Though AdamW does not count it."""
    layout = replace(SWITCHED, zero_stage=stage)
    [(skipped, drawn)] = run_ranks(drawn_after_a_skipped_update, 1, layout)
    assert skipped == [False, True, False]
    of_each = [factors_of(tiny.model_of(layout), update, tiny.SEED) for update in range(3)]
    of_each = [{name: factors[name] for name in drawn} for factors in of_each]
    assert drawn == of_each[2] != of_each[1]
    assert len(drawn) > 1
