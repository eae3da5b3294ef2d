"""Engines that compute activations again against the same ones that keep them: every layout, to the bit.

ZeRO 3 runs with nothing kept whole: parameters are gathered for a module, also where the backward pass runs it again,
and taken away behind it, as they are in models that are too large to stay.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from solomonov import engine as engine_module
from solomonov.engine import Engine
from solomonov.model.config import NOTHING_AGAIN, Recompute
from solomonov.model.layers import Block
from tests.support import tiny
from tests.support.ranks import run_ranks
from tests.support.tiny import Layout

STEPS, LAYERS = 2, 6
MODES = (Recompute("selective"), Recompute("full"), Recompute("full", 2), Recompute("full", 4))
NOTHING_WHOLE = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
pytestmark = [pytest.mark.dist, pytest.mark.spare]


def make_engine(layout: Layout, recompute: Recompute) -> Engine:
    """A deeper tiny model; at stage 3 no parameter stays whole."""
    spec = tiny.make_engine(layout).spec
    made = engine_module.deepspeed_config

    def config(spec: Any, device: torch.device) -> dict[str, Any]:
        result = made(spec, device)
        result["zero_optimization"] |= NOTHING_WHOLE
        return result

    engine_module.deepspeed_config = config
    try:
        model = spec.model.model_copy(update={"layers": LAYERS})
        return Engine(replace(spec, model=model, recompute=recompute), tiny.CPU)
    finally:
        engine_module.deepspeed_config = made


def differences(layout: Layout) -> dict[str, list[str]]:
    """What differs from a run that keeps all, by mode: names of tensors, losses, norms."""
    found, expected = {}, None
    for recompute in (NOTHING_AGAIN, *MODES):
        engine = make_engine(layout, recompute)
        losses, norms = tiny.train(engine, 0, STEPS)
        if layout.zero_stage == 3:
            whole = [name for p, name in engine.names.items() if name.startswith("layers.") and p.numel()]
            assert not whole, f"parameters that stayed whole: {whole}"
        result: dict[str, Any] = {"losses": torch.tensor(losses), "norms": torch.tensor(norms)}
        result |= {" ".join(key): tensor for key, tensor in tiny.whole_state(engine).items()}
        expected = result if expected is None else expected
        assert result.keys() == expected.keys()
        found[str(recompute)] = [key for key in result if not torch.equal(result[key], expected[key])]
    return found


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, Layout(zero_stage=0)),
        (2, Layout(zero_stage=1, accumulation=2)),
        (2, Layout(zero_stage=2, precision="bf16_autocast")),
        (2, Layout(zero_stage=3, accumulation=2)),
        (2, Layout(zero_stage=3, precision="bf16")),
        (2, Layout(zero_stage=1, accumulation=2, pipeline=2)),
        (2, Layout(zero_stage=1, accumulation=2, pipeline=2, precision="bf16")),
    ],
    ids=str,
)
def test_no_bit_of_losses_norms_and_state_changes(world: int, layout: Layout) -> None:
    for found in run_ranks(differences, world, layout):
        assert found == {str(mode): [] for mode in (NOTHING_AGAIN, *MODES)}


def order_of_blocks(layout: Layout, recompute: Recompute) -> list[int]:
    """Numbers within this rank's stage of the blocks whose first norm is computed in one update, in that order."""
    engine = make_engine(layout, recompute)
    calls: list[int] = []
    blocks = [module for module in engine._ds.module.modules() if isinstance(module, Block)]
    for number, block in enumerate(blocks):
        block.attention_norm.register_forward_hook(lambda *_, number=number: calls.append(number))
    tiny.train(engine, 0, 1)
    return calls


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("world", "pipeline"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("recompute", [NOTHING_AGAIN, *MODES], ids=str)
def test_blocks_run_again_in_groups_from_the_last_on(world: int, pipeline: int, recompute: Recompute) -> None:
    layout = Layout(zero_stage=1, pipeline=pipeline)
    for calls in run_ranks(order_of_blocks, world, layout, recompute):
        blocks = list(range(LAYERS // pipeline))
        groups = [blocks[begin : begin + recompute.every] for begin in range(0, len(blocks), recompute.every)]
        again = [] if recompute.mode == "none" else [number for group in reversed(groups) for number in group]
        assert calls == blocks + again
