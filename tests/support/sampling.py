"""Which cases of a large set a run of the suite tries: another sample for every state of the tree, the same one twice.

`SOLOMONOV_FULL=1` tries all of them.
"""

from __future__ import annotations

import functools
import os
import random
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import xxhash

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("launcher", "solomonov", "data_pipeline")
FULL = os.environ.get("SOLOMONOV_FULL", "") not in ("", "0")


def source_files() -> list[str]:
    """Paths of the packages' files, relative to the root: those that git tracks, or the Python files where
    there is no git or nothing is tracked."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z", "--", *PACKAGES], cwd=ROOT, capture_output=True, check=True)
        names = [name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]
    except (OSError, subprocess.CalledProcessError):
        names = []
    if not names:
        found = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
        names = [path.relative_to(ROOT).as_posix() for path in found]
    return sorted(names)


@functools.cache
def tree_seed() -> int:
    """A number that follows from the names and contents of the three packages' files."""
    hasher = xxhash.xxh3_64()
    for name in source_files():
        data = (ROOT / name).read_bytes()
        hasher.update(f"{name}\0{len(data)}\0".encode())
        hasher.update(data)
    return hasher.intdigest()


def sampler(purpose: str) -> random.Random:
    """A generator for one purpose, seeded by the tree."""
    return random.Random(f"{tree_seed()}/{purpose}")


def sample(cases: Sequence[T], count: int, purpose: str) -> list[T]:
    """`count` of the cases in their order (all of them where there are fewer, or under SOLOMONOV_FULL=1)."""
    if FULL or count >= len(cases):
        return list(cases)
    chosen = sorted(sampler(purpose).sample(range(len(cases)), count))
    return [cases[index] for index in chosen]
