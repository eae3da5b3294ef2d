"""The moving average of the weights in every layout: against its closed form in float64 over the weights of a plain
loop and over the rank's own masters; a held-out evaluation of it, which leaves no trace; and through checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch

from solomonov import ema as ema_module
from solomonov import engine as engine_module
from solomonov.config import OptimizerConfig
from solomonov.model.transformer import Transformer
from solomonov.optim import make_optimizer
from tests.distributed.test_engine import OFFLOADED, assert_layout_ran, poisoned_stages, poisoned_step
from tests.distributed.test_resharding import assert_same_rest
from tests.support import tiny
from tests.support.ranks import run_ranks
from tests.support.tiny import Layout, Outcome

STEPS, DECAY = 4, 0.8
"""A decay at which the first weights still count for 41 % at the end, and each later ones for more than 8 %."""
pytestmark = [pytest.mark.dist, pytest.mark.spare]

CASES = [
    *[(1, Layout(zero_stage=stage, ema=DECAY)) for stage in (0, 1, 3)],
    *[(2, Layout(zero_stage=stage, accumulation=2, ema=DECAY)) for stage in (0, 1, 2, 3)],
    (2, Layout(zero_stage=1, accumulation=2, pipeline=2, tied=True, ema=DECAY)),
    (2, Layout(zero_stage=0, accumulation=2, pipeline=2, ema=DECAY)),
    (4, Layout(zero_stage=1, pipeline=2, tied=True, ema=DECAY)),
    *[(2, replace(layout, ema=DECAY)) for layout in OFFLOADED],
    (2, Layout(zero_stage=1, accumulation=2, pipeline=2, offload="optimizer", ema=DECAY)),
    (2, Layout(zero_stage=2, muon=True, ema=DECAY)),
    (2, Layout(zero_stage=3, muon=True, ema=DECAY)),
    (2, Layout(zero_stage=1, precision="bf16", ema=DECAY)),
    (2, Layout(zero_stage=2, precision="bf16_autocast", ema=DECAY)),
    (2, Layout(zero_stage=3, precision="bf16", ema=DECAY)),
    (2, Layout(zero_stage=3, precision="bf16_autocast", ema=DECAY)),
    (2, Layout(zero_stage=1, precision="bf16", accumulation=2, pipeline=2, ema=DECAY)),
    (2, Layout(zero_stage=1, precision="bf16", offload="optimizer", ema=DECAY)),
    (2, Layout(zero_stage=3, precision="bf16", offload="parameters", ema=DECAY)),
]
WEIGHTS = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Followed:
    """What a rank saw of a run whose average was evaluated after STEPS updates."""

    masters: list[WEIGHTS]
    """Before the first update and after each."""
    average: WEIGHTS
    evaluated: tuple[float, float, float]
    """`tiny.evaluate` of the weights, of the average, and of the weights again."""
    untouched: bool
    """Whether all state is to the bit what it was before the evaluations."""
    rest: Outcome
    """Of two more updates."""


def closed_form(weights: list[WEIGHTS]) -> WEIGHTS:
    """d^n w_0 + (1 - d) sum of d^(n - k) w_k, in float64."""
    steps = len(weights) - 1
    coefficients = [DECAY**steps] + [(1 - DECAY) * DECAY ** (steps - k) for k in range(1, steps + 1)]
    return {
        name: sum(c * w[name].double() for c, w in zip(coefficients, weights, strict=True))  # type: ignore[misc]
        for name in weights[0]
    }


@cache
def plain_weights(tied: bool) -> list[WEIGHTS]:
    """The weights of a plain PyTorch loop, before the first update and after each."""
    model = Transformer(tiny.tiny_model(tied), tiny.VOCAB, seed=tiny.SEED)
    optimizer = make_optimizer(
        model.named_parameters(), OptimizerConfig(lr=tiny.LEARNING_RATE), model.config, fused=False
    )
    found = [{name: p.detach().reshape(-1).clone() for name, p in model.named_parameters()}]
    for step in range(STEPS):
        rows = tiny.batch(step, list(range(tiny.ROWS)))
        (model(rows.input_ids, rows.document_ids, rows.labels) / rows.valid_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), tiny.CLIPPING)
        optimizer.step()
        optimizer.zero_grad()
        found.append({name: p.detach().reshape(-1).clone() for name, p in model.named_parameters()})
    return found


def kind_of(engine: engine_module.Engine, kind: str) -> WEIGHTS:
    return {name: tensor for (name, found), tensor in tiny.whole_state(engine).items() if found == kind}


def followed(layout: Layout) -> Followed:
    """Train, evaluate weights and average, train on. Nothing stays gathered at stage 3 that need not, and masters and
    average change places in many parts."""
    usual, ema_module.SWAPPED_ELEMENTS = engine_module.deepspeed_config, 1000

    def with_nothing_persistent(spec: object, device: object) -> dict[str, object]:
        config = usual(spec, device)  # type: ignore[arg-type]
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return config

    engine_module.deepspeed_config = with_nothing_persistent  # type: ignore[assignment]
    try:
        engine = tiny.make_engine(layout)
    finally:
        engine_module.deepspeed_config = usual
    masters = [kind_of(engine, "master")]
    assert all(torch.equal(kind_of(engine, "ema")[name], tensor) for name, tensor in masters[0].items())
    for step in range(STEPS):
        tiny.train(engine, step, step + 1)
        masters.append(kind_of(engine, "master"))
    before = tiny.whole_state(engine)
    first = tiny.evaluate(engine)
    with engine.averaged():
        averaged = tiny.evaluate(engine)
    second = tiny.evaluate(engine)
    after = tiny.whole_state(engine)
    untouched = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    losses, norms = tiny.train(engine, STEPS, STEPS + 2)
    rest = Outcome(losses, norms, engine.layout, tiny.whole_state(engine))
    average = {name: tensor for (name, kind), tensor in before.items() if kind == "ema"}
    return Followed(masters, average, (first, averaged, second), untouched, rest)


def assert_near(found: WEIGHTS, expected: WEIGHTS, bound: float) -> None:
    """Per tensor, ||a - b|| <= bound ||b||."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        distance = torch.linalg.vector_norm(found[name].double() - tensor.double())
        assert distance <= bound * torch.linalg.vector_norm(tensor.double()), f"{name} differs by {float(distance):.1e}"


def loss_of(weights: WEIGHTS, layout: Layout) -> float:
    """Of these weights on the rows of `tiny.evaluate`, in the precision that the layout computes in."""
    model = Transformer(tiny.tiny_model(layout.tied), tiny.VOCAB, seed=tiny.SEED)
    rows = tiny.batch(3, list(range(tiny.EVALUATED_ROWS)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name].view_as(parameter))
        model = model.bfloat16() if layout.precision == "bf16" else model
        with torch.autocast("cpu", torch.bfloat16, enabled=layout.precision == "bf16_autocast"):
            return float(model(rows.input_ids, rows.document_ids, rows.labels))


@pytest.mark.sampled(5)
@pytest.mark.parametrize(("world", "layout"), CASES, ids=[f"ranks{world}-{layout}" for world, layout in CASES])
def test_the_average_is_that_of_the_weights_and_training_never_feels_it(world: int, layout: Layout) -> None:
    bound = 1e-5 if layout.precision == "fp32" else 1e-3
    without = run_ranks(tiny.run, world, replace(layout, ema=None), STEPS + 2)
    for found, plain in zip(run_ranks(followed, world, layout), without, strict=True):
        assert_near(found.average, closed_form(found.masters), 3e-7)
        if layout.precision == "fp32" and not layout.muon:
            assert_near(found.average, closed_form(plain_weights(layout.tied)), 1e-5)
        first, averaged, second = found.evaluated
        assert first == second == pytest.approx(loss_of(found.masters[-1], layout), rel=bound)
        assert averaged == pytest.approx(loss_of(found.average, layout), rel=bound)
        assert abs(averaged - first) > 10 * bound * first, "the two must differ for this to say anything"
        assert found.untouched, "the evaluations left a trace in the state"
        assert (found.rest.losses, found.rest.norms) == (plain.losses[STEPS:], plain.norms[STEPS:])
        assert all(torch.equal(found.rest.state[key], tensor) for key, tensor in plain.state.items())
    if layout.precision == "fp32" and not layout.muon:
        assert_layout_ran(without, layout)


@pytest.mark.parametrize("layout", [*[Layout(zero_stage=stage) for stage in (0, 1, 3)], OFFLOADED[1]], ids=str)
def test_a_skipped_update_is_not_averaged(layout: Layout) -> None:
    for skipped, equal, _ in run_ranks(poisoned_step, 2, replace(layout, ema=DECAY)):
        assert skipped
        assert equal, "masters stay, and so must their average"


def test_an_update_that_the_stages_skip_is_not_averaged() -> None:
    for layout in (Layout(zero_stage=1, accumulation=2, pipeline=2, ema=DECAY), Layout(0, 2, 2, ema=DECAY)):
        for skipped, equal, _ in run_ranks(poisoned_stages, 2, layout):
            assert skipped == [False, True, False, True, False]
            assert equal


ZERO1 = Layout(zero_stage=1, ema=DECAY)
ROUTES = [
    (2, ZERO1, 2, ZERO1),
    (2, ZERO1, 1, Layout(zero_stage=0, ema=DECAY)),
    (2, Layout(zero_stage=3, ema=DECAY), 4, Layout(zero_stage=1, pipeline=2, ema=DECAY)),
    (4, Layout(zero_stage=1, pipeline=2, tied=True, ema=DECAY), 2, Layout(zero_stage=3, tied=True, ema=DECAY)),
    (2, Layout(zero_stage=0, ema=DECAY), 2, Layout(zero_stage=3, offload="parameters", ema=DECAY)),
    (2, Layout(zero_stage=2, offload="optimizer", ema=DECAY), 2, Layout(zero_stage=0, ema=DECAY)),
    (2, Layout(zero_stage=3, muon=True, ema=DECAY), 2, Layout(zero_stage=1, muon=True, ema=DECAY)),
    (2, Layout(zero_stage=3, precision="bf16", ema=DECAY), 2, Layout(zero_stage=3, precision="bf16", ema=DECAY)),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("world", "saved", "resumed_world", "resumed"), ROUTES, ids=str)
def test_the_average_goes_through_a_checkpoint(
    world: int, saved: Layout, resumed_world: int, resumed: Layout, tmp_path: Path
) -> None:
    digest, expected = run_ranks(tiny.run_and_save, world, saved, 3, tmp_path / "one")[0]
    again, outcome = run_ranks(tiny.restore_and_run, resumed_world, resumed, tmp_path / "one", tmp_path / "two")[0]
    assert again == digest, "masters, moments and average to the bit, wherever they lie now"
    assert {kind for _, kind in outcome.state} >= {"master", "ema"}
    assert outcome.state.keys() == expected.state.keys()
    assert_same_rest(outcome, expected, exact=(world, saved) == (resumed_world, resumed))


@pytest.mark.parametrize("layout", [ZERO1, Layout(zero_stage=3, ema=DECAY)], ids=str)
def test_it_begins_as_the_masters_of_a_checkpoint_without_one_and_is_dropped_where_none_is_kept(
    layout: Layout, tmp_path: Path
) -> None:
    run_ranks(tiny.run_and_save, 2, replace(layout, ema=None), 3, tmp_path / "without")
    for equal, kinds in run_ranks(restored, 2, layout, tmp_path / "without"):
        assert equal == [True, False]
        assert kinds == {"master", "ema", "exp_avg", "exp_avg_sq"}
    run_ranks(tiny.run_and_save, 2, layout, 3, tmp_path / "with")
    for _, kinds in run_ranks(restored, 2, replace(layout, ema=None), tmp_path / "with"):
        assert kinds == {"master", "exp_avg", "exp_avg_sq"}


def restored(layout: Layout, folder: Path) -> tuple[list[bool], set[str]]:
    """Whether the average equals the masters after a restore and after one more update; and what state there is."""
    engine = tiny.make_engine(layout)
    reader = tiny.checkpointer(folder).find()
    assert reader is not None, "no checkpoint was found"
    engine.restore(reader, int(reader.scalars["optimizer_step"]))
    equal = []
    for _ in range(2):
        masters, average = kind_of(engine, "master"), kind_of(engine, "ema")
        equal.append(all(torch.equal(average[name], masters[name]) for name in average))
        tiny.train(engine, 3, 4)
    return equal, {kind for _, kind in engine.shapes()}
