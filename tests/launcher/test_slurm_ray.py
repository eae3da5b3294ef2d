"""A node of a private Ray on another machine: here a process with a temporary folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.errors import LaunchConfigurationError
from launcher.ray import PrivateRay
from launcher.slurm_ray import SlurmRay, host_address
from launcher.slurm_step import Allocation
from tests.support.processes import ROOT, program_environment, run_program

pytestmark = pytest.mark.ray
HOSTS = ("127.0.0.21", "127.0.0.22")
NODES = """
import sys, ray
ray.init(address=sys.argv[1], _node_ip_address=sys.argv[2], logging_level="ERROR", log_to_driver=False)
print(sorted((node["NodeManagerAddress"], node["Resources"].get("CPU"), node["Alive"]) for node in ray.nodes()))
"""
# A machine of its own, as far as temporary files go; what it has there at the end is listed.
MACHINE = """
mount -t tmpfs none "$TEMPORARY" && "$@"
code=$?
find "$TEMPORARY" -mindepth 1 > "$LEFT"
exit $code
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short one, since sockets are put below it; and beside `tmp_path`, which is made first."""
    with tempfile.TemporaryDirectory(prefix="m", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_the_name_of_this_machine_may_be_on_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "127.0.0.21")
    assert host_address(["127.0.0.22", "127.0.0.23"]) == "127.0.0.21"
    assert host_address(["127.0.0.22", "192.0.2.8"]) is None, "only its own name is there: others do not reach that"
    assert host_address(["no-such-host.invalid"]) is None
    monkeypatch.setenv("SLURMD_NODENAME", "192.0.2.7")
    assert host_address(["127.0.0.22"]) is None, "Ray finds the address of a network card"
    monkeypatch.setenv("SLURMD_NODENAME", "no-such-host.invalid")
    assert host_address([]) is None


def test_a_node_on_another_machine_joins_and_leaves(temporary: Path, tmp_path: Path) -> None:
    """It brings the token along, which only its owner can read, and takes all away when it goes."""
    done = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("this user may not make a mount namespace")
    left = tmp_path / "left"
    with PrivateRay(1, host=HOSTS[0]) as ray:
        token = Path(ray.environment["RAY_AUTH_TOKEN_PATH"])
        assert token.is_relative_to(temporary)
        node = [sys.executable, "-m", "launcher", "ray-node", ray.address, str(token.parent), "2", str(128 << 20)]
        command = ["unshare", "--mount", "sh", "-c", MACHINE, "sh", *node]
        environment = program_environment(SLURMD_NODENAME=HOSTS[1], LEFT=str(left), TEMPORARY=str(temporary))
        with (
            (tmp_path / "log").open("wb") as log,
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, cwd=ROOT
            ) as process,
        ):
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(token.read_bytes() + b"\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"ready\n", (tmp_path / "log").read_text()
            copy = Path(f"/proc/{_python_of(process.pid)}/root") / token.relative_to("/")
            assert copy.read_bytes() == token.read_bytes()
            assert copy.stat().st_ino != token.stat().st_ino
            assert (copy.stat().st_mode & 0o777, copy.parent.stat().st_mode & 0o777) == (0o600, 0o700)
            argv = [sys.executable, "-c", NODES, ray.address, HOSTS[0]]
            code, output = run_program(argv, log=tmp_path / "nodes", deadline=60, env={**os.environ, **ray.environment})
            assert (code, output) == (0, f"[('{HOSTS[0]}', 1.0, True), ('{HOSTS[1]}', 2.0, True)]\n")
            process.stdin.close()
            assert process.wait(60) == 0, (tmp_path / "log").read_text()
    assert left.read_text() == "", "nothing stays in the machine's temporary folder"


def _python_of(pid: int) -> int:
    """The node's process below its shell."""
    import psutil

    return next(p.pid for p in psutil.Process(pid).children(recursive=True) if "ray-node" in p.cmdline())


def test_nodes_that_do_not_come_are_a_clear_refusal(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """srun is one that fails, as where the step cannot be placed."""
    (tmp_path / "srun").write_text("#!/bin/sh\necho srun: error: Unable to create step >&2\nexit 1\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURMD_NODENAME", HOSTS[0])
    allocation = Allocation("7", 0, 3, "node[1-3]")
    with (
        pytest.raises(LaunchConfigurationError, match="does not get its nodes") as caught,
        SlurmRay(allocation, 1, tmp_path / "nodes.log"),
    ):
        pass
    assert caught.value.got.splitlines() == [
        "0 of 2 came within 120 s",
        "srun: error: Unable to create step",
    ]
    assert not list(temporary.iterdir())
