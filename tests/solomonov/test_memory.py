"""What a process is seen to have had, and which errors mean that it was refused more."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from solomonov.footprint import Footprint
from solomonov.memory import describe, is_refusal, peak_bytes
from tests.support.processes import program_environment

MIB = 2**20
PROGRAM = """\
import torch
from solomonov.memory import PeakMemory
memory = PeakMemory(torch.device("cpu"))
before = memory.measured()
held = torch.ones(50 * 2**20)
del held
print(before, memory.measured())
"""


def test_what_was_there_and_is_gone_is_seen() -> None:
    """200 MiB, which the allocator gives back to the system at once."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=program_environment()
    )
    before, after = map(int, done.stdout.split())
    assert after - before + 32 * MIB >= 200 * MIB
    assert after <= 200 * MIB + 64 * MIB
    assert before < 64 * MIB


def test_a_process_has_had_what_it_has() -> None:
    assert peak_bytes(torch.device("cpu")) > 100 * MIB, "torch alone takes more"


def test_a_refused_allocation_is_known_and_nothing_else_is_taken_for_one() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_refusal(refused.value)
    with pytest.raises(MemoryError) as of_python:
        bytearray(2**60)
    assert is_refusal(of_python.value)
    assert is_refusal(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    with pytest.raises(RuntimeError) as other:
        torch.ones(2) @ torch.ones(3)
    assert not is_refusal(other.value)
    assert not is_refusal(ValueError("out of memory"))


def test_a_footprint_is_told_in_its_parts() -> None:
    footprint = Footprint("update", 2**30, 2**31, 3 * 2**30, 0, 2**29)
    expected = "6.5 GiB (weights 1, gradients 2, optimizer 3, activations 0.5; in the update)"
    assert describe(footprint) == expected
    assert describe(replace(footprint, host=3 * 2**30)) == expected.replace("update)", "update; 3 on the host)")
