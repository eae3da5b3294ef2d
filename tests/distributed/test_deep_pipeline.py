"""A thousand layers on four pipeline stages train the numbers of one rank, and a rank holds a quarter of the state.

Against the same engine on one rank (which test_engine.py holds against plain PyTorch): losses, gradient norms, and each
tensor of masters and first moments, within the promised 1e-5. What a rank holds is measured on the storages that are
really there.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from solomonov.config import OptimizerConfig
from solomonov.engine import Engine
from solomonov.engine_spec import EngineSpec
from solomonov.model.attention_config import AttentionConfig
from solomonov.model.config import ModelConfig
from solomonov.model.counts import parameter_count
from solomonov.partition import base_optimizer
from solomonov.plan import BatchPlan
from tests.support import tiny
from tests.support.ranks import run_ranks

STAGES, STEPS, BOUND = 4, 2, 1e-5
# Without the default's scales of logits, two numbers a layer, whose gradients are sums that nearly cancel: fp32 is up
# to 8e-6 off float64 in them at 200 layers, on one rank.
MODEL = ModelConfig(layers=1000, d_model=16, heads=2, kv_heads=1, d_ff=16, attention=AttentionConfig(preset="rope"))
pytestmark = [pytest.mark.dist, pytest.mark.spare]


@dataclass(frozen=True)
class Ran:
    """What a rank saw of a run, and held at its end."""

    losses: list[float]
    norms: list[float]
    stages: int
    blocks: int
    """Of which it holds parameters."""
    held_bytes: int
    """Parameters, masters and moments, each storage once."""
    sizes: list[tuple[tuple[str, str], int]]
    """(name, kind) and number of values of its part of masters and first moments, in the order of `values`."""
    values: torch.Tensor
    """One tensor, since thousands take ten times as long to send."""


def run() -> Ran:
    """Train over all ranks of this pool, which are as many as stages."""
    stages = dist.get_world_size()
    spec = EngineSpec(
        model=MODEL,
        vocab_size=tiny.VOCAB,
        seed=tiny.SEED,
        plan=BatchPlan(tiny.SEQUENCE, tiny.ROWS, tiny.ROWS // stages, stages, data_parallel=1, total_steps=STEPS),
        precision="fp32",
        zero_stage=1,
        # With the usual eps a first update is the sign of a gradient, which is rounding where that nearly cancels.
        optimizer=OptimizerConfig(lr=tiny.LEARNING_RATE, eps=1e-5),
        gradient_clipping=tiny.CLIPPING,
        pipeline=stages,
    )
    engine = Engine(spec, tiny.CPU)
    losses, norms = tiny.train(engine, 0, STEPS)
    mine = [fragment for fragment in engine.fragments() if fragment.kind in ("master", "exp_avg")]
    return Ran(
        losses,
        norms,
        engine.layout["pipeline"],
        len({name.split(".")[1] for name in engine.names.values() if name.startswith("layers.")}),
        held_bytes(engine),
        [((fragment.name, fragment.kind), fragment.data.numel()) for fragment in mine],
        torch.cat([fragment.data.reshape(-1) for fragment in mine]),
    )


def held_bytes(engine: Engine) -> int:
    """Of parameters and of all that the optimizer has, each storage once."""
    optimizer = base_optimizer(engine._optimizer)
    tensors: list[torch.Tensor] = [*engine.names, *(p for group in optimizer.param_groups for p in group["params"])]
    tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def whole_state(ranks: list[Ran]) -> dict[tuple[str, str], torch.Tensor]:
    """(name, kind) -> flattened tensor, each from the one rank that holds it."""
    whole: dict[tuple[str, str], torch.Tensor] = {}
    for ran in ranks:
        parts = ran.values.split([size for _, size in ran.sizes])
        for (key, _), part in zip(ran.sizes, parts, strict=True):
            assert key not in whole, f"two ranks hold {key}"
            whole[key] = part
    return whole


@pytest.mark.timeout(600)
def test_a_thousand_layers_on_four_stages_are_those_of_one_rank() -> None:
    [alone] = run_ranks(run, 1, timeout=240)
    ranks = run_ranks(run, STAGES, timeout=240)

    assert [ran.stages for ran in ranks] == [STAGES] * STAGES
    assert sum(ran.blocks for ran in ranks) == MODEL.layers
    parameters = parameter_count(MODEL, tiny.VOCAB)
    assert alone.held_bytes >= 16 * parameters, "parameters, masters and two moments are all counted"
    table = 16 * tiny.VOCAB * MODEL.d_model
    for rank, ran in enumerate(ranks):
        # Cut between blocks, by what they compute: embedding or head, and a block or two, are what a stage may differ.
        quarter, slack = alone.held_bytes / STAGES, table + 0.02 * alone.held_bytes / STAGES
        assert abs(ran.held_bytes - quarter) <= slack, f"rank {rank} holds {ran.held_bytes} of {alone.held_bytes} bytes"

    for ran in ranks:
        torch.testing.assert_close(torch.tensor(ran.losses), torch.tensor(alone.losses), rtol=BOUND, atol=0)
        torch.testing.assert_close(torch.tensor(ran.norms), torch.tensor(alone.norms), rtol=BOUND, atol=0)
    found, expected = whole_state(ranks), whole_state([alone])
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        distance = torch.linalg.vector_norm(found[key] - tensor)
        assert distance <= BOUND * torch.linalg.vector_norm(tensor), f"{key} differs by {distance:.2e}"
