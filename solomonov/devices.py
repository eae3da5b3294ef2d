"""What a device can do: from its data sheet, or measured here. Only estimates are made of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from solomonov.host import visible_gpus

GIB = 2**30
CPU = "cpu"
HOST_USABLE = 0.7
"""Share of a machine's memory that offload may take: the rest is for processes, data workers and the page cache."""
PCIE_5 = 50e9
"""What large copies reach of PCIe 5.0 x16 (64e9), bytes a second in one direction."""


@dataclass(frozen=True)
class Device:
    """One device, and what lies between it and others."""

    name: str
    memory_bytes: int
    bf16_flops: float
    """Dense products a second in bf16, in operations."""
    fp32_flops: float
    """The same in fp32, without TF32."""
    link_bytes_per_second: float
    """To another device of its machine, one direction."""
    network_bytes_per_second: float
    """To another machine, for each device, one direction."""
    per_machine: int
    source: str = "data sheet"
    usable: float = 0.9
    """Share of the memory that may be planned with: the rest is for the allocator's gaps and for the libraries."""
    bus_bytes_per_second: float = 25e9
    """To and from its machine's memory, one direction: what large copies reach of PCIe 4.0 x16 (32e9), or of 5.0."""
    host_bytes: int | None = None
    """A rank's share of its machine's memory. None: not known, as of a device that is not here."""

    @property
    def usable_bytes(self) -> int:
        """The memory that may be planned with."""
        return int(self.memory_bytes * self.usable)

    @property
    def usable_host_bytes(self) -> int | None:
        """What of the machine's memory may be planned with."""
        return None if self.host_bytes is None else int(self.host_bytes * HOST_USABLE)


DEVICES = {
    device.name: device
    for device in (
        Device("a100", 79 * GIB, 312e12, 19.5e12, 300e9, 25e9, 8),
        Device("h100", 79 * GIB, 989e12, 67e12, 450e9, 50e9, 8, bus_bytes_per_second=PCIE_5),
        Device("h200", 140 * GIB, 989e12, 67e12, 450e9, 50e9, 8, bus_bytes_per_second=PCIE_5),
        Device("b200", 178 * GIB, 2250e12, 75e12, 900e9, 50e9, 8, bus_bytes_per_second=PCIE_5),
        Device("l40s", 44 * GIB, 362e12, 91.6e12, 32e9, 25e9, 8),
    )
}
"""NVIDIA's SXM parts (A100 and H100 with 80 GB) and the L40S, with a network port of 200 or 400 Gbit/s a device.
Memory is what is left of the nominal size once a process has its CUDA context."""

LOOPBACK_BYTES_PER_SECOND = 1e9
"""Between processes of one machine over gloo; of its order of magnitude."""

CORE_FLOPS = 5e10
"""Operations a second of one CPU core in fp32, of its order of magnitude. A layout is chosen by this one, and not by
what is measured, so that two attempts of a run choose alike."""

CPU_USABLE = 0.5
"""The C library keeps what ranks give back, for speed, and its gaps: a process had 1.7 times the tensors at most."""


def this_device(ranks: int) -> Device:
    """That of this machine, whose memory so many ranks share where it is the CPU's.

    Returns:
        a CUDA device as its driver describes it, with the speeds of the part in `DEVICES` whose name is in its name;
        else the CPU.
    """
    import psutil

    if visible_gpus():
        import torch

        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        known = next((d for d in DEVICES.values() if d.name in properties.name.lower()), DEVICES["a100"])
        return replace(
            known,
            host_bytes=psutil.virtual_memory().total // max(1, ranks),
            name=properties.name,
            memory_bytes=properties.total_memory,
            per_machine=torch.cuda.device_count(),
            source=f"speeds from the data sheet of the {known.name}",
        )
    memory = psutil.virtual_memory().total // max(1, ranks)
    # These CPUs have no bf16 products; emulated they take about three times as long.
    link = LOOPBACK_BYTES_PER_SECOND
    source, usable = "speeds by order of magnitude", CPU_USABLE
    return Device(CPU, memory, CORE_FLOPS / 3, CORE_FLOPS, link, link, ranks, source, usable)


def measured_speed(device: Device) -> Device:
    """The CPU with the speed of one core in a product of two 512 x 512 matrices of fp32, the best of five; another
    device unchanged."""
    if device.name != CPU:
        return device
    import torch

    threads, size = torch.get_num_threads(), 512
    torch.set_num_threads(1)
    try:
        left, right = torch.ones(size, size), torch.ones(size, size)
        best = float("inf")
        for _ in range(5):
            begun = time.perf_counter()
            left @ right
            best = min(best, time.perf_counter() - begun)
    finally:
        torch.set_num_threads(threads)
    flops = 2.0 * size**3 / best
    return replace(device, bf16_flops=flops / 3, fp32_flops=flops, source="speed measured now")
