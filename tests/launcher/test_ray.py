"""A private Ray and the look at a cluster, against real Rays: who gets in, what is left behind, what users are told."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import launcher.ray
from launcher.errors import LaunchConfigurationError
from launcher.ray import MARKER, PrivateRay, check_cluster, client_environment, require_ray
from launcher.ray_door import main
from tests.support.processes import Program, program_environment, wait_for

pytestmark = pytest.mark.ray

SECONDS = 120.0
REPOSITORY = Path(__file__).resolve().parents[2]

# What a process that joins does; the task starts a helper, which nobody ends but the Ray itself.
CLIENT = """
import json, os, signal, sys
import ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR", namespace="test")
signal.signal(signal.SIGTERM, lambda number, frame: os._exit(75))  # after it: Ray's Python sets one of its own
@ray.remote(num_cpus=0)
class Helped:
    def pids(self):
        import subprocess
        self.helper = subprocess.Popen(["sleep", "600"], start_new_session=True)
        return [os.getpid(), self.helper.pid]
helped = Helped.options(lifetime="detached", name="helped").remote()
pids = ray.get(helped.pids.remote())
from ray._common.usage.usage_lib import get_cluster_metadata
metadata = get_cluster_metadata(ray._raylet.GcsClient(address=sys.argv[1]))
print(json.dumps({"pids": pids, "metadata": metadata, "cpus": ray.cluster_resources()["CPU"]}), flush=True)
os.kill(os.getpid(), signal.SIGTERM)
"""

OTHER_VERSION = """
import json, sys
from ray._common.usage.usage_lib import get_cluster_metadata
from ray._raylet import GcsClient
client = GcsClient(address=sys.argv[1])
metadata = {**get_cluster_metadata(client), "ray_version": "1.13.0", "python_version": "3.9.1"}
client.internal_kv_put(b"CLUSTER_METADATA", json.dumps(metadata).encode(), True, b"cluster")
"""

OWNER = """
import os, sys
from launcher.ray import PrivateRay
with PrivateRay(1) as ray:
    print(os.path.dirname(ray.environment["RAY_AUTH_TOKEN_PATH"]), flush=True)
    while True:
        import signal
        signal.pause()
"""


def folder_of(ray: PrivateRay) -> Path:
    return Path(ray.environment["RAY_AUTH_TOKEN_PATH"]).parent


def token_of(ray: PrivateRay) -> str:
    return Path(ray.environment["RAY_AUTH_TOKEN_PATH"]).read_text()


def below(pid: int) -> list[psutil.Process]:
    """All processes that descend from one."""
    return psutil.Process(pid).children(recursive=True)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def run_client(script: str, ray: PrivateRay) -> tuple[int, str, str]:
    """A process that has the environment of a client."""
    done = subprocess.run(
        [sys.executable, "-c", script, ray.address],
        env={**os.environ, **ray.environment},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home folder of whoever starts the shared Ray."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def ray(home: Path) -> Iterator[PrivateRay]:
    """A Ray that tests share, started where the environment speaks of another cluster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
        patch.setenv("RAY_AUTH_TOKEN", "0" * 64)
        with PrivateRay(2) as started:
            yield started


@pytest.fixture(scope="module")
def other() -> Iterator[PrivateRay]:
    """A second Ray, at the same time."""
    with PrivateRay(1) as started:
        yield started


def test_who_has_the_environment_joins_and_keeps_its_sigterm(ray: PrivateRay, home: Path) -> None:
    assert check_cluster(ray.address, ray.environment).elsewhere is None
    code, out, err = run_client(CLIENT, ray)
    assert code == 75, err
    told = json.loads(out)
    assert told["cpus"] == 2.0
    assert told["metadata"].keys() == {"ray_version", "python_version", "ray_init_cluster"}, "no telemetry"
    assert ray.address.startswith("127.0.0.2:")
    assert ray.dashboard_url is None
    assert not list(home.iterdir()), "nothing is written to the home folder"


def test_nothing_reports_and_no_dashboard_listens(ray: PrivateRay) -> None:
    assert launcher.ray.client_environment()["RAY_USAGE_STATS_ENABLED"] == "0"
    servers = [p for p in below(os.getpid()) if any(str(folder_of(ray)) in word for word in p.cmdline())]
    assert {p.environ()["RAY_USAGE_STATS_ENABLED"] for p in servers} == {"0"}
    dashboards = [p for p in servers if any(word.endswith("dashboard.py") for word in p.cmdline())]
    listening = [c for p in dashboards for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    # Where the packages of the dashboard are installed, that process tells figures, whatever it is asked.
    for found in listening:
        with urllib.request.urlopen(f"http://127.0.0.1:{found.laddr.port}/api/jobs/", timeout=30) as answer:
            assert answer.read().startswith(b"# HELP ray_")


def test_the_token_is_for_its_owner_alone_and_stands_nowhere_else(ray: PrivateRay) -> None:
    folder, token = folder_of(ray), token_of(ray)
    assert len(bytes.fromhex(token)) == 32
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "token").stat().st_mode & 0o777 == 0o600
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 5, "this looks in the wrong place"
    assert [path for path in files if token.encode() in path.read_bytes()] == [folder / "token"]
    lines = [" ".join(process.cmdline()) for process in below(os.getpid())]
    assert not [line for line in lines if token in line]


def test_two_at_once_do_not_accept_each_others_token(ray: PrivateRay, other: PrivateRay) -> None:
    assert ray.address != other.address
    assert token_of(ray) != token_of(other)
    for there, here in ((ray, other), (other, ray)):
        with pytest.raises(LaunchConfigurationError, match="refuses our token") as caught:
            check_cluster(there.address, here.environment)
        assert token_of(here) not in str(caught.value)


def test_another_version_is_named(other: PrivateRay) -> None:
    code, _, err = run_client(OTHER_VERSION, other)
    assert code == 0, err
    with pytest.raises(LaunchConfigurationError, match="other versions") as caught:
        check_cluster(other.address, other.environment)
    assert "Ray 1.13.0 with Python 3.9.1 there" in caught.value.got
    assert f"with Python {sys.version.split()[0]} here" in caught.value.got
    assert "pip install ray==1.13.0" in caught.value.remedy


@pytest.mark.parametrize("content", [None, ""])
def test_a_token_file_without_a_token_is_named(ray: PrivateRay, tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
    with pytest.raises(LaunchConfigurationError, match="cannot be read") as caught:
        check_cluster(ray.address, {**ray.environment, "RAY_AUTH_TOKEN_PATH": str(path)})
    assert str(path) in caught.value.got
    assert caught.value.exit_code == 78


def test_no_token_at_all_is_refused(ray: PrivateRay, tmp_path: Path) -> None:
    with pytest.raises(LaunchConfigurationError, match="refuses our token"):
        check_cluster(ray.address, {"HOME": str(tmp_path)})
    assert not list(tmp_path.iterdir())


def test_nobody_listens() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        with pytest.raises(LaunchConfigurationError, match="can be reached") as caught:
            check_cluster(f"127.0.0.1:{holder.getsockname()[1]}", {})
    assert "refused" in caught.value.got
    with pytest.raises(LaunchConfigurationError, match="can be reached"):
        check_cluster("no-such-host.invalid:6379", {})


def test_who_listens_is_no_ray() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(LaunchConfigurationError, match="does not answer as the head") as caught,
    ):
        check_cluster(f"127.0.0.1:{server.getsockname()[1]}", {}, timeout_seconds=3.0)
    assert "no answer in 3 s" in caught.value.got


def test_another_port_of_a_ray_is_no_head(ray: PrivateRay) -> None:
    raylet = next(process for process in below(os.getpid()) if process.name() == "raylet")
    ports = [c.laddr.port for c in raylet.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    with pytest.raises(LaunchConfigurationError, match="does not answer as the head"):
        check_cluster(f"127.0.0.2:{ports[0]}", ray.environment, timeout_seconds=5.0)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("auto", "last"),
        ("ray://head:10001", "proxy"),
        ("http://head:8265", "://"),
        ("head", "host:port"),
        ("head:", "host:port"),
        (":6379", "host:port"),
        ("head:0", "host:port"),
        ("head:65536", "host:port"),
        ("head:6379/", "host:port"),
        ("a head:6379", "host:port"),
        ("user@head:6379", "host:port"),
        ("::1:6379", "host:port"),
        ("", "host:port"),
    ],
)
def test_a_malformed_address_is_refused(address: str, said: str) -> None:
    with pytest.raises(LaunchConfigurationError, match="not the address") as caught:
        check_cluster(address, {})
    assert repr(address) in caught.value.got
    assert said in str(caught.value)


def test_addresses_of_the_sixth_version_have_brackets() -> None:
    assert launcher.ray._host_and_port("[::1]:6379") == ("::1", 6379)
    assert launcher.ray._host_and_port("head-0.example:6379") == ("head-0.example", 6379)


@pytest.mark.parametrize("head_dies_first", [False, True])
def test_after_the_exit_no_process_and_no_folder_is_left(head_dies_first: bool) -> None:
    with PrivateRay(1) as ray:
        folder = folder_of(ray)
        code, out, err = run_client(CLIENT, ray)
        assert code == 75, err
        head = next(p for p in psutil.Process().children() if p.environ().get(MARKER) == str(folder))
        mine = [head, *below(head.pid)]
        assert {process.pid for process in mine} > set(json.loads(out)["pids"]), "its workers, and their helpers"
        if head_dies_first:
            os.kill(head.pid, signal.SIGKILL)
    assert not alive(mine)
    assert not folder.exists()
    assert (ray.address, ray.environment) == ("", {})


def test_a_parent_that_is_killed_leaves_no_process_and_the_next_start_removes_its_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OWNER]
    with Program(command, log=tmp_path / "log", cwd=REPOSITORY, env=program_environment()) as program:
        program.wait_for(lambda: program.output().endswith("\n"), deadline=SECONDS, what="the Ray is up")
        folder = Path(program.output().strip())
        mine = below(program.pid)
        assert len(mine) > 5
        os.kill(program.pid, signal.SIGKILL)
        # Sooner than its agents would leave by themselves, a minute after the head.
        wait_for(lambda: not alive(mine), deadline=45.0, what="no process is left")
    assert folder.is_dir()
    with pytest.raises(LaunchConfigurationError, match="cannot be started"), PrivateRay(1, object_store_bytes=1):
        pass  # the next start, the cheapest there is
    assert not folder.exists()


def test_an_interrupt_during_the_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    mine: list[psutil.Process] = []
    ray = PrivateRay(1)

    def interrupted(reader: int, seconds: float) -> str:
        assert ray._head is not None
        head = psutil.Process(ray._head.pid)
        wait_for(lambda: len(head.children()) > 2, deadline=SECONDS, what="it starts its servers")
        mine.extend([head, *below(head.pid)])
        raise KeyboardInterrupt

    monkeypatch.setattr(launcher.ray, "_answer", interrupted)
    with tempfile.TemporaryDirectory(prefix="m", dir="/tmp") as folder:  # a short one: sockets are put below it
        monkeypatch.setattr(tempfile, "tempdir", folder)
        with pytest.raises(KeyboardInterrupt), ray:
            pass
        assert not alive(mine)
        assert not list(Path(folder).iterdir())


def test_one_that_does_not_come_up_tells_the_last_of_its_log() -> None:
    ray = PrivateRay(1, object_store_bytes=1)
    with pytest.raises(LaunchConfigurationError, match="cannot be started") as caught:
        ray.__enter__()
    assert "it ended" in caught.value.got
    assert "object_store_memory" in caught.value.got or "object store" in caught.value.got
    assert (ray._scratch, ray._head) == (None, None)


def test_one_that_stays_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.ray, "START_SECONDS", 0.0)
    with pytest.raises(LaunchConfigurationError, match="no sign of life in 0 s"), PrivateRay(1):
        pass


def test_without_ray_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for refused in (require_ray, PrivateRay(1).__enter__, lambda: check_cluster("head:6379", {})):
        with pytest.raises(LaunchConfigurationError, match=r"pip install 'solomonov\[ray\]'"):
            refused()


def test_without_its_packages_the_dashboard_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "aiohttp" else find(name))
    with pytest.raises(LaunchConfigurationError, match="dashboard is not installed") as caught:
        PrivateRay(1, dashboard=True).__enter__()
    assert "aiohttp" in caught.value.got


def test_elsewhere_than_on_linux_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(LaunchConfigurationError, match="Linux only"):
        PrivateRay(1).__enter__()


def test_a_client_waits_longer_for_the_head_than_the_processes_of_the_ray(ray: PrivateRay) -> None:
    patience = "RAY_gcs_rpc_server_reconnect_timeout_s"
    assert ray.environment[patience] == client_environment()[patience] == "86400"
    head = next(p for p in psutil.Process().children() if p.environ().get(MARKER) == str(folder_of(ray)))
    assert patience not in head.environ()
    assert MARKER not in ray.environment


def test_the_processes_of_ours_are_called_in_one_way_only() -> None:
    assert main([]) == main(["1", "2", "unknown"]) == 2
