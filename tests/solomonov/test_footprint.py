"""The bytes that a layout is said to need, against all tensors that were really there while ranks trained in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from solomonov.activations import Allocated, Working, embedding_kept, front_working
from solomonov.batch import TokenBatch
from solomonov.engine import Engine
from solomonov.footprint import Footprint, Training, footprint
from solomonov.model.config import ModelConfig, Recompute
from solomonov.model.counts import parameter_count
from solomonov.model.cross import Source
from solomonov.model.front import Front, example
from solomonov.model.init import initialise
from solomonov.model.layers import Embedding
from solomonov.parallel import ParallelConfig
from solomonov.plan import BatchPlan
from tests.support import tiny
from tests.support.ranks import run_ranks
from tests.support.tiny import Layout

VOCAB, SEQUENCE, ROWS = 2000, 64, 8
MODEL = ModelConfig(layers=6, d_model=192, heads=4)


def plan_of(layout: Layout, world: int, sequence: int = SEQUENCE, source: int | None = None) -> BatchPlan:
    copies = world // (layout.pipeline * layout.sequence)
    micro = ROWS // copies // layout.accumulation
    return BatchPlan(sequence, ROWS, micro, layout.accumulation, copies, 10, source_tokens=source)


def measured_peak(layout: Layout, model: ModelConfig, vocab: int, sequence: int, source: int | None) -> int:
    """Most bytes of tensors that this rank had at once in its third step."""
    spec = tiny.make_engine(layout).spec
    plan = plan_of(layout, dist.get_world_size(), sequence, source)
    with Allocated() as allocated:
        engine = Engine(replace(spec, model=model, vocab_size=vocab, plan=plan), tiny.CPU)
        for step in range(3):
            if step == 2:
                allocated.peak = allocated.now
            ids = torch.randint(0, vocab, (plan.micro_rows, sequence))
            read = None
            if source is not None:
                of_source = torch.randint(0, vocab, (plan.micro_rows, source))
                read = Source(of_source, torch.zeros_like(of_source))
            batch = TokenBatch(torch.arange(plan.micro_rows), ids, ids.clone(), torch.zeros_like(ids), read)
            batches = [batch] * plan.accumulation if engine.needs_rows else []
            engine.forward_backward(batches, ROWS * sequence, 1e-3, update=step)
            engine.update()
    return allocated.peak


@pytest.mark.dist
@pytest.mark.sampled(7)
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
@pytest.mark.spare
def test_what_is_foreseen_is_what_is_there(world: int, layout: Layout) -> None:
    """Never more than 5 % too little, for that ends runs; at most 15 % too much. On a CPU what is offloaded is there
    with the rest."""
    hold(world, layout, MODEL, VOCAB, SEQUENCE)


@pytest.mark.dist
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_autocast"])
@pytest.mark.spare
def test_what_earlier_micro_batches_left_is_there_while_the_head_works(precision: str) -> None:
    """With 4,000 logits a token the head needs the most, and a tenth of that is the bucket of gradients."""
    layout = Layout(zero_stage=1, accumulation=4, precision=precision)
    hold(1, layout, ModelConfig(layers=16, d_model=96, heads=4), 2 * VOCAB, 2 * SEQUENCE)


NARROW = {"layers": 6, "d_model": 32, "heads": 4, "kv_heads": 1}
"""With long rows: what attention keeps is most of all."""


@pytest.mark.dist
@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("world", "layout", "flags"),
    [
        (1, Layout(zero_stage=0), {"window_tokens": 8}),
        (1, Layout(zero_stage=0), {"preset": "hybrid", "window_tokens": 8, "pattern": "LLG", "sink": True}),
        (1, Layout(zero_stage=0, recompute="selective"), {"preset": "hybrid", "window_tokens": 8, "pattern": "LLG"}),
        (1, Layout(zero_stage=0, recompute="full", every=4), {"preset": "local", "window_tokens": 8}),
        (1, Layout(zero_stage=0), {"preset": "alibi"}),
        (1, Layout(zero_stage=3), {"preset": "hybrid", "window_tokens": 8, "pattern": "LLG", "sink": True}),
        (2, Layout(zero_stage=1, accumulation=2, pipeline=2), {"preset": "alibi"}),
        (
            2,
            Layout(zero_stage=1, accumulation=2, pipeline=2),
            {"preset": "hybrid", "window_tokens": 8, "pattern": "LLG"},
        ),
        (2, Layout(zero_stage=1, sequence=2), {"preset": "alibi", "window_tokens": 33}),
    ],
    ids=str,
)
@pytest.mark.spare
def test_what_is_foreseen_with_windows_and_biases_is_what_is_there(
    world: int, layout: Layout, flags: dict[str, object]
) -> None:
    """Masks, tables and biases among it, which in a pipeline each block makes for itself."""
    hold(world, layout, ModelConfig.model_validate({**NARROW, "attention": flags}), 200, 256)


LEARNED = {**tiny.BIASES, "attention": {"position": "learned", "train_tokens": 256}}


@pytest.mark.dist
@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("world", "layout", "changes"),
    [
        (1, Layout(zero_stage=0), {"residual": "keel"}),
        (1, Layout(zero_stage=0), {"residual": "peri", "norm": "layernorm"}),
        (1, Layout(zero_stage=0, recompute="selective"), {"residual": "deepnorm", "feed_forward": "gelu"}),
        (1, Layout(zero_stage=0), {"residual": "layerscale", "feed_forward": "relu2"}),
        (1, Layout(zero_stage=0, recompute="full", every=2), {"residual": "keel", "norm": "layernorm"}),
        (2, Layout(zero_stage=1, accumulation=2, pipeline=2), {"residual": "lns"}),
        (1, Layout(zero_stage=0), {"value_residual": True, "kv_heads": 4}),
        (1, Layout(zero_stage=0, recompute="selective"), {"value_residual": True, "kv_heads": 4}),
        (1, Layout(zero_stage=0, recompute="full"), {"value_residual": True, "kv_heads": 4, "layers": 12}),
        (2, Layout(zero_stage=1, accumulation=2, pipeline=2), {"value_residual": True, "kv_heads": 4}),
        (1, Layout(zero_stage=0), LEARNED),
        (1, Layout(zero_stage=3), LEARNED),
        (2, Layout(zero_stage=1, accumulation=2, pipeline=2), {**LEARNED, "tie_embeddings": True}),
    ],
    ids=str,
)
@pytest.mark.spare
def test_what_is_foreseen_of_other_blocks_is_what_is_there(
    world: int, layout: Layout, changes: dict[str, object]
) -> None:
    hold(world, layout, ModelConfig.model_validate({**NARROW, **changes}), 200, 256)


@pytest.mark.dist
@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("world", "layout", "changes"),
    [
        (1, Layout(zero_stage=0), {}),
        (1, Layout(zero_stage=0), {"architecture": "encoder", "encoder_layers": None}),
        (1, Layout(zero_stage=0, recompute="full", every=2), {"norm": "layernorm"}),
        (1, Layout(zero_stage=0, recompute="selective"), {}),
        (2, Layout(zero_stage=3), {"encoder_layers": 1}),
        (2, Layout(zero_stage=1, accumulation=4, pipeline=2), {"attention": {"preset": "vanilla"}}),
        (2, Layout(zero_stage=1, accumulation=4, pipeline=2), {"encoder_layers": 1}),
        (2, Layout(zero_stage=1, accumulation=2, pipeline=2, recompute="full"), {}),
        (3, Layout(zero_stage=0, accumulation=4, pipeline=3), {}),
    ],
    ids=str,
)
@pytest.mark.spare
def test_what_is_foreseen_of_an_encoder_is_what_is_there(
    world: int, layout: Layout, changes: dict[str, object]
) -> None:
    """Also before a decoder, whose blocks have a branch more and keep what they look at of a source, here longer."""
    model = ModelConfig.model_validate({**NARROW, "architecture": "encoder_decoder", "encoder_layers": 4, **changes})
    hold(world, layout, model, 200, 128, 192 if model.architecture == "encoder_decoder" else None)


def hold(world: int, layout: Layout, model: ModelConfig, vocab: int, sequence: int, source: int | None = None) -> None:
    keys = {name: getattr(layout, name) for name in ("zero_stage", "pipeline", "sequence", "offload")}
    parallel = ParallelConfig.model_validate(keys)
    recompute = Recompute(layout.recompute, layout.every)
    plan = plan_of(layout, world, sequence, source)
    ema = layout.ema is not None
    training = Training(layout.precision, recompute, ema=ema, muon=layout.muon)
    found = footprint(model, vocab, plan, parallel, training)
    foreseen = found.total + found.host
    measured = max(run_ranks(measured_peak, world, layout, model, vocab, sequence, source))
    assert 0.95 * measured <= foreseen <= 1.15 * measured, f"{foreseen / measured:.3f} of what was measured"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["patches", "frames"])
def test_what_a_front_keeps_is_foreseen_without_it(kind: str, precision: str) -> None:
    """Against what autograd really keeps of its forward pass, less the parameters and what it reads."""
    model = ModelConfig.model_validate(
        {"architecture": "encoder", "layers": 2, "d_model": 64, "heads": 4, "front": {"kind": kind}}
    )
    front = Front(model)
    initialise(front, model, 0, prefix="front.")
    front = front.bfloat16() if precision == "bf16" else front
    x, documents = example(model.front, 2, 32, torch.Generator().manual_seed(0))
    foreseen = front_working(model, 2, 32, precision)
    assert kept_of(lambda: front(x, documents)[0], *front.parameters(), x, documents) == pytest.approx(
        foreseen.kept, rel=0.02
    )
    assert foreseen.backward > 0


def kept_of(forward: Callable[[], torch.Tensor], *own: torch.Tensor) -> int:
    """Bytes that autograd keeps of a forward pass, its result included, less what was there before."""
    before = {each.untyped_storage().data_ptr() for each in own}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in before:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        storage = forward().untyped_storage()
    return sum({**kept, storage.data_ptr(): storage.nbytes()}.values())


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
def test_what_an_embedding_keeps_for_its_norm_is_foreseen(
    architecture: str, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum that is normed, and the numbers of its positions; of both stacks where there are two."""
    given = {**LEARNED, "architecture": architecture, "norm": norm, "layers": 2, "d_model": 64, "heads": 4}
    model, layout = ModelConfig.model_validate(given), Layout(zero_stage=0)
    embedding, ids = Embedding(model, VOCAB), torch.zeros(ROWS, SEQUENCE, dtype=torch.int64)
    initialise(embedding, model, 0, prefix="embedding.")
    kept = embedding_kept(model, VOCAB, ROWS, SEQUENCE, "fp32")
    found = kept_of(lambda: embedding(ids, embedding.positions_of(ids)), *embedding.parameters(), ids)
    assert found == pytest.approx(kept, rel=0.02)
    stream = ROWS * SEQUENCE * 4 * 64
    assert kept > 2 * stream

    def foreseen() -> int:
        source = SEQUENCE if architecture == "encoder_decoder" else None
        plan = plan_of(layout, 1, SEQUENCE, source)
        return footprint(model, VOCAB, plan, ParallelConfig(zero_stage=0), Training("fp32")).total

    whole = foreseen()
    monkeypatch.setattr("solomonov.activations.embedding_kept", lambda *_: stream)
    assert whole - foreseen() == (kept - stream) * len(model.stacks)


def test_what_a_front_keeps_is_there_with_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"architecture": "encoder", "layers": 2, "d_model": 64, "heads": 4, "front": {"kind": "frames"}}
    model, layout = ModelConfig.model_validate(given), Layout(zero_stage=0)

    def foreseen() -> Footprint:
        return footprint(model, VOCAB, plan_of(layout, 1), ParallelConfig(zero_stage=0), Training("fp32"))

    whole = foreseen()
    assert whole.moment == "head", "when all is kept"
    monkeypatch.setattr("solomonov.activations.front_working", lambda *_: Working(0, 0))
    kept = front_working(model, ROWS, SEQUENCE, "fp32").kept
    assert kept > ROWS * SEQUENCE * 4 * 64
    assert whole.total - foreseen().total == kept


def test_the_values_of_the_first_block_are_kept_once_beside_the_inputs_of_groups() -> None:
    """While the head, of many pieces, needs the most, of blocks that are computed again there is nothing else."""
    plan, full = BatchPlan(256, ROWS, ROWS, 1, 1, 10), Training("fp32", Recompute("full"))
    without, kept = (
        footprint(ModelConfig.model_validate({**NARROW, **switch}), 20_000, plan, ParallelConfig(zero_stage=0), full)
        for switch in ({}, {"value_residual": True})
    )
    assert without.moment == kept.moment == "head"
    assert kept.activations - without.activations == 4 * ROWS * 256 * 8


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
