"""Devices by their data sheets, and that of this machine."""

from __future__ import annotations

from dataclasses import replace

import psutil
import pytest

from solomonov.devices import CPU, DEVICES, measured_speed, this_device


def test_data_sheets_are_in_one_unit_and_of_one_order() -> None:
    for name, device in DEVICES.items():
        assert device.name == name
        assert 40e9 < device.memory_bytes < 200e9
        assert 3 < device.bf16_flops / device.fp32_flops < 40, "tensor cores"
        assert device.link_bytes_per_second >= device.network_bytes_per_second
        assert device.bus_bytes_per_second <= 64e9, "PCIe 5.0 x16"
        assert device.usable_host_bytes is None, "it may be in any machine"


def test_offload_leaves_room_on_the_machine() -> None:
    assert replace(DEVICES["h100"], host_bytes=1000).usable_host_bytes == 700


def test_the_ranks_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("solomonov.devices.visible_gpus", lambda: 0)
    one, four = this_device(1), this_device(4)
    assert one.name == four.name == CPU
    assert one.memory_bytes == psutil.virtual_memory().total
    assert four.memory_bytes == one.memory_bytes // 4
    assert one == this_device(1), "two attempts see the same device"


def test_only_a_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("solomonov.devices.visible_gpus", lambda: 0)
    measured = measured_speed(this_device(1))
    assert 1e9 < measured.fp32_flops < 1e13, "a core of our days, in operations a second"
    assert measured.source == "speed measured now"
    assert measured_speed(DEVICES["h100"]) is DEVICES["h100"]
