"""Facts about this machine and installation, for records and for `doctor`. Never secrets: an allow-list of names."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    "solomonov",
    "torch",
    "deepspeed",
    "ray",
    "webdataset",
    "tensorboard",
    "sentencepiece",
    "transformers",
    "tokenizers",
    "safetensors",
    "pydantic",
    "numpy",
    "triton",
)
"""Packages whose versions a run records."""

ENVIRONMENT_NAMES = (
    "CUDA_VISIBLE_DEVICES",
    "DS_ACCELERATOR",
    "MASTER_ADDR",
    "NCCL_DEBUG",
    "NCCL_SOCKET_IFNAME",
    "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "WORLD_SIZE",
)
"""Environment variables that a run records: they change speed or numbers, and none can hold a secret."""


def versions() -> dict[str, str | None]:
    """Installed versions of what numbers depend on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_facts() -> dict[str, Any]:
    """Commit of the source tree this runs from and whether it is changed; empty outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return {}
    commands = {"commit": ["rev-parse", "HEAD"], "changes": ["status", "--porcelain"]}
    facts: dict[str, Any] = {}
    for key, arguments in commands.items():
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            return {}
        facts[key] = done.stdout.strip()
    facts["changed"] = bool(facts.pop("changes"))
    return facts


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """The processor, as Linux tells it: name, family, model and stepping.

    The name alone is not enough: virtual machines give one name to processors that round differently.
    """
    facts: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    name = facts.get("model name") or platform.processor() or platform.machine()
    numbers = [("family", "cpu family"), ("model", "model"), ("stepping", "stepping")]
    return ", ".join([name, *(f"{short} {facts[key]}" for short, key in numbers if key in facts)])


def environment_facts() -> dict[str, Any]:
    """What the machine is, and the allow-listed part of the environment."""
    return {
        "platform": platform.platform(),
        "host": platform.node(),
        "cpu": cpu_model(),
        "usable_cores": usable_cores(),
        "executable": sys.executable,
        "environment": {name: os.environ[name] for name in ENVIRONMENT_NAMES if name in os.environ},
    }


def visible_gpus() -> int:
    """CUDA devices that this process may use, counted without importing torch."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = len([p for p in Path("/dev").glob("nvidia[0-9]*") if p.name.removeprefix("nvidia").isdigit()])
    if listed is None:
        return present
    return min(present, len([item for item in listed.split(",") if item.strip() and item.strip() != "-1"]))
