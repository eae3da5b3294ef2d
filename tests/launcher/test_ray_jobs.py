"""What is refused before a job is handed to a Ray cluster; jobs on a real one are in tests/e2e."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from launcher import ray_jobs
from launcher.config import LaunchConfig
from launcher.errors import LaunchConfigurationError
from launcher.ray import ClusterFacts
from launcher.ray_jobs import RayLauncher, RayRequest

pytestmark = pytest.mark.ray
SHARED = "the run's folder is not on shared storage"
NO_JOBS = "the Ray cluster takes no jobs"


def refusal(folder: Path, **launch: object) -> LaunchConfigurationError:
    config = LaunchConfig.model_validate({"ray_address": "127.0.0.1:9", "nodes": 2, **launch})
    request = RayRequest("own-1", folder / "runs" / "own", folder / "runs" / "own" / "logs", config)
    with pytest.raises(LaunchConfigurationError) as caught:
        RayLauncher().check(request)
    assert caught.value.exit_code == 78
    return caught.value


def test_a_folder_in_memory_is_refused_before_the_cluster_is_asked() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        error = refusal(Path(folder))
        assert error.what == SHARED
        assert f"{folder}/runs/own is on tmpfs" in error.got
        for launch in ({"shared_folder": "yes"}, {"nodes": 1}):
            assert "no Ray cluster can be reached" in refusal(Path(folder), **launch).what


@pytest.mark.parametrize(
    ("elsewhere", "launch", "what"),
    [
        ("192.0.2.7", {}, SHARED),
        (None, {}, NO_JOBS),  # all of its nodes are on this machine
        ("192.0.2.7", {"nodes": 1}, NO_JOBS),
        ("192.0.2.7", {"shared_folder": "yes"}, NO_JOBS),
    ],
)
def test_a_disk_of_this_machine_is_refused_where_the_cluster_has_others(
    elsewhere: str | None, launch: dict[str, object], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cluster is asked once. It has no dashboard, which is looked at next."""
    asked = []

    def check_cluster(address: str, environment: dict[str, str]) -> ClusterFacts:
        asked.append(address)
        return ClusterFacts(None, elsewhere)

    monkeypatch.setattr(ray_jobs, "check_cluster", check_cluster)
    (tmp_path / "mountinfo").write_text(f"30 20 0:9999 / {tmp_path} rw - ext4 /dev/sdb1 rw\n")
    monkeypatch.setattr("launcher.shared_storage.MOUNTS", tmp_path / "mountinfo")
    error = refusal(tmp_path, **launch)
    assert error.what == what
    assert ("192.0.2.7 is another one" in error.got) is (what == SHARED)
    assert asked == ["127.0.0.1:9"]
