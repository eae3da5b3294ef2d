"""What is found on this machine against the system's own figures, and the verdict where something is missing."""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from solomonov import doctor
from solomonov.doctor import Finding, examine
from tests.solomonov.checkpoint.common import ordinary_user, small_disk
from tests.support.processes import program_environment


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    return {finding.name: finding for finding in examine()}


def test_all_is_looked_at_and_every_complaint_has_a_remedy(findings: dict[str, Finding]) -> None:
    expected = {"python", "ray", "processor", "gpu", "c++ compiler", "memory", "disk", "shared memory"}
    assert findings.keys() == expected | {"open files", "loopback"} | set(doctor.REQUIRED)
    for finding in findings.values():
        assert finding.verdict in ("ok", "note", "missing")
        assert finding.value
        if finding.verdict == "ok":
            assert not finding.remedy
        elif finding.name != "gpu":  # to have none is no fault
            assert finding.remedy, finding.name
    assert not [finding for finding in findings.values() if finding.verdict == "missing"], "the tests run here"


def test_figures_are_the_system_s(findings: dict[str, Finding]) -> None:
    assert findings["python"].value == ".".join(map(str, sys.version_info[:3]))
    assert findings["torch"].value == importlib.metadata.version("torch")
    assert findings["c++ compiler"].value == (shutil.which(os.environ.get("CXX", "g++")) or "none")
    kib = {line.split(":")[0]: int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines()}
    assert f"of {kib['MemTotal'] / 2**20:.1f} GiB" in findings["memory"].value
    assert f"{len(os.sched_getaffinity(0))} usable cores" in findings["processor"].value
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert findings["open files"].value == f"{soft} (hard limit {hard})"
    assert findings["loopback"].verdict == "ok"


def test_a_package_that_is_missing_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", ("torch", "no-such-package-of-ours"))
    torch_finding, missing, _ = doctor._packages()
    assert torch_finding.verdict == "ok"
    assert missing == Finding(
        "no-such-package-of-ours", "not installed", "missing", "pip install no-such-package-of-ours"
    )


def test_without_torch_only_the_processor_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert [finding.name for finding in doctor._devices()] == ["processor"]


def test_a_gpu_that_torch_does_not_see_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver with a CPU build of torch."""
    monkeypatch.setattr(doctor, "visible_gpus", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    gpu = doctor._devices()[1]
    assert gpu.value.startswith("2 present, but torch")
    assert "CUDA build of torch" in gpu.remedy


def test_without_a_compiler_it_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert doctor._compiler().verdict == "note"
    (tmp_path / "clang++").touch(mode=0o755)
    assert doctor._compiler() == Finding("c++ compiler", str(tmp_path / "clang++"), "ok")


def test_a_small_disk_and_one_that_is_not_ours_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk("1m") as disk:
        finding = doctor._disk(disk)
        assert (finding.verdict, finding.value) == ("note", f"0.0 GiB free in {disk}")
        assert "2 GiB free" in finding.remedy
    with ordinary_user() as folder:
        folder.chmod(0o500)
        # `os.access` asks for the real user, which is still root here.
        monkeypatch.setattr(os, "access", lambda path, mode: os.stat(path).st_mode & 0o200 != 0)
        assert doctor._disk(folder).value.endswith(", not writable")


def test_a_low_limit_of_open_files_is_noted() -> None:
    """In a process of its own, for which the limit is really low."""
    code = (
        "import resource; hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))\n"
        "from solomonov.doctor import _open_files; f = _open_files(); print(f.verdict, f.value, '|', f.remedy)"
    )
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, env=program_environment())
    assert done.stdout.startswith("note 512 (hard limit ")
    assert "| raise it: ulimit -n 4096" in done.stdout


@pytest.mark.gpu
def test_a_gpu_is_named_with_its_memory(findings: dict[str, Finding]) -> None:
    properties = torch.cuda.get_device_properties(0)
    assert findings["gpu"].verdict == "ok"
    assert f"{properties.name} {properties.total_memory / 2**30:.0f} GiB" in findings["gpu"].value
