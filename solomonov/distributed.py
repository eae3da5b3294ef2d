"""The process group of a run: start, the control-plane collectives, and nothing about models.

Everything that steers (stop requests, counts, checkpoint agreement) goes over a gloo group on CPU tensors, so that
it never waits for a CUDA stream and never shares an NCCL communicator with gradients.
"""

from __future__ import annotations

import datetime
import gc
import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from solomonov.errors import ConfigurationError
from solomonov.model.attention import SequenceShare, attend
from solomonov.topology import Place, RankGrid, rank_grid

T = TypeVar("T")

IDENTITY_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
"""Who a rank is, from whoever starts it."""

MEETING_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
"""Where it meets the others."""

COLLECTIVE_TIMEOUT_SECONDS = 600
"""How long a collective waits for a rank that lives but does not come; a rank that dies is seen at once."""


@dataclass(frozen=True)
class RankInfo:
    """Who this process is: the torchrun variables."""

    rank: int
    local_rank: int
    """Number on this machine."""
    world: int
    local_world: int
    """Ranks on this machine."""
    node: int = 0
    """Number of this machine."""

    @staticmethod
    def from_environment() -> RankInfo:
        """Read the torchrun variables.

        Raises:
            ConfigurationError: one is missing.
        """
        _require_variables(IDENTITY_VARIABLES)
        rank, local_rank, world = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        return RankInfo(rank, local_rank, world, local_world, int(os.environ.get("GROUP_RANK", "0")))

    @property
    def several_machines(self) -> bool:
        """Whether the world is more than this machine."""
        return self.local_world < self.world


def _require_variables(names: Sequence[str]) -> None:
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise ConfigurationError(
            "this process was not started as a rank",
            got=f"{', '.join(missing)} not in the environment",
            rule=f"a rank is given {', '.join(IDENTITY_VARIABLES + MEETING_VARIABLES)}",
            remedy="start it with `solomonov train`, or with torchrun",
        )


def pick_device(info: RankInfo) -> torch.device:
    """This rank's CUDA device where there is one, else the CPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", info.local_rank)
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def meet(info: RankInfo, init_method: str = "env://") -> Store:
    """The store by which the ranks of a run find each other, where the torchrun variables say.

    Raises:
        ConfigurationError: they do not say it.
    """
    if init_method == "env://":
        _require_variables(MEETING_VARIABLES)
    timeout = datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_SECONDS)
    store, _, _ = next(rendezvous(init_method, info.rank, info.world, timeout=timeout))
    store.set_timeout(timeout)
    found: Store = store
    return found


def start_process_group(info: RankInfo, device: torch.device, store: Store) -> None:
    """Join the run's process group: NCCL for CUDA devices, gloo otherwise."""
    timeout = datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_SECONDS)
    options: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("run", store),
        rank=info.rank,
        world_size=info.world,
        timeout=timeout,
        **options,
    )


def stop_process_group() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def groups_end_within() -> Iterator[None]:
    """All process groups that are made within are destroyed at its end, for processes that build one engine after the
    other. Collective over all ranks; after an error the groups stay, for the ranks then end.

    Nothing else ends them: torch and DeepSpeed keep each one for the life of the process. A pipeline makes seven; gloo
    has three threads for each, of which one wakes a hundred times a second: with 600 groups two thirds of two cores'
    time went there. ZeRO 3 also keeps each model, and its group with it, in two places.
    """
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
    from deepspeed.utils import groups as kept

    registered = distributed_c10d._world.pg_map
    before = set(registered)
    yield
    dist.barrier()  # none closes a connection that another rank still reads
    for group in set(registered) - before:
        dist.destroy_process_group(group)
        kept._release_process_group_references(group)
        del group
    FWD_MODULE_STACK.clear()  # it pushes a model once more than it pops it
    release = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(release).nonlocals["func"].cache_clear()  # from the second update on, by coordinator
    gc.collect()  # their threads end with the objects, which stand in cycles


def share_rows(ranks: int, grid: RankGrid | None) -> tuple[SequenceShare, int, Any]:
    """Ranks that compute rows together (Ulysses, arXiv 2309.14509).

    Args:
        ranks: that share each row.
        grid: its stages are the parts of a row; None: ranks in their order.

    Returns:
        this rank's share of its rows; which of the groups of ranks, each with rows of its own, has them; that group.
    """
    from deepspeed.sequence.layer import DistributedAttention

    if grid is None:
        grid = rank_grid([Place(0, rank) for rank in range(dist.get_world_size())], ranks)
    part, copy = grid.coordinates()[dist.get_rank()]
    groups = [dist.new_group(list(row)) for row in zip(*grid.stages, strict=True)]  # all ranks make all of them
    across = DistributedAttention(attend, groups[copy], scatter_idx=2, gather_idx=1)  # heads, tokens
    return SequenceShare(part, ranks, across), copy, groups[copy]


class Control:
    """Control-plane collectives over all ranks, on a gloo group of its own."""

    def __init__(self) -> None:
        timeout = datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_SECONDS)
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def all_gather_object(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def broadcast_object(self, value: T, src: int = 0) -> T:
        """Rank `src`'s value, on every rank."""
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=src, group=self._group)
        result: T = box[0]
        return result

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier(group=self._group)

    def sum_integers(self, values: Sequence[int]) -> list[int]:
        """Sums over ranks, modulo 2^64; each value in [0, 2^64)."""
        signed = [value - 2**64 if value >= 2**63 else value for value in values]
        tensor = torch.tensor(signed, dtype=torch.int64)
        dist.all_reduce(tensor, group=self._group)
        return [value % 2**64 for value in tensor.tolist()]

    def sum_floats(self, values: Sequence[float]) -> list[float]:
        """Sums over ranks in float64; the same bits on every rank."""
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self._group)
        result: list[float] = tensor.tolist()
        return result
