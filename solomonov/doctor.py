"""What this machine has, and what is missing, with the remedy for each."""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from solomonov.host import cpu_model, usable_cores, versions, visible_gpus

REQUIRED = ("torch", "deepspeed", "webdataset", "tensorboard", "sentencepiece", "transformers", "safetensors")
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    value: str
    verdict: str
    """`ok`, `note` (works, but know it) or `missing` (training cannot work)."""
    remedy: str = ""


def examine() -> list[Finding]:
    """Look at Python, packages, devices, compiler, memory, disk, limits and network of this machine."""
    return [
        _python(),
        *_packages(),
        *_devices(),
        _compiler(),
        _memory(),
        _disk(Path.cwd()),
        _shared_memory(),
        _open_files(),
        _loopback(),
    ]


def _python() -> Finding:
    good = sys.version_info >= (3, 11)
    return Finding(
        "python", sys.version.split()[0], "ok" if good else "missing", "" if good else "install Python 3.11+"
    )


def _packages() -> list[Finding]:
    found = versions()
    findings = []
    for name in REQUIRED:
        version = found.get(name) or _version(name)
        remedy = "" if version else f"pip install {name}"
        findings.append(Finding(name, version or "not installed", "ok" if version else "missing", remedy))
    ray = found["ray"]
    note = "" if ray else "only needed for Ray data workers and Ray jobs; one machine trains without it"
    findings.append(Finding("ray", ray or "not installed", "ok" if ray else "note", note))
    return findings


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[Finding]:
    cores = Finding("processor", f"{cpu_model()}, {usable_cores()} usable cores", "ok")
    if _version("torch") is None:
        return [cores]
    import torch

    if not torch.cuda.is_available():
        listed = visible_gpus()
        if listed:
            remedy = "install a CUDA build of torch that fits the driver"
            return [
                cores,
                Finding("gpu", f"{listed} present, but torch {torch.__version__} sees none", "note", remedy),
            ]
        return [cores, Finding("gpu", "none: training runs on the CPU (gloo, fp32)", "note")]
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    shown = ", ".join(f"{p.name} {p.total_memory / GIB:.0f} GiB" for p in names)
    bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
    return [cores, Finding("gpu", f"{shown} (CUDA {torch.version.cuda}, {bf16})", "ok")]


def _compiler() -> Finding:
    names = [os.environ.get("CXX", ""), "g++", "clang++"]
    path = next((shutil.which(name) for name in names if name and shutil.which(name)), None)
    remedy = "" if path else "training runs without it, in eager mode; install g++ for torch.compile on CPU"
    return Finding("c++ compiler", path or "none", "ok" if path else "note", remedy)


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    enough = memory.available > 4 * GIB
    remedy = "" if enough else "the quickstart needs about 4 GiB for all its processes"
    text = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available"
    return Finding("memory", text, "ok" if enough else "note", remedy)


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    writable = os.access(folder, os.W_OK)
    enough = free > 2 * GIB
    remedy = "" if enough and writable else "work in a folder that is writable and has 2 GiB free"
    text = f"{free / GIB:.1f} GiB free in {folder}" + ("" if writable else ", not writable")
    return Finding("disk", text, "ok" if enough and writable else "note", remedy)


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("shared memory", "no /dev/shm", "note", "NCCL between processes of one machine needs it")
    free = shutil.disk_usage(folder).free
    remedy = "" if free > GIB // 4 else "NCCL wants more: start the container with a larger --shm-size"
    return Finding("shared memory", f"{free / GIB:.1f} GiB free in {folder}", "note" if remedy else "ok", remedy)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    remedy = "" if soft >= 1024 else "raise it: ulimit -n 4096"
    return Finding("open files", f"{soft} (hard limit {hard})", "note" if remedy else "ok", remedy)


def _loopback() -> Finding:
    """Ranks of one machine meet at 127.0.0.1."""
    with socket.socket() as listener, socket.socket() as caller:
        try:
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            caller.connect(listener.getsockname())
        except OSError as error:
            return Finding("loopback", str(error), "missing", "allow connections on 127.0.0.1")
    return Finding("loopback", f"reachable; temporary files in {tempfile.gettempdir()}", "ok")
