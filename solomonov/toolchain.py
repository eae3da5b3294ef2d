"""What torch.compile needs on this machine, asked before anything is compiled."""

from __future__ import annotations

import importlib.util

import torch


def compiler_missing(device: torch.device) -> str | None:
    """Why torch.compile cannot work for this device, or None where it can."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the triton package is not installed"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError) as error:
        return f"no C++ compiler: {' '.join(str(error).split())[:200]}"
    return None
