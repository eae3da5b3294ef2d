"""Whether torch.compile works on this machine: asked of torch itself, on one small function, before training starts."""

from __future__ import annotations

import torch


def compiler_problem(device: torch.device) -> str | None:
    """Why torch.compile cannot work for this device, or None where it does (a few seconds, once a cache).

    A compiler may be missing, Triton or the Python headers it builds against, or a writable cache: all show here, and
    none of them can be told from the outside.
    """
    if device.type == "cpu":
        # Asked by itself, since a kernel in the cache of an earlier run would let the probe pass without a compiler.
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except (InvalidCxxCompiler, OSError) as error:
            return f"no C++ compiler: {_one_line(error)}"
    try:
        compiled = torch.compile(_probe, dynamic=False)
        argument = torch.arange(64, dtype=torch.float32, device=device)
        if not torch.equal(compiled(argument), _probe(argument)):
            return "a compiled function gave another result than the plain one"
    except (RuntimeError, OSError) as error:  # what torch.compile's own errors derive from
        return f"{type(error).__name__}: {_one_line(error)}"
    finally:
        torch.compiler.reset()
    return None


def _probe(x: torch.Tensor) -> torch.Tensor:
    return (x * 2 + 1).sum()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
