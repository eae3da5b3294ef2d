"""What DeepSpeed is told for a layout on a kind of device; nothing of it runs here."""

from __future__ import annotations

import pytest
import torch

from solomonov.engine_spec import deepspeed_config
from tests.support import tiny
from tests.support.tiny import Layout


@pytest.mark.parametrize(("kind", "pinned"), [("cpu", False), ("cuda", True)])
def test_deepspeed_is_told_what_to_offload(kind: str, pinned: bool) -> None:
    """Page-locked memory only where a device copies from it; nothing is said where nothing is offloaded."""
    host = {"device": "cpu", "pin_memory": pinned}
    for offload, expected in {
        "none": {},
        "optimizer": {"offload_optimizer": host},
        "parameters": {"offload_optimizer": host, "offload_param": host},
    }.items():
        spec = tiny.make_spec(Layout(zero_stage=3, offload=offload), 1)
        config = deepspeed_config(spec, torch.device(kind))
        zero = config["zero_optimization"]
        assert {key: value for key, value in zero.items() if key.startswith("offload")} == expected
        assert ("zero_force_ds_cpu_optimizer" in config) == (offload != "none")


@pytest.mark.parametrize(
    ("kind", "layout", "overlapped"),
    [
        *[("cuda", Layout(zero_stage=stage), stage > 0) for stage in (0, 1, 2, 3)],
        ("cuda", Layout(zero_stage=1, pipeline=2), False),
        ("cuda", Layout(zero_stage=1, precision="bf16"), False),
        ("cuda", Layout(zero_stage=1, precision="bf16", offload="optimizer"), True),
        ("cuda", Layout(zero_stage=2, precision="bf16"), True),
        *[("cpu", Layout(zero_stage=stage), stage == 3) for stage in (0, 1, 2, 3)],
    ],
)
def test_deepspeed_is_told_to_reduce_beside_the_backward_pass(kind: str, layout: Layout, overlapped: bool) -> None:
    config = deepspeed_config(tiny.make_spec(layout, 2), torch.device(kind))
    assert config["zero_optimization"]["overlap_comm"] is overlapped
