"""The harness itself: order of results, failures of every kind with their evidence, reuse and replacement
of pools, and DeepSpeed engines created one after the other in the same ranks."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.support.processes import (
    Program,
    assert_no_process,
    processes_with,
    program_environment,
    wait_for,
)
from tests.support.ranks import RankFailure, RankTimeout, close_pools, pool_pids, run_ranks

pytestmark = pytest.mark.dist(world=2)


@pytest.fixture(scope="module", autouse=True)
def _pools_of_other_tests_end_well() -> None:
    """The tests here kill ranks; those that served other tests leave by themselves first, and write their coverage."""
    close_pools()


def rank_facts(word: str, *, number: int) -> dict[str, Any]:
    total = torch.ones(3) * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return {
        "rank": dist.get_rank(),
        "environment": {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")},
        "accelerator": os.environ["DS_ACCELERATOR"],
        "threads": torch.get_num_threads(),
        "total": total,
        "given": (word, number),
        "pid": os.getpid(),
    }


def raise_on(rank: int) -> None:
    print(f"about to fail on rank {rank}", flush=True)
    if dist.get_rank() == rank:
        raise LookupError(f"lost {rank}")
    dist.barrier()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(9)
    dist.barrier()


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        stand_still()
    dist.barrier()


def stand_still() -> None:
    while True:
        time.sleep(1)


def change_surroundings() -> None:
    os.environ["LEFT_BEHIND"] = "1"
    os.environ["RANK"] = "17"
    os.chdir("/")
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)


def surroundings() -> tuple[bool, str, str, torch.dtype, bool, float]:
    here = os.getcwd()
    return (
        "LEFT_BEHIND" in os.environ,
        os.environ["RANK"],
        here,
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.rand(()).item(),
    )


def engine_losses(stage: int) -> list[float]:
    import deepspeed

    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    rows = torch.arange(32.0).reshape(8, 4)[dist.get_rank() :: dist.get_world_size()][:4] / 32
    losses = []
    for _ in range(3):
        loss = engine(rows).square().mean()
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    engine.destroy()
    return losses


def test_results_come_back_in_rank_order_with_arguments_and_environment() -> None:
    facts = run_ranks(rank_facts, 2, "word", number=5)
    assert [fact["rank"] for fact in facts] == [0, 1], "the list is by rank"
    assert torch.equal(facts[0]["total"], torch.full((3,), 3.0)), "tensors come back and the group reduces"
    assert all(fact["given"] == ("word", 5) for fact in facts), "positional and keyword arguments arrive"
    assert all(fact["accelerator"] == "cpu" and fact["threads"] == 1 for fact in facts), "CPU, one thread"
    for rank, fact in enumerate(facts):
        expected = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        assert fact["environment"] == expected, "the torchrun variables of this rank"


def test_pool_is_reused_and_calls_do_not_leak_into_each_other() -> None:
    before = run_ranks(surroundings, 2)
    pids = pool_pids(2)
    run_ranks(change_surroundings, 2)
    assert run_ranks(surroundings, 2) == before, "environment, folder, dtype, grad mode and seed are put back"
    assert pool_pids(2) == pids, "the same processes answered"


@pytest.mark.dist(world=1)
def test_world_of_one() -> None:
    (fact,) = run_ranks(rank_facts, 1, "alone", number=1)
    assert fact["environment"]["WORLD_SIZE"] == "1", "a world of one has its own pool"
    assert torch.equal(fact["total"], torch.ones(3)), "its reductions are the identity"


@pytest.mark.spare
def test_deepspeed_engines_follow_each_other_in_one_group() -> None:
    runs = [run_ranks(engine_losses, 2, stage, timeout=120) for stage in (0, 1, 2, 3)]
    for run in runs:
        assert run[0] == run[1], "both ranks hold the same mean losses"
        assert run[0] == pytest.approx(runs[0][0], rel=1e-5), "every ZeRO stage gives the same losses"
    assert runs[0][0][2] < runs[0][0][0], "and it learns"


def test_exception_carries_rank_traceback_and_output_and_the_pool_is_replaced() -> None:
    run_ranks(surroundings, 2)
    pids = pool_pids(2)
    with pytest.raises(RankFailure, match="rank 1 of 2: LookupError: lost 1") as caught:
        run_ranks(raise_on, 2, 1)
    assert caught.value.rank == 1, "the rank that raised is named"
    assert "in raise_on" in str(caught.value), "the remote traceback is shown"
    assert "about to fail on rank 1" in str(caught.value), "what the ranks printed is shown"
    assert not any(psutil.pid_exists(pid) for pid in pids), "the poisoned pool is gone, the waiting rank too"
    run_ranks(surroundings, 2)
    assert set(pool_pids(2)).isdisjoint(pids), "new processes serve the next call"


def test_dead_rank_is_the_named_cause() -> None:
    with pytest.raises(RankFailure, match="rank 0 of 2: RankDied: the process ended with 9"):
        run_ranks(die_on, 2, 0)
    assert pool_pids(2) == [], "a pool with a dead rank is not kept"


@pytest.mark.spare
def test_hang_ends_with_the_stacks_of_all_ranks() -> None:
    run_ranks(surroundings, 2)
    pids = pool_pids(2)
    with pytest.raises(RankTimeout, match="gave no answer within 2 s") as caught:
        run_ranks(hang_on, 2, 1, timeout=2)
    text = str(caught.value)
    waiting, hanging = text.split("--- stacks of rank 1")
    assert "in stand_still" in hanging, "the rank that hangs shows where"
    assert "in barrier" in waiting, "the rank that waits for it shows where"
    assert not any(psutil.pid_exists(pid) for pid in pids), "nothing is left running"


def test_rank_that_died_between_calls_is_reported() -> None:
    run_ranks(surroundings, 2)
    victim = psutil.Process(pool_pids(2)[1])
    victim.kill()
    wait_for(lambda: victim.status() == psutil.STATUS_ZOMBIE, deadline=10, what="the killed rank to end")
    with pytest.raises(RankFailure, match="rank 1 of 2: RankDied: the process ended with -9"):
        run_ranks(surroundings, 2)


def test_local_function_is_refused() -> None:
    def local() -> None: ...

    with pytest.raises(AssertionError, match="not at module level"):
        run_ranks(local, 2)


@pytest.mark.dist(world=1)
@pytest.mark.spare
def test_ranks_end_with_a_session_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import time\nfrom tests.distributed.test_ranks_pool import surroundings\n"
        "from tests.support.ranks import run_ranks\nrun_ranks(surroundings, 1)\n"
        "print('served', flush=True)\ntime.sleep(600)\n"
    )
    folder = tmp_path / "pool"
    folder.mkdir()
    environment = program_environment(TMPDIR=str(folder))
    with Program([sys.executable, "-c", code], log=tmp_path / "log.txt", env=environment) as session:
        session.wait_for(lambda: "served" in session.output(), deadline=240, what="a call to be served")
        assert len(processes_with(str(folder))) == 1, "the rank waits for the next call"
        session.kill()
    assert_no_process(str(folder))
