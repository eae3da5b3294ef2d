"""What the network between the machines of a run carries: all-reduces between pairs of them, and over all ranks."""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

ALL_PAIRS_NODES = 16
"""Up to so many machines each pair is measured; beyond, each machine is with log2(machines) others."""
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


def measure_pair(ranks: Sequence[int], device: torch.device) -> float:
    """Bytes a second of an all-reduce between two ranks; both of them, and only they, call it.

    For two ranks the bytes of the tensor over the time are the bus bandwidth, 2 (n - 1) / n times bytes over time, of
    the NCCL tests.

    Raises:
        RuntimeError: the other one did not come, or the connection broke.
    """
    timeout = datetime.timedelta(seconds=PAIR_TIMEOUT_SECONDS)
    group = dist.new_group(sorted(ranks), timeout=timeout, use_local_synchronization=True)
    try:
        return _all_reduce_rate(device, group)
    finally:
        dist.destroy_process_group(group)


def measure_all(device: torch.device) -> float:
    """Bus bandwidth of an all-reduce over all ranks (bytes a second), which all of them call."""
    world = dist.get_world_size()
    return _all_reduce_rate(device, None) * 2 * (world - 1) / world


def _all_reduce_rate(device: torch.device, group: dist.ProcessGroup | None) -> float:
    size = CUDA_BYTES if device.type == "cuda" else CPU_BYTES
    data = torch.ones(size // 4, dtype=torch.float32, device=device)
    seconds = []
    for _ in range(1 + REPEATS):  # the first one opens connections
        data.fill_(1.0)
        started = time.monotonic()
        dist.all_reduce(data, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.monotonic() - started)
    expected = float(dist.get_world_size(group))
    if not bool((data == expected).all()):
        raise RuntimeError(f"an all-reduce of ones over {expected:g} ranks gave {data.min():g} to {data.max():g}")
    return size / statistics.median(seconds[1:])
