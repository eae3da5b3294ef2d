"""The bytes that a layout is said to need, against all tensors that were really there while ranks trained in it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from solomonov.batch import TokenBatch
from solomonov.engine import Engine
from solomonov.footprint import Allocated, Footprint, Training, footprint
from solomonov.model.config import ModelConfig, Recompute
from solomonov.model.counts import parameter_count
from solomonov.parallel import ParallelConfig
from solomonov.plan import BatchPlan
from tests.support import tiny
from tests.support.ranks import run_ranks
from tests.support.tiny import Layout

VOCAB, SEQUENCE, ROWS = 2000, 64, 8
MODEL = ModelConfig(layers=6, d_model=192, heads=4)


def plan_of(layout: Layout, world: int, sequence: int = SEQUENCE) -> BatchPlan:
    copies = world // (layout.pipeline * layout.sequence)
    return BatchPlan(sequence, ROWS, ROWS // copies // layout.accumulation, layout.accumulation, copies, 10)


def measured_peak(layout: Layout, model: ModelConfig, vocab: int, sequence: int) -> int:
    """Most bytes of tensors that this rank had at once in its third step."""
    spec = tiny.make_engine(layout).spec
    plan = plan_of(layout, dist.get_world_size(), sequence)
    with Allocated() as allocated:
        engine = Engine(replace(spec, model=model, vocab_size=vocab, plan=plan), tiny.CPU)
        for step in range(3):
            if step == 2:
                allocated.peak = allocated.now
            ids = torch.randint(0, vocab, (plan.micro_rows, sequence))
            batch = TokenBatch(torch.arange(plan.micro_rows), ids, ids.clone(), torch.zeros_like(ids))
            engine.forward_backward([batch] * plan.accumulation if engine.needs_rows else [], ROWS * sequence, 1e-3)
            engine.update()
    return allocated.peak


@pytest.mark.dist
@pytest.mark.sampled(16)
@pytest.mark.parametrize(
    ("world", "layout"),
    [
        *[(1, Layout(zero_stage=stage)) for stage in (0, 1, 2, 3)],
        *[(1, Layout(zero_stage=0, recompute="full", every=every)) for every in (1, 2, 3)],
        (1, Layout(zero_stage=0, recompute="selective")),
        (2, Layout(zero_stage=0, recompute="selective")),
        (2, Layout(zero_stage=3, recompute="selective")),
        (2, Layout(zero_stage=1, accumulation=2, pipeline=2, recompute="full", every=2)),
        (2, Layout(zero_stage=1, accumulation=2, pipeline=2, recompute="selective")),
        (1, Layout(zero_stage=2, accumulation=2)),
        (1, Layout(zero_stage=1, precision="bf16")),
        (2, Layout(zero_stage=2, precision="bf16")),
        (2, Layout(zero_stage=1)),
        (2, Layout(zero_stage=1, sequence=2)),
        *[(1, Layout(zero_stage=stage, muon=True)) for stage in (0, 1)],
        *[(2, Layout(zero_stage=stage, muon=True)) for stage in (0, 2, 3)],
        (2, Layout(zero_stage=1, muon=True, pipeline=2)),
        (2, Layout(zero_stage=2, muon=True, offload="optimizer")),
        (2, Layout(zero_stage=3, accumulation=2, sequence=2, recompute="full")),
        (2, Layout(zero_stage=3)),
        (2, Layout(zero_stage=1, accumulation=2, pipeline=2)),
        (2, Layout(zero_stage=0, accumulation=2, pipeline=2)),
        (1, Layout(zero_stage=1, precision="bf16", offload="optimizer")),
        (1, Layout(zero_stage=3, precision="bf16", offload="parameters")),
        (2, Layout(zero_stage=1, accumulation=2, offload="optimizer")),
        (2, Layout(zero_stage=2, offload="optimizer")),
        (2, Layout(zero_stage=2, accumulation=2, offload="optimizer")),
        (2, Layout(zero_stage=3, offload="optimizer")),
        (2, Layout(zero_stage=3, accumulation=2, offload="parameters")),
        (2, Layout(zero_stage=1, accumulation=2, pipeline=2, offload="optimizer")),
        *[(2, Layout(zero_stage=stage, ema=0.9)) for stage in (0, 1, 3)],
        (2, Layout(zero_stage=2, offload="optimizer", ema=0.9)),
    ],
    ids=str,
)
def test_what_is_foreseen_is_what_is_there(world: int, layout: Layout) -> None:
    """Never more than 5 % too little, for that ends runs; at most 15 % too much. On a CPU what is offloaded is there
    with the rest."""
    hold(world, layout, MODEL, VOCAB, SEQUENCE)


NARROW = {"layers": 6, "d_model": 32, "heads": 4, "kv_heads": 1}
"""With long rows: what attention keeps is most of all."""


@pytest.mark.dist
@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("world", "layout", "flags"),
    [
        (1, Layout(zero_stage=0), {"window": 8}),
        (1, Layout(zero_stage=0), {"preset": "hybrid", "window": 8, "global_every": 3, "sink": True}),
        (1, Layout(zero_stage=0, recompute="selective"), {"preset": "hybrid", "window": 8, "global_every": 3}),
        (1, Layout(zero_stage=0, recompute="full", every=4), {"preset": "local", "window": 8}),
        (1, Layout(zero_stage=0), {"preset": "alibi"}),
        (1, Layout(zero_stage=3), {"preset": "hybrid", "window": 8, "global_every": 3, "sink": True}),
        (2, Layout(zero_stage=1, accumulation=2, pipeline=2), {"preset": "alibi"}),
        (2, Layout(zero_stage=1, accumulation=2, pipeline=2), {"preset": "hybrid", "window": 8, "global_every": 3}),
        (2, Layout(zero_stage=1, sequence=2), {"preset": "alibi", "window": 33}),
    ],
    ids=str,
)
def test_what_is_foreseen_with_windows_and_biases_is_what_is_there(
    world: int, layout: Layout, flags: dict[str, object]
) -> None:
    """Masks, tables and biases among it, which in a pipeline each block makes for itself."""
    hold(world, layout, ModelConfig.model_validate({**NARROW, "attention": flags}), 200, 256)


LEARNED = {**tiny.BIASES, "attention": {"position": "learned", "train_tokens": 256}}


@pytest.mark.dist
@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("world", "layout", "changes"),
    [
        (1, Layout(zero_stage=0), {"residual": "keel"}),
        (1, Layout(zero_stage=0), {"residual": "peri", "norm": "layernorm"}),
        (1, Layout(zero_stage=0, recompute="selective"), {"residual": "deepnorm", "feed_forward": "gelu"}),
        (1, Layout(zero_stage=0), {"residual": "layerscale", "feed_forward": "relu2"}),
        (1, Layout(zero_stage=0, recompute="full", every=2), {"residual": "keel", "norm": "layernorm"}),
        (2, Layout(zero_stage=1, accumulation=2, pipeline=2), {"residual": "lns"}),
        (1, Layout(zero_stage=0), LEARNED),
        (1, Layout(zero_stage=3), LEARNED),
        (2, Layout(zero_stage=1, accumulation=2, pipeline=2), {**LEARNED, "tie_embeddings": True}),
    ],
    ids=str,
)
def test_what_is_foreseen_of_other_blocks_is_what_is_there(
    world: int, layout: Layout, changes: dict[str, object]
) -> None:
    hold(world, layout, ModelConfig.model_validate({**NARROW, **changes}), 200, 256)


def hold(world: int, layout: Layout, model: ModelConfig, vocab: int, sequence: int) -> None:
    keys = {name: getattr(layout, name) for name in ("zero_stage", "pipeline", "sequence", "offload")}
    parallel = ParallelConfig.model_validate(keys)
    recompute = Recompute(layout.recompute, layout.every)
    plan = plan_of(layout, world, sequence)
    ema = layout.ema is not None
    training = Training(layout.precision, recompute, ema=ema, muon=layout.muon)
    found = footprint(model, vocab, plan, parallel, training)
    foreseen = found.total + found.host
    measured = max(run_ranks(measured_peak, world, layout, model, vocab, sequence))
    assert 0.95 * measured <= foreseen <= 1.15 * measured, f"{foreseen / measured:.3f} of what was measured"


def test_a_model_of_any_size_is_foreseen_without_its_memory() -> None:
    """8 billion parameters on 4,096 ranks, ZeRO 3: 16 bytes a parameter over the ranks, and what is live at once."""
    model = ModelConfig(layers=32, d_model=4096, heads=32, kv_heads=8, d_ff=14336)
    plan = BatchPlan(8192, 4096, 1, 1, 4096, 10)
    found = footprint(model, 128256, plan, ParallelConfig(zero_stage=3), Training("bf16", Recompute("full")))
    share = parameter_count(model, 128256) / 4096
    assert found.optimizer == pytest.approx(12 * share, rel=1e-3)
    assert found.weights == pytest.approx(2 * share + 2e9, rel=1e-3)
    assert found.total < 40e9


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_offloaded_leaves_the_device(precision: str) -> None:
    """Masters and moments of a rank's share are 12 bytes a number, its weights 2 or 4: they go, and go to the host."""
    plan = BatchPlan(SEQUENCE, ROWS, 2, 1, 4, 10)

    def needed(zero_stage: int, offload: str) -> Footprint:
        parallel = ParallelConfig.model_validate({"zero_stage": zero_stage, "offload": offload})
        return footprint(MODEL, VOCAB, plan, parallel, Training(precision))

    share = parameter_count(MODEL, VOCAB) / 4
    for stage in (1, 2, 3):
        before, after = needed(stage, "none"), needed(stage, "optimizer")
        assert (before.optimizer, before.host) == (pytest.approx(12 * share, abs=12), 0)
        assert after.optimizer == 0
        assert after.host >= 16 * share, "a gradient for each number is there as well"
        assert after.total < before.total
    some, all_of_it = needed(3, "optimizer"), needed(3, "parameters")
    width = 4 if precision == "fp32" else 2
    assert some.weights - all_of_it.weights == pytest.approx(width * share, abs=width)
    assert all_of_it.host - some.host == pytest.approx(width * share, abs=width)


@pytest.mark.parametrize(
    ("zero_stage", "offload"),
    [*((stage, "none") for stage in range(4)), *((stage, "optimizer") for stage in (1, 2, 3))],
)
def test_the_average_is_four_bytes_of_each_number_that_a_rank_owns(zero_stage: int, offload: str) -> None:
    plan = BatchPlan(SEQUENCE, ROWS, 2, 1, 4, 10)
    parallel = ParallelConfig.model_validate({"zero_stage": zero_stage, "offload": offload})
    without, kept = (footprint(MODEL, VOCAB, plan, parallel, Training("fp32", ema=ema)) for ema in (False, True))
    share = parameter_count(MODEL, VOCAB) / (4 if zero_stage else 1)
    device, host = (0, 4 * share) if offload == "optimizer" else (4 * share, 0)
    assert kept.optimizer - without.optimizer == pytest.approx(device, abs=4)
    assert kept.host - without.host == pytest.approx(host, abs=4)
    assert (kept.weights, kept.gradients) == (without.weights, without.gradients)


@pytest.mark.parametrize(("zero_stage", "pipeline", "more"), [(0, 1, 0), (1, 1, 1), (2, 1, 1), (3, 1, 0), (1, 2, 0)])
def test_a_device_that_reduces_beside_the_backward_pass_has_a_second_buffer(
    zero_stage: int, pipeline: int, more: int
) -> None:
    """Of as many gradients as the model has; rows are so many that the backward pass needs the most."""
    parallel = ParallelConfig.model_validate({"zero_stage": zero_stage, "pipeline": pipeline})
    plan = BatchPlan(SEQUENCE, 512, 256, 1, 2 // pipeline, 10)
    one, other = (
        footprint(MODEL, VOCAB, plan, parallel, Training("fp32", Recompute("full"), overlap=overlap))
        for overlap in (False, True)
    )
    assert one.moment == "block"
    assert other.total - one.total == more * 4 * parameter_count(MODEL, VOCAB)
