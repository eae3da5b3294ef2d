"""Every layout gives the same losses, gradient norms and weights as a plain PyTorch loop on one process.

The reference uses neither DeepSpeed nor our engine: the model, torch's AdamW and torch's clipping. The bounds are
those of the promise: 1e-5 relative on losses, norms and, per tensor, on masters and moments in fp32; 5e-3 on losses
in bf16. Each case first asserts that its layout really ran.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from functools import cache
from typing import get_args

import psutil
import pytest
import torch

from solomonov import engine_spec as spec_module
from solomonov.batch import TokenBatch
from solomonov.distributed import groups_end_within
from solomonov.engine import Engine
from solomonov.model.counts import parameter_count
from solomonov.model.stacks import Architecture
from solomonov.model.transformer import Transformer
from solomonov.optim import make_optimizer
from solomonov.partition import base_optimizer, local_pieces
from tests.support import tiny
from tests.support.ranks import run_ranks
from tests.support.tiny import Layout, Outcome

STEPS = 5
pytestmark = pytest.mark.dist

ENCODER, TWO = Layout(architecture="encoder"), Layout(architecture="encoder_decoder")
"""The second reads a source, in an encoder of three layers before two of its decoder."""
TIED_TWO = replace(TWO, tied=True, attention="vanilla")
"""Its embedding adds positions, to two tensors; with QK norm the gradients of its gains are mostly rounding here: two
orders in which plain PyTorch adds up the rows differ by 6e-6."""

CASES = [
    (1, Layout(zero_stage=0)),
    (1, replace(TWO, zero_stage=1)),
    (1, replace(ENCODER, zero_stage=2)),
    (1, replace(TWO, zero_stage=3)),
    (1, replace(TWO, zero_stage=0, accumulation=4)),
    (1, replace(ENCODER, zero_stage=3, accumulation=2, recompute="full")),
    *[(2, Layout(zero_stage=stage)) for stage in (0, 1, 2, 3)],
    (2, Layout(zero_stage=0, accumulation=2)),
    (2, replace(ENCODER, zero_stage=1, accumulation=2)),
    *[(2, replace(TWO, zero_stage=stage, accumulation=2)) for stage in (2, 3)],
    (2, replace(ENCODER, zero_stage=0, accumulation=2, recompute="selective")),
    (2, Layout(zero_stage=1, accumulation=2, recompute="full")),
    (2, replace(TWO, zero_stage=3, accumulation=2, recompute="selective")),
    (1, replace(ENCODER, zero_stage=1, tied=True)),
    (2, replace(TIED_TWO, zero_stage=3, accumulation=2)),
    (2, Layout(zero_stage=1, accumulation=2, pipeline=2, recompute="selective")),
    (2, replace(TWO, zero_stage=1, accumulation=2, pipeline=2)),
    (2, Layout(zero_stage=1, accumulation=4, pipeline=2, tied=True)),
    (2, replace(TIED_TWO, zero_stage=1, accumulation=4, pipeline=2)),
    (2, replace(TWO, zero_stage=1, accumulation=2, pipeline=2, recompute="full")),
    (3, replace(TWO, zero_stage=1, accumulation=2, pipeline=3, recompute="full", every=2)),
    (3, replace(TIED_TWO, zero_stage=0, accumulation=2, pipeline=3)),
    (4, Layout(zero_stage=1, accumulation=2, pipeline=2)),
    (4, replace(TWO, zero_stage=1, accumulation=2, pipeline=2)),
    (4, replace(ENCODER, zero_stage=1, pipeline=2, tied=True)),
    (4, replace(TIED_TWO, zero_stage=1, pipeline=2, shuffled=True)),
    (2, replace(TWO, zero_stage=0, accumulation=2, pipeline=2)),
    (2, replace(ENCODER, zero_stage=0, accumulation=4, pipeline=2, tied=True)),
    (4, replace(TWO, zero_stage=0, accumulation=2, pipeline=2, recompute="full")),
    (4, Layout(zero_stage=0, pipeline=2, tied=True, shuffled=True)),
    (1, Layout(zero_stage=1, offload="optimizer")),
    (1, replace(TWO, zero_stage=3, accumulation=2, offload="parameters")),
    *[(2, Layout(zero_stage=stage, accumulation=2, offload="optimizer")) for stage in (1, 2, 3)],
    (2, replace(ENCODER, zero_stage=2, tied=True, offload="optimizer")),
    (2, replace(ENCODER, zero_stage=3, tied=True, offload="parameters")),
    (2, Layout(zero_stage=3, accumulation=2, recompute="full", offload="parameters")),
    (2, replace(TIED_TWO, zero_stage=1, accumulation=2, pipeline=2, offload="optimizer")),
    (4, Layout(zero_stage=1, accumulation=2, pipeline=2, offload="optimizer")),
]
OFFLOADED = [
    *[Layout(zero_stage=stage, offload="optimizer") for stage in (1, 2, 3)],
    Layout(zero_stage=3, offload="parameters"),
]
OPTIMIZER_OF_STAGE = {
    0: "AdamW",
    1: "DeepSpeedZeroOptimizer",
    2: "DeepSpeedZeroOptimizer",
    3: "DeepSpeedZeroOptimizer_Stage3",
}


@cache
def reference(
    tied: bool, z_loss: float = 0.0, architecture: Architecture = "decoder", attention: str = "rope"
) -> Outcome:
    """The same five steps in plain PyTorch, the whole batch at once; the z-loss on whole logits."""
    torch.manual_seed(0)
    layout = Layout(tied=tied, architecture=architecture, attention=attention)
    model = Transformer(tiny.model_of(layout), tiny.VOCAB, seed=tiny.SEED)
    optimizer = make_optimizer(model.named_parameters(), tiny.optimizer_of(layout), model.config, fused=False)
    losses, norms = [], []
    for step in range(STEPS):
        rows = tiny.batch(step, list(range(tiny.ROWS)), source=architecture == "encoder_decoder")
        loss = model(rows.input_ids, rows.document_ids, rows.labels, source=rows.source) / rows.valid_tokens
        (loss + z_loss * mean_z(model, rows) if z_loss else loss).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), tiny.CLIPPING)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    state = {}
    for name, parameter in model.named_parameters():
        state[name, "master"] = parameter.detach().reshape(-1)
        for moment in ("exp_avg", "exp_avg_sq"):
            state[name, moment] = optimizer.state[parameter][moment].reshape(-1)
    return Outcome(losses, norms, {}, state)


def mean_z(model: Transformer, rows: TokenBatch) -> torch.Tensor:
    """ln^2 Z, averaged over the predicted tokens."""
    logits = model(rows.input_ids, rows.document_ids)[rows.labels != -100]
    return logits.exp().sum(-1).log().square().mean()


def assert_layout_ran(outcomes: list[Outcome], layout: Layout) -> None:
    """The optimizer is that of the stage, the stages are as many as asked, and each rank holds its part only."""
    parameters = parameter_count(tiny.model_of(layout), tiny.VOCAB)
    for outcome in outcomes:
        ran = outcome.layout
        assert ran["optimizer"] == OPTIMIZER_OF_STAGE[layout.zero_stage]
        assert ran["zero_stage"] == layout.zero_stage
        assert ran["pipeline"] == layout.pipeline
        assert ran["offload"] == layout.offload
        assert ran["world"] == len(outcomes)
        if layout.zero_stage == 3 or layout.pipeline > 1:
            share = parameters / (len(outcomes) if layout.zero_stage == 3 else layout.pipeline)
            assert ran["parameters_held"] < 1.25 * share, "a rank holds more than its part of the parameters"
        else:
            assert ran["parameters_held"] == parameters
    held = sum(outcome.layout["parameters_held"] for outcome in outcomes)
    assert held >= parameters


def assert_equal_within(
    outcome: Outcome, expected: Outcome, bound: float, but: Collection[tuple[str, str]] = ()
) -> None:
    """Losses, norms and, per tensor, ||a - b|| <= bound ||b||, of all but some."""
    torch.testing.assert_close(torch.tensor(outcome.losses), torch.tensor(expected.losses), rtol=bound, atol=0)
    torch.testing.assert_close(torch.tensor(outcome.norms), torch.tensor(expected.norms), rtol=bound, atol=0)
    assert outcome.state.keys() == expected.state.keys()
    for key, tensor in outcome.state.items():
        if key in but:
            continue
        reference_tensor = expected.state[key]
        distance = torch.linalg.vector_norm(tensor - reference_tensor) / torch.linalg.vector_norm(reference_tensor)
        assert distance <= bound, f"{key} differs by {distance:.2e}"


@pytest.mark.spare
def test_the_inner_stage_of_a_pipeline_trains_without_rows() -> None:
    layout = Layout(zero_stage=1, accumulation=2, pipeline=3)
    outcomes = run_ranks(tiny.run_and_tell_needs, 3, layout, STEPS)
    assert [needs for _, needs in outcomes] == [True, False, True]
    for outcome, _ in outcomes:
        assert outcome.layout["pipeline"] == 3
        assert_equal_within(outcome, reference(layout.tied), 1e-5)


def threads_after(layouts: list[Layout]) -> list[int]:
    """Threads of this process after each of some engines that follow each other."""
    counts = []
    for layout in layouts:
        with groups_end_within():
            engine = tiny.make_engine(layout)
            tiny.train(engine, 0, 3)  # ZeRO 3 takes its trace in the first update, and uses it from the second on
            engine.close()
            del engine
        counts.append(psutil.Process().num_threads())
    return counts


CLOSED = [
    *(Layout(zero_stage=2), Layout(zero_stage=1, pipeline=2), Layout(sequence=2)),
    *(Layout(zero_stage=3), Layout(zero_stage=3, sequence=2)),
]


@pytest.mark.parametrize("layout", CLOSED, ids=str)
@pytest.mark.spare
def test_an_engine_that_is_closed_takes_its_process_groups_along(layout: Layout) -> None:
    for first, *later in run_ranks(threads_after, 2, [layout] * 4):
        assert later == [first] * 3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.spare
def test_a_stage_may_hold_the_embedding_alone(muon: bool, precision: str) -> None:
    """Under a head that costs more than all blocks: the first stage then has nothing that decays."""
    layout = Layout(zero_stage=1, accumulation=2, top_heavy=True, precision=precision, muon=muon)
    [alone] = run_ranks(tiny.run, 1, layout, 2)
    for outcome in run_ranks(tiny.run, 3, replace(layout, pipeline=3), 2):
        assert outcome.layout["pipeline"] == 3
        if precision == "fp32":
            assert_equal_within(outcome, alone, 1e-5)
        else:
            torch.testing.assert_close(torch.tensor(outcome.losses), torch.tensor(alone.losses), rtol=5e-3, atol=0)


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, Layout(zero_stage=1)),
        (2, Layout(zero_stage=3)),
        (2, Layout(zero_stage=1, accumulation=2, pipeline=2)),
        (4, Layout(zero_stage=1, accumulation=2, pipeline=2)),
    ],
    ids=str,
)
@pytest.mark.spare
def test_evaluation_sums_over_all_ranks(world: int, layout: Layout) -> None:
    """Micro-batches that are full and one that is short, before and after a training step."""
    model = Transformer(tiny.tiny_model(layout.tied), tiny.VOCAB, seed=tiny.SEED)
    rows = tiny.batch(3, list(range(tiny.EVALUATED_ROWS)))
    with torch.no_grad():
        expected = float(model(rows.input_ids, rows.document_ids, rows.labels))
    for first, second in run_ranks(tiny.evaluate_twice, world, layout):
        assert first == pytest.approx(expected, rel=1e-5)
        assert second < first, "a step on these rows was taken in between"


@pytest.mark.spare
def test_ranks_stand_where_the_grid_says() -> None:
    places = run_ranks(tiny.place_in_the_grid, 4, Layout(zero_stage=1, pipeline=2, shuffled=True))
    assert places == [(False, 0), (True, 0), (True, 1), (False, 1)]


@pytest.mark.sampled(12)
@pytest.mark.parametrize(("world", "layout"), CASES, ids=[f"ranks{world}-{layout}" for world, layout in CASES])
def test_layout_equals_plain_pytorch(world: int, layout: Layout) -> None:
    outcomes = run_ranks(tiny.run, world, layout, STEPS)
    assert_layout_ran(outcomes, layout)
    expected = reference(layout.tied, 0.0, layout.architecture, layout.attention)
    for outcome in outcomes:
        assert_equal_within(outcome, expected, 1e-5)


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_each_architecture_meets_each_value_of_every_axis(architecture: str) -> None:
    """All pairs with the architecture, of the table above."""

    def axes(world: int, layout: Layout) -> set[tuple[str, object]]:
        named = ("zero_stage", "tied", "recompute", "offload")
        several = {"pipeline": layout.pipeline > 1, "accumulation": layout.accumulation > 1, "ranks": world > 1}
        return {(name, getattr(layout, name)) for name in named} | set(several.items())

    met = [axes(*case) for case in CASES if case[1].architecture == architecture]
    assert set().union(*met) == set().union(*(axes(*case) for case in CASES))


@pytest.mark.parametrize("layout", [*[Layout(zero_stage=stage) for stage in (1, 2, 3)], *OFFLOADED], ids=str)
def test_offloaded_state_lives_on_the_host(layout: Layout) -> None:
    """There DeepSpeed keeps a gradient beside each master from one update to the next, and all that a rank holds of
    offloaded parameters in one flat memory."""
    for told, kept, held, places in run_ranks(where_state_lives, 2, layout):
        assert told == (layout.offload != "none", layout.offload == "parameters")
        assert (kept, held) == told
        assert places == {"cpu"}


def where_state_lives(layout: Layout) -> tuple[tuple[bool, bool], bool, bool, set[str]]:
    """After a step: what DeepSpeed's configuration offloads; whether all masters have a gradient; whether all
    parameters are in the flat memory on the host; devices of masters and moments."""
    engine = tiny.make_engine(layout)
    tiny.train(engine, 0, 1)
    optimizer, zero = engine._optimizer, engine._ds._config.zero_config
    told = tuple(part is not None and part.device == "cpu" for part in (zero.offload_optimizer, zero.offload_param))
    flats = [piece.flat for piece in local_pieces(optimizer, engine.names)]
    state = base_optimizer(optimizer).state
    tensors = [*flats, *(state[flat][moment] for flat in flats for moment in ("exp_avg", "exp_avg_sq"))]
    parameters = {getattr(p, "ds_tensor", p).untyped_storage().data_ptr() for p in engine.names}
    host = {flat.untyped_storage().data_ptr() for flat in getattr(optimizer, "param_groups_fp16_flat_cpu_memory", ())}
    return (
        (told[0], told[1]),
        all(flat.grad is not None for flat in flats),
        parameters <= host,
        {tensor.device.type for tensor in tensors},
    )


@pytest.mark.parametrize("layout", [replace(layout, accumulation=2) for layout in OFFLOADED], ids=str)
@pytest.mark.spare
def test_gradients_that_leave_in_many_buckets_are_whole(layout: Layout) -> None:
    """As of a model of more than 2^27 parameters: the place of one bucket is used again for the next, before or after
    the host has its copy. Some tensors are larger than a bucket."""
    for outcome in run_ranks(run_in_small_buckets, 2, layout, 1500):
        assert_equal_within(outcome, reference(layout.tied), 1e-5)


def run_in_small_buckets(layout: Layout, elements: int) -> Outcome:
    """A run whose gradients are reduced so many at a time."""
    usual = spec_module.bucket_elements
    spec_module.bucket_elements = lambda parameters: elements
    try:
        engine = tiny.make_engine(layout)
    finally:
        spec_module.bucket_elements = usual
    assert engine._ds._config.zero_config.reduce_bucket_size == elements
    losses, norms = tiny.train(engine, 0, STEPS)
    return Outcome(losses, norms, engine.layout, tiny.whole_state(engine))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("world", "layout", "optimizer"),
    [
        (1, Layout(zero_stage=1, precision="bf16"), "BF16_Optimizer"),
        (2, Layout(zero_stage=2, precision="bf16", accumulation=2), "DeepSpeedZeroOptimizer"),
        (2, Layout(zero_stage=1, precision="bf16_autocast"), "DeepSpeedZeroOptimizer"),
        (2, Layout(zero_stage=1, precision="bf16", accumulation=2, pipeline=2), "BF16_Optimizer"),
        (4, Layout(zero_stage=1, precision="bf16", pipeline=2, tied=True), "BF16_Optimizer"),
        (2, Layout(zero_stage=1, precision="bf16", accumulation=2, offload="optimizer"), "DeepSpeedZeroOptimizer"),
        (2, Layout(zero_stage=2, precision="bf16_autocast", offload="optimizer"), "DeepSpeedZeroOptimizer"),
        (2, Layout(zero_stage=3, precision="bf16", offload="parameters"), "DeepSpeedZeroOptimizer_Stage3"),
        (
            2,
            Layout(zero_stage=1, precision="bf16", accumulation=2, pipeline=2, tied=True, offload="optimizer"),
            "DeepSpeedZeroOptimizer",
        ),
    ],
    ids=str,
)
def test_bf16_losses_stay_near_fp32(world: int, layout: Layout, optimizer: str) -> None:
    for outcome in run_ranks(tiny.run, world, layout, STEPS):
        assert outcome.layout["optimizer"] == optimizer
        assert outcome.layout["precision"] == layout.precision
        assert outcome.layout["offload"] == layout.offload
        expected = reference(layout.tied)
        torch.testing.assert_close(torch.tensor(outcome.losses), torch.tensor(expected.losses), rtol=5e-3, atol=0)
        # No gradient is missing: that of the head alone is 13 % of the norm, rounding 0.4 %.
        torch.testing.assert_close(torch.tensor(outcome.norms), torch.tensor(expected.norms), rtol=2e-2, atol=0)
        masters = [tensor for (_, kind), tensor in outcome.state.items() if kind == "master"]
        assert all(tensor.dtype == torch.float32 for tensor in masters)


TIED = Layout(zero_stage=1, accumulation=2, pipeline=2, tied=True)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    "layout",
    [TIED, replace(TIED, zero_stage=0), *[replace(TIED, precision="bf16", offload=o) for o in ("none", "optimizer")]],
    ids=str,
)
def test_the_copies_of_a_tied_weight_stay_equal_to_the_bit(world: int, layout: Layout) -> None:
    copies = [copy for copy in run_ranks(tied_weight, world, layout) if copy is not None]
    assert len(copies) == world, "the first stage and the last have one each"
    assert all(torch.equal(copies[0], copy) for copy in copies)


def tied_weight(layout: Layout) -> torch.Tensor | None:
    """This rank's copy of the embedding after three updates, if it has one."""
    engine = tiny.make_engine(layout)
    tiny.train(engine, 0, 3)
    return next((p.detach().clone() for p, name in engine.names.items() if name == "embedding.weight"), None)


@pytest.mark.timeout(600)
@pytest.mark.spare
def test_compiled_blocks_equal_eager_ones() -> None:
    """One compiled run is enough: the blocks are alike, so a single graph is made (half a minute on a CPU)."""
    ((outcome, graphs),) = run_ranks(run_and_count_graphs, 1, Layout(zero_stage=1, compile=True), timeout=500)
    assert graphs == 1
    assert_equal_within(outcome, reference(False), 1e-5)


def run_and_count_graphs(layout: Layout) -> tuple[Outcome, int]:
    """A run, and how many different graphs torch.compile made of it."""
    from torch._dynamo.utils import counters

    counters.clear()
    outcome = tiny.run(layout, STEPS)
    return outcome, counters["stats"]["unique_graphs"]


def test_bf16_gradients_are_accumulated_and_reduced_in_fp32() -> None:
    """With four micro-batches the gradient that the optimizer gets is not a bf16 number in most places."""
    for world, layout in (
        (1, Layout(zero_stage=1)),
        (2, Layout(zero_stage=2)),
        *[(2, layout) for layout in OFFLOADED],
    ):
        for share in run_ranks(share_of_bf16_gradients, world, replace(layout, precision="bf16", accumulation=4)):
            assert share < 0.9, f"{layout}: {share:.0%} of the gradient's elements are exactly bf16"


def share_of_bf16_gradients(layout: Layout) -> float:
    """Share of the elements of the reduced gradients that are exactly representable in bf16, in an engine that is not
    the first one of its process: an earlier one did autocast."""
    tiny.make_engine(replace(layout, precision="bf16_autocast"))
    # Without clipping, whose factor would make any number one that bf16 cannot hold.
    engine = Engine(replace(tiny.make_engine(layout).spec, gradient_clipping=0.0), tiny.CPU)
    base = base_optimizer(engine._optimizer)
    exact, total = 0, 0
    apply = base.step

    def step(*args: object, **kwargs: object) -> object:
        nonlocal exact, total
        for group in base.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    nonzero = parameter.grad[parameter.grad != 0].float()
                    exact += int((nonzero == nonzero.bfloat16().float()).sum())
                    total += nonzero.numel()
        return apply(*args, **kwargs)

    base.step = step  # type: ignore[method-assign]
    tiny.train(engine, 0, 1)
    assert total, "no gradient was seen"
    return exact / total


def test_the_bound_tells_another_learning_rate() -> None:
    """The comparison can fail: the weights after another learning rate are outside the bound."""
    expected = reference(False)
    moved = {key: tensor * (1 + 2e-5) for key, tensor in expected.state.items()}
    with pytest.raises(AssertionError, match="differs by"):
        assert_equal_within(Outcome(expected.losses, expected.norms, {}, moved), expected, 1e-5)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("layout", [*[Layout(zero_stage=stage) for stage in (0, 1, 2, 3)], *OFFLOADED], ids=str)
def test_a_nan_skips_the_update_on_all_ranks(layout: Layout) -> None:
    """One NaN in one rank's gradient: every rank skips, and the state equals that of a run without the step."""
    for skipped, equal, finite in run_ranks(poisoned_step, 2, layout):
        assert skipped
        assert equal
        assert finite


def poisoned_step(layout: Layout) -> tuple[bool, bool, bool]:
    """Two good steps, one with a NaN in rank 1's loss, one good step; was it skipped, did the state stay?"""
    import torch.distributed as dist

    engine = tiny.make_engine(layout)
    tiny.train(engine, 0, 2)
    before = tiny.whole_state(engine)
    mine = list(range(dist.get_rank(), tiny.ROWS, 2))
    poison = float("nan") if dist.get_rank() == 1 else 1.0
    hook = engine._ds.module.register_forward_hook(lambda module, inputs, loss: loss * poison)
    valid = tiny.batch(2, list(range(tiny.ROWS))).valid_tokens
    engine.forward_backward([tiny.batch(2, mine)], valid, tiny.LEARNING_RATE, update=2)
    update = engine.update()
    hook.remove()
    after = tiny.whole_state(engine)
    equal = all(torch.equal(before[key], after[key]) for key in before)
    losses, norms = tiny.train(engine, 3, 4)
    return update.skipped, equal, all(torch.isfinite(torch.tensor(losses + norms)).tolist())


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("layout", [TIED, replace(TIED, zero_stage=0), replace(TIED, offload="optimizer")], ids=str)
def test_a_nan_in_one_stage_skips_the_update_in_all(world: int, layout: Layout) -> None:
    """In the gradient of one weight of one rank, of the first stage or of the last one."""
    for skipped, equal, finite in run_ranks(poisoned_stages, world, layout):
        assert skipped == [False, True, False, True, False]
        assert equal
        assert finite


def poisoned_stages(layout: Layout) -> tuple[list[bool], bool, bool]:
    """Updates with a NaN on no rank, on rank 0, on none, on the last, on none: which were skipped, did the state stay,
    were the losses finite?"""
    import torch.distributed as dist

    engine = tiny.make_engine(layout)
    parameter = next(p for p, name in engine.names.items() if name.startswith("layers."))
    skipped, equal, losses = [], True, []
    for step, guilty in enumerate((None, 0, None, dist.get_world_size() - 1, None)):
        before = tiny.whole_state(engine)
        mine = dist.get_rank() == guilty
        hook = parameter.register_hook(lambda gradient: gradient * float("nan")) if mine else None
        found, norms = tiny.train(engine, step, step + 1)
        if hook is not None:
            hook.remove()
        after = tiny.whole_state(engine)
        skipped.append(not math.isfinite(norms[0]))
        if guilty is not None:
            equal = equal and all(torch.equal(before[key], after[key]) for key in before)
        losses += found
    return skipped, equal, all(math.isfinite(loss) for loss in losses)
