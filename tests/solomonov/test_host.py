"""Facts about machine and installation against the system's own tools; and that nothing secret is among them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from solomonov import host
from tests.support.processes import program_environment
from tests.support.source_tree import ROOT


def test_versions_are_those_of_the_imported_packages() -> None:
    import numpy
    import pydantic

    found = host.versions()
    assert found["torch"] in (torch.__version__, torch.__version__.partition("+")[0]), "some wheels leave the build out"
    assert found["numpy"] == numpy.__version__
    assert found["pydantic"] == pydantic.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(found) == {"python", *host.PACKAGES}


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "PACKAGES", ("no-such-package-of-ours",))
    assert host.versions()["no-such-package-of-ours"] is None


def git(*words: str) -> str:
    return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True).stdout.strip()


def test_git_facts_are_those_of_git() -> None:
    if not (ROOT / ".git").exists():
        assert host.git_facts() == {}
        return
    facts = host.git_facts()
    assert facts["commit"] == git("rev-parse", "HEAD")
    assert facts["changed"] == bool(git("status", "--porcelain"))
    assert set(facts) == {"commit", "changed"}, "no file names and no diff are recorded"


def test_outside_a_checkout_there_are_no_git_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "__file__", str(tmp_path / "solomonov" / "host.py"))
    assert host.git_facts() == {}
    (tmp_path / ".git").mkdir()  # a checkout that git cannot read
    assert host.git_facts() == {}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert host.git_facts() == {}


def test_usable_cores_follow_the_affinity_of_the_process() -> None:
    one = min(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, [{one}]); from solomonov.host import usable_cores; print(usable_cores())"
    )
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, env=program_environment())
    assert done.stdout.strip() == "1"
    assert host.usable_cores() == len(os.sched_getaffinity(0))


def test_facts_hold_the_allowed_variables_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("WORLD_SIZE", "5")
    monkeypatch.setenv("SOME_API_TOKEN", "a-secret-of-the-user")
    facts = host.environment_facts()
    assert facts["environment"]["OMP_NUM_THREADS"] == "1"
    assert facts["environment"]["WORLD_SIZE"] == "5"
    assert set(facts["environment"]) <= set(host.ENVIRONMENT_NAMES)
    assert "a-secret-of-the-user" not in json.dumps(facts)
    assert facts["host"] == os.uname().nodename
    assert facts["executable"] == sys.executable
    assert facts["cpu"] == host.cpu_model() != ""


def test_a_machine_without_proc_still_names_its_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "Path", lambda name: Path("/no/such/folder") / name.lstrip("/"))
    assert host.cpu_model()


@pytest.mark.parametrize(
    ("listed", "expected"), [(None, 3), ("", 0), ("-1", 0), ("0", 1), ("1, 2", 2), ("0,1,2,3,4", 3)], ids=str
)
def test_gpus_are_counted_as_cuda_would_see_them(
    listed: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three devices and the files that stand beside them in /dev."""
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm", "nvidia0x"):
        (tmp_path / name).touch()
    monkeypatch.setattr(host, "Path", lambda name: tmp_path if name == "/dev" else Path(name))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert host.visible_gpus() == expected


def test_gpus_are_counted_without_torch_as_torch_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if torch.version.cuda is not None:
        assert host.visible_gpus() == torch.cuda.device_count()
