"""The answer about the compiler against the PATH that it is given: with a compiler, and without any."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from solomonov.toolchain import compiler_missing

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _asked_anew() -> None:
    """torch remembers what it found."""
    from torch._inductor import cpp_builder

    for name in ("get_cpp_compiler", "check_compiler_exist_windows"):
        clear = getattr(getattr(cpp_builder, name), "cache_clear", None)
        if clear is not None:
            clear()


def test_a_compiler_on_the_path_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, shutil.which("g++") or shutil.which("clang++")))
    assert compiler_missing(CPU) is None


def test_without_one_the_reason_is_said_on_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "no-such-compiler"))
    reason = compiler_missing(CPU)
    assert reason is not None
    assert reason.startswith("no C++ compiler: ")
    assert "\n" not in reason


def test_cuda_needs_triton() -> None:
    """Here triton is what the installation has; asked only, nothing of CUDA is touched."""
    import importlib.util

    reason = compiler_missing(torch.device("cuda"))
    if importlib.util.find_spec("triton") is None:
        assert reason == "the triton package is not installed"
    else:
        assert reason is None or "C++" in reason
