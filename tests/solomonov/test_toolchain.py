"""The answer about the compiler against the PATH that a fresh process is given: with a compiler, and without any."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch

from solomonov.toolchain import compiler_problem
from tests.support.processes import ROOT, program_environment, run_program

CODE = "import torch; from solomonov.toolchain import compiler_problem; print(compiler_problem(torch.device('cpu')))"


def answer_with_path(path: str, folder: Path) -> str:
    environment = program_environment(PATH=path)
    environment.pop("CXX", None)
    argv = [sys.executable, "-c", CODE]
    code, output = run_program(argv, log=folder / "log.txt", deadline=120, cwd=ROOT, env=environment)
    assert code == 0, output
    return output.strip()


@pytest.mark.e2e
def test_without_a_compiler_the_reason_is_said_on_one_line(tmp_path: Path) -> None:
    answer = answer_with_path(str(tmp_path), tmp_path)
    assert answer.startswith("no C++ compiler: ")
    assert "\n" not in answer


def test_a_compiler_on_the_path_is_found() -> None:
    assert shutil.which("g++"), "these tests run where g++ is installed"
    assert compiler_problem(torch.device("cpu")) is None
