"""Small states, their fragments in many layouts, and real faults, for the tests of the checkpoint container."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from solomonov.checkpoint import store
from solomonov.checkpoint.agreement import SingleProcess
from solomonov.checkpoint.checkpointer import Checkpointer
from solomonov.checkpoint.format import TensorId
from solomonov.checkpoint.fragments import Fragment
from solomonov.checkpoint.store import CheckpointInfo
from solomonov.checkpoint.writer import Header, commit, write_rank_file

State = dict[TensorId, torch.Tensor]
SHAPES = {"embed.weight": (13, 4), "layers.0.attn.q": (4, 4), "layers.0.norm": (4,), "scale": ()}
RUN = "run-1"
NOBODY = 65534


def make_state(seed: int, kinds: Sequence[str] = ("master", "exp_avg")) -> State:
    """Tensors of a small model: floats of two kinds and an integer buffer, drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {
        (name, kind): torch.randn(shape, generator=generator) for name, shape in SHAPES.items() for kind in kinds
    }
    state["steps", "buffer"] = torch.randint(0, 1000, (3,), generator=generator)
    return state


def shapes_of(state: Mapping[TensorId, torch.Tensor]) -> dict[TensorId, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def split(state: Mapping[TensorId, torch.Tensor], ranks: int) -> list[list[Fragment]]:
    """Each tensor cut in `ranks` nearly equal ranges, one for each rank; some are empty."""
    held: list[list[Fragment]] = [[] for _ in range(ranks)]
    for (name, kind), tensor in state.items():
        flat, numel = tensor.reshape(-1), tensor.numel()
        for rank in range(ranks):
            start, end = numel * rank // ranks, numel * (rank + 1) // ranks
            held[rank].append(Fragment(name, kind, tuple(tensor.shape), start, end, flat[start:end]))
    return held


def write(
    checkpoints: Path,
    step: int,
    *,
    seed: int | None = None,
    ranks: int = 2,
    attempt: int = 1,
    run_id: str = RUN,
    state: State | None = None,
) -> CheckpointInfo:
    """A checkpoint without a checkpointer: one file a rank, then the commit."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    tensors = make_state(step if seed is None else seed) if state is None else state
    tmp = checkpoints / store.temporary_name(step, attempt)
    tmp.mkdir()
    entries = [write_rank_file(tmp, rank, held) for rank, held in enumerate(split(tensors, ranks))]
    header = Header(run_id=run_id, step=step, attempt=attempt, scalars={"step": step}, state={"rows": step * 8})
    final = checkpoints / store.folder_name(step)
    return commit(tmp, final, entries=entries, expected=shapes_of(tensors), header=header)


class Run:
    """One attempt of a run that is alone, with the events that it gave."""

    def __init__(self, folder: Path, *, attempt: int = 1, keep_last: int = 3, run_id: str = RUN) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.folder = folder
        self.checkpointer = Checkpointer(
            folder,
            SingleProcess(),
            run_id=run_id,
            attempt=attempt,
            keep_last=keep_last,
            on_event=lambda name, fields: self.events.append((name, fields)),
        )

    def save(self, step: int, *, seed: int | None = None) -> CheckpointInfo | None:
        tensors = make_state(step if seed is None else seed)
        [held] = split(tensors, 1)
        return self.checkpointer.save(
            step,
            held,
            expected=shapes_of(tensors),
            scalars={"step": step},
            state={"rows": step * 8},
            topology={"ranks": 1},
        )

    def named(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.events if name == event]


def flip(path: Path, bit: int) -> None:
    """Invert one bit of a file in place."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


@contextlib.contextmanager
def small_disk(size: str) -> Iterator[Path]:
    """A real file system of the given size. Skips where mounting is not permitted."""
    with tempfile.TemporaryDirectory() as folder:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True, text=True
        )
        if mounted.returncode:
            pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def ordinary_user() -> Iterator[Path]:
    """A folder in which the block is what permissions were made for: not root (nobody, where the tests are root)."""
    with tempfile.TemporaryDirectory() as folder:
        root = os.geteuid() == 0
        if root:
            os.chown(folder, NOBODY, NOBODY)
            os.seteuid(NOBODY)
        try:
            yield Path(folder)
        finally:
            if root:
                os.seteuid(0)
