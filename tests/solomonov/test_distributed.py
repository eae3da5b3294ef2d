"""The control plane on real gloo ranks: sums against Python's integers, places against the torchrun variables."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from solomonov.distributed import (
    COLLECTIVE_TIMEOUT_SECONDS,
    Control,
    RankInfo,
    groups_end_within,
    meet,
    pick_device,
    start_process_group,
    stop_process_group,
)
from solomonov.errors import ConfigurationError
from tests.support.ranks import run_ranks

WORLD = 2
BIG = 2**64 - 3


def talk() -> dict[str, Any]:
    """What one rank gets from every collective; values differ by rank."""
    control = Control()
    rank = control.rank
    control.barrier()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # the pool's ranks met through a file
    return {
        "place": (control.rank, control.size),
        "info": RankInfo.from_environment(),
        "gathered": control.all_gather_object({"rank": rank}),
        "from_0": control.broadcast_object(f"said by {rank}"),
        "from_1": control.broadcast_object(f"said by {rank}", src=1),
        "integers": control.sum_integers([0, 1, BIG if rank else 5, 2**63 + rank, rank]),
        "floats": control.sum_floats([0.1 * (rank + 1), 1e300, math.inf if rank else 1.0]),
        "device": str(pick_device(RankInfo.from_environment())),
    }


def threads() -> int:
    return psutil.Process().num_threads()


def groups_and_their_threads() -> dict[str, Any]:
    """Threads before, within and after, and what is left: of our groups, of one that DeepSpeed keeps, of the world."""
    import deepspeed
    from deepspeed.utils import groups

    deepspeed.init_distributed("gloo", dist_init_required=False)
    before, left, kept = threads(), [], []
    for _ in range(2):
        with groups_end_within():
            mine = [dist.new_group() for _ in range(5)]
            kept.append(groups._clone_world_group())
            within = threads()
            total = torch.ones(3)
            dist.all_reduce(total, group=kept[-1])
            del mine
        left.append(groups._WORLD_GROUP)
        kept.clear()
    dist.all_reduce(total)
    return {"before": before, "within": within, "after": threads(), "left": left, "total": total.tolist()}


@pytest.mark.dist(world=WORLD)
def test_groups_that_are_made_within_end_with_their_threads() -> None:
    for found in run_ranks(groups_and_their_threads, WORLD):
        assert found["within"] == found["before"] + 18, "three a group"
        assert found["after"] == found["before"]
        assert found["left"] == [None, None], "DeepSpeed does not go on with one that is gone"
        assert found["total"] == [4.0] * 3, "the world is still there"


@pytest.mark.dist(world=WORLD)
def test_collectives() -> None:
    answers = run_ranks(talk, WORLD)
    for rank, answer in enumerate(answers):
        assert answer["place"] == (rank, WORLD)
        assert answer["info"] == RankInfo(rank=rank, local_rank=rank, world=WORLD, local_world=WORLD)
        assert answer["gathered"] == [{"rank": 0}, {"rank": 1}]
        assert answer["from_0"] == "said by 0"
        assert answer["from_1"] == "said by 1"
        assert answer["device"] == "cpu"
        assert answer["integers"] == [0, 2, (BIG + 5) % 2**64, (2**63 + 2**63 + 1) % 2**64, 1]
        assert answer["floats"] == [0.1 + 0.2, 2e300, math.inf]


def test_a_process_that_is_no_rank_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    info = RankInfo.from_environment()
    assert info == RankInfo(rank=3, local_rank=1, world=8, local_world=8)
    with pytest.raises(ConfigurationError, match="not started as a rank") as caught:
        meet(info)
    assert caught.value.got == "MASTER_PORT not in the environment"
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ConfigurationError, match="not started as a rank") as caught:
        RankInfo.from_environment()
    assert caught.value.got == "LOCAL_RANK not in the environment"


def test_a_group_is_joined_and_left(tmp_path: Path) -> None:
    info = RankInfo(0, 0, 1, 1)
    start_process_group(info, torch.device("cpu"), meet(info, f"file://{tmp_path / 'meet'}"))
    try:
        assert dist.get_backend() == "gloo"
        assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
        assert Control().sum_integers([7]) == [7]
    finally:
        stop_process_group()
    assert not dist.is_initialized()
    stop_process_group()  # without a group there is nothing to leave


def test_a_rank_that_lives_but_does_not_come_is_waited_for_ten_minutes() -> None:
    assert COLLECTIVE_TIMEOUT_SECONDS == 600


@pytest.mark.gpu
def test_the_device_is_that_of_the_local_rank() -> None:
    device = pick_device(RankInfo(rank=5, local_rank=0, world=8, local_world=1))
    assert device == torch.device("cuda", 0)
    assert torch.cuda.current_device() == 0
