"""What the network between the machines of a run carries: from one to another, and in an all-reduce over all ranks."""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

ALL_PAIRS_NODES = 16
"""Up to so many machines each pair is measured; beyond, each machine is with at most log2(machines) others."""
PAIR_TIMEOUT_SECONDS = 60.0
REPEATS = 3
CUDA_BYTES = 64 << 20
"""Long enough for NCCL to reach most of a link's bandwidth, about 10 ms at 100 Gbit/s."""
CPU_BYTES = 4 << 20


def rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """Pairs of machines, in rounds in which each machine is in one pair at most.

    Round k pairs i with i XOR k: over all k below the next power of two, each pair comes once (the schedule of a
    round-robin tournament). Beyond ALL_PAIRS_NODES machines only the k that are powers of two: a hypercube.
    """
    limit = 1 << max(0, nodes - 1).bit_length()
    masks = range(1, limit) if nodes <= ALL_PAIRS_NODES else [1 << bit for bit in range(limit.bit_length() - 1)]
    return [[(node, node ^ mask) for node in range(nodes) if node < node ^ mask < nodes] for mask in masks]


def measure_pair(peer: int, device: torch.device) -> float:
    """Bytes a second, each way, that this rank and another one exchange; both of them, and only they, call it.

    The figure compares with the bus bandwidth of an all-reduce in the NCCL tests: between two ranks that moves the
    tensor once each way. It is sent in the group of all: NCCL makes a group for two by splitting the one of all ranks,
    for which it waits for every one of them. `measure_all` comes first, for then all are connected.

    Raises:
        RuntimeError: the other one did not come, or the connection broke.
    """
    size = CUDA_BYTES if device.type == "cuda" else CPU_BYTES
    mine = torch.full((size // 4,), float(dist.get_rank()), dtype=torch.float32, device=device)
    theirs = torch.empty_like(mine)

    def exchange() -> None:
        sending, receiving = dist.P2POp(dist.isend, mine, peer), dist.P2POp(dist.irecv, theirs, peer)
        for request in dist.batch_isend_irecv([sending, receiving]):
            request.wait(datetime.timedelta(seconds=PAIR_TIMEOUT_SECONDS))

    seconds = _median_seconds(exchange, device)
    if not bool((theirs == float(peer)).all()):
        raise RuntimeError(f"rank {peer} sent {float(peer):g}, and {theirs.min():g} to {theirs.max():g} came")
    return size / seconds


def measure_all(device: torch.device) -> float:
    """Bus bandwidth of an all-reduce over all ranks (bytes a second), which all of them call."""
    world = dist.get_world_size()
    size = CUDA_BYTES if device.type == "cuda" else CPU_BYTES
    data = torch.empty(size // 4, dtype=torch.float32, device=device)

    def reduce() -> None:
        data.fill_(1.0)
        dist.all_reduce(data)

    seconds = _median_seconds(reduce, device)
    if not bool((data == float(world)).all()):
        raise RuntimeError(f"an all-reduce of ones over {world} ranks gave {data.min():g} to {data.max():g}")
    return size / seconds * 2 * (world - 1) / world


def _median_seconds(work: Callable[[], None], device: torch.device) -> float:
    seconds = []
    for _ in range(1 + REPEATS):  # the first one opens connections
        started = time.monotonic()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.monotonic() - started)
    return statistics.median(seconds[1:])
