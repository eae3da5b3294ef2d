"""The launcher's door to Ray: a Ray of our own on this machine, and a look at one that others run.

Whatever imports Ray does so in a process of its own (`launcher.ray_door`): Ray's C++ ends a process that it does not
like, and takes signals over.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import secrets
import select
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from launcher.child import Child, ChildCommand, start_child
from launcher.errors import LaunchConfigurationError
from launcher.job import tail
from launcher.scratch import ScratchFolder, remove_stale_folders

HOST = "127.0.0.2"
"""Ray rewrites 127.0.0.1 to the address of a network card; this one stays on the machine."""
START_SECONDS = 60.0
END_SECONDS = 10.0
CONNECT_SECONDS = 3.0
PREFIX = "sol-ray-"
TEMPORARY = "t"
"""In our folder: Ray opens the one that it is given to everybody."""
MARKER = "SOLOMONOV_PRIVATE_RAY"
"""Environment variable that names the folder of a private Ray to all of its processes, and to no client of it."""

PASSED_ON = ("NCCL_", "GLOO_", "OMP_", "MKL_", "DS_", "TORCH", "PYTORCH_", "HF_", "PYTHONPATH", "MALLOC_")
"""Beginnings of the environment variables that a job, and each of its ranks, gets from who submits it."""

DASHBOARD_PACKAGES = ("aiohttp", "aiohttp_cors", "opencensus", "prometheus_client")

_MINE = "import sys; from launcher.ray_door import main; sys.exit(main(sys.argv[1:]))"
_NOT_FOR_THE_HEAD = ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")


def require_ray() -> None:
    """Check that Ray is installed, without importing it.

    Raises:
        LaunchConfigurationError: it is not.
    """
    if importlib.util.find_spec("ray") is None:
        raise LaunchConfigurationError(
            "Ray is not installed",
            got=f"no package `ray` for {sys.executable}",
            rule="what was asked for runs on Ray",
            remedy="pip install 'solomonov[ray]', or choose what needs no Ray",
        )


def client_environment() -> dict[str, str]:
    """What each process that joins a cluster needs in its environment before it imports Ray.

    No telemetry; SIGTERM stays ours (Ray's handler would end the process); and the loss of the head does not end
    the process after a minute: who joins decides by itself how long it waits.
    """
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "86400",
    }


def access_by(token: Path) -> dict[str, str]:
    """What a process needs in its environment to show a token.

    Empty counts as unset, and a token of the user's would win over the file.
    """
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_AUTH_TOKEN": ""}


def server_environment(token: Path) -> dict[str, str]:
    """What the processes of a private Ray itself are given.

    They should leave soon after the head, and so keep Ray's short patience.
    """
    found = client_environment() | access_by(token) | {MARKER: str(token.parent)}
    del found["RAY_gcs_rpc_server_reconnect_timeout_s"]
    return found


class PrivateRay:
    """A Ray of our own on this machine, as a context manager: when it is left, no process of it remains.

    It listens on this machine, wants the token that only its owner can read, and ends with the thread that entered
    it, also when that is killed. Linux only.

    Args:
        cpus: what its workers may reserve together.
        object_store_bytes: shared memory for what they hand over.
        dashboard: serve Ray's dashboard on 127.0.0.1.
        host: the address of this machine that it listens on; None: the one by which others reach it, so that it may
            get nodes on other machines (`launcher.slurm_ray`).
    """

    def __init__(
        self,
        cpus: int,
        object_store_bytes: int = 256 << 20,
        dashboard: bool = False,
        host: str | None = HOST,
    ) -> None:
        self._settings = {"cpus": cpus, "object_store_bytes": object_store_bytes, "dashboard": dashboard, "host": host}
        self._scratch: ScratchFolder | None = None
        self._head: Child | None = None
        self.address = ""
        """host:port to join at; empty before it is entered."""
        self.dashboard_url: str | None = None
        """None without a dashboard."""
        self.environment: dict[str, str] = {}
        """For processes that join: `client_environment`, and where the token is."""

    def __enter__(self) -> PrivateRay:
        """Start it, which takes some seconds.

        Raises:
            LaunchConfigurationError: no Linux, no Ray, no folder for it, or it does not come up.
        """
        require_ray()
        _require_linux()
        if self._settings["dashboard"]:
            _require_dashboard()
        complete = False
        try:
            self._start()
            complete = True
        finally:
            if not complete:
                self._end()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _start(self) -> None:
        remove_stale_folders(PREFIX)
        self._scratch = ScratchFolder(PREFIX)
        folder = self._scratch.path
        token = folder / "token"
        descriptor = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
        access = access_by(token)
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_THE_HEAD}
        environment |= server_environment(token)
        log = folder / "head.log"
        settings = json.dumps({**self._settings, "folder": str(folder / TEMPORARY)})
        self._head, reader = _start_ours(["head", settings], environment, log)
        with open(reader, "rb") as pipe:
            answer = _answer(pipe.fileno(), START_SECONDS)
        if not answer:
            raise LaunchConfigurationError(
                "a private Ray cannot be started on this machine",
                got="\n".join(["it ended" if answer == "" else f"no sign of life in {START_SECONDS:g} s", *tail(log)]),
                rule=f"memory for the object store and {self._settings['cpus']} workers, and a disk that is not full",
                remedy="see the lines above; or join a running cluster: launch.ray_address: host:port",
            )
        found = json.loads(answer)
        self.address, self.dashboard_url = found["address"], found["dashboard_url"]
        self.environment = client_environment() | access

    def _end(self) -> None:
        """End every process and remove the folder; whatever of it there is."""
        if self._scratch is None:
            return
        try:
            if self._head is not None:
                self._head.send_signal(signal.SIGTERM)
                select.select([self._head.exit_fd], [], [], END_SECONDS)
        finally:  # an impatient user is no reason to leave something
            others = _processes_of(self._scratch.path, self._head)
            if self._head is not None:
                self._head.reap()
            end_all(others)
            self._scratch.remove()
            self._scratch = self._head = None
            self.address, self.dashboard_url, self.environment = "", None, {}


@dataclass(frozen=True)
class ClusterFacts:
    """What a look at a Ray cluster found."""

    dashboard: str | None
    """Its http address; None if there is none."""
    elsewhere: str | None
    """Address of a live node that is on another machine than this process; None where all are on this one."""


def check_cluster(address: str, environment: Mapping[str, str], *, timeout_seconds: float = 15.0) -> ClusterFacts:
    """Check that there is a Ray cluster which a process of ours may join.

    Args:
        address: host:port of its head.
        environment: added to our own; names the token, where one is needed.
        timeout_seconds: for the answer of the cluster.

    Raises:
        LaunchConfigurationError: the address is malformed, nobody or something else answers, the token is refused
            or cannot be read, or the versions of Ray or Python differ.
    """
    require_ray()
    host, port = _host_and_port(address)
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise LaunchConfigurationError(
            f"no Ray cluster can be reached at {address}",
            got=f"{error.strerror or error}",
            rule="launch.ray_address is host:port of the head of a running cluster, reachable from this machine",
            remedy="start it (`ray start --head --port 6379`), mend the address, or leave launch.ray_address out "
            "for a private Ray",
        ) from error
    given = {**os.environ, **client_environment(), **environment}
    with tempfile.TemporaryDirectory(prefix="sol-check-") as folder:
        log = Path(folder, "check.log")
        child, reader = _start_ours(["check", address], given, log)
        try:
            with open(reader, "rb") as pipe:
                answer = _answer(pipe.fileno(), timeout_seconds)
        finally:
            child.reap()
        if not answer:
            raise _no_answer(address, given, timeout_seconds if answer is None else None, tail(log, lines=200))
    found = json.loads(answer)
    _judge(address, found)
    return ClusterFacts(found["dashboard"], found["elsewhere"])


# --- a private Ray -------------------------------------------------------------------------------------------------


def _require_linux() -> None:
    if sys.platform != "linux":
        raise LaunchConfigurationError(
            "a private Ray can be started on Linux only",
            got=f"sys.platform = {sys.platform!r}",
            rule=f"it needs the address {HOST} and processes that die with their parent",
            remedy="choose what needs no Ray, or join a running cluster: launch.ray_address: host:port",
        )


def _require_dashboard() -> None:
    missing = [name for name in DASHBOARD_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise LaunchConfigurationError(
            "Ray's dashboard is not installed",
            got=f"no package {', '.join(missing)} for {sys.executable}",
            rule="the dashboard needs more than Ray itself",
            remedy="pip install 'ray[default]', or do without the dashboard",
        )


def _start_ours(arguments: list[str], environment: Mapping[str, str], log: Path) -> tuple[Child, int]:
    """Start `main` with these arguments; the descriptor gives its answer, and its end."""
    reader, writer = os.pipe()
    try:
        command = [sys.executable, "-c", _MINE, str(writer), str(os.getpid()), *arguments]
        child = start_child(ChildCommand(command, environment, log, pass_fds=[writer]))
    except LaunchConfigurationError:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    return child, reader


def _answer(reader: int, seconds: float) -> str | None:
    """What the other end of a pipe says: one line; empty if it ended without; None if it is still silent."""
    if not select.select([reader], [], [], seconds)[0]:
        return None
    return os.read(reader, select.PIPE_BUF).decode("utf-8")


def _processes_of(folder: Path, head: Child | None) -> list[psutil.Process]:
    """All processes of a private Ray but its head.

    Those of the head's group (servers and agents) and those that inherited the marker (workers, in groups of their
    own, and what they start): the agents overwrite their environment, and the workers outlive their parents by
    seconds if the head was killed.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if head is not None and os.getpgid(process.pid) == head.pid:
                belongs = process.pid != head.pid
            else:
                belongs = process.environ().get(MARKER) == str(folder)
            if belongs:
                found.append(process)
    return found


def end_all(processes: list[psutil.Process]) -> None:
    """SIGKILL, and wait until they are gone; they are not our children, so that can only be looked at."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    deadline = time.monotonic() + END_SECONDS
    while any(_runs(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.01)


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


# --- a look at a cluster -------------------------------------------------------------------------------------------


def _host_and_port(address: str) -> tuple[str, int]:
    """The parts of an address."""
    reason = "host:port of the head of a running cluster"
    if address == "auto":
        reason += "; `auto` is whichever Ray was started last on this machine"
    elif "://" in address:
        reason += "; a Ray Client (ray://) sees the cluster through a proxy, and a rank must be a member of it"
    found = re.fullmatch(r"(?P<host>\[[0-9a-fA-F:.]+\]|[^\s:/@\[\]]+):(?P<port>[0-9]{1,5})", address)
    if found is None or not 0 < int(found["port"]) < 65536:
        raise LaunchConfigurationError(
            "this is not the address of a Ray cluster",
            got=f"{address!r}",
            rule=f"launch.ray_address is {reason}",
            remedy="name it as in 10.0.0.7:6379, or leave launch.ray_address out for a private Ray",
        )
    return found["host"].strip("[]"), int(found["port"])


def _no_answer(
    address: str, environment: Mapping[str, str], silent_seconds: float | None, log: list[str]
) -> LaunchConfigurationError:
    """The error for a check that said nothing: it was still waiting, or Ray's C++ aborted it."""
    if silent_seconds is None and any("authentication_token_loader" in line for line in log):
        return LaunchConfigurationError(
            f"the token for the Ray cluster at {address} cannot be read",
            got=f"RAY_AUTH_TOKEN_PATH={environment.get('RAY_AUTH_TOKEN_PATH', '')}",
            rule="with RAY_AUTH_MODE=token, a file that holds the token of the cluster, readable by this user",
            remedy="copy the token of the head there (on the head: ~/.ray/auth_token), or name the right file",
        )
    if silent_seconds is None:
        got = next((line for line in reversed(log) if line.strip()), "Ray ended the process that asked")
    else:
        got = f"a connection, and no answer in {silent_seconds:g} s"
    return LaunchConfigurationError(
        f"what listens at {address} does not answer as the head of a Ray cluster",
        got=got,
        rule="launch.ray_address is the port that `ray start --head --port` was given (6379 by default)",
        remedy="mend the port (8265 is the dashboard, 10001 the Ray Client), or leave launch.ray_address out for a "
        "private Ray",
    )


def _judge(address: str, answer: Mapping[str, object]) -> None:
    """Raise what the answer of a cluster says against joining it."""
    if answer["refused"]:
        raise LaunchConfigurationError(
            f"the Ray cluster at {address} refuses our token",
            got="a wrong token, or none",
            rule="the token that the head was started with",
            remedy="set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a copy of the head's ~/.ray/auth_token",
        )
    theirs, ours = answer["theirs"], answer["ours"]
    assert isinstance(theirs, dict), "it names versions"
    assert isinstance(ours, dict), "it names versions"
    if theirs != ours:
        raise LaunchConfigurationError(
            f"the Ray cluster at {address} runs other versions",
            got=f"Ray {theirs['ray']} with Python {theirs['python']} there, "
            f"Ray {ours['ray']} with Python {ours['python']} here",
            rule="a process joins with exactly the Ray and the Python of the cluster",
            remedy=f"pip install ray=={theirs['ray']} under Python {theirs['python']}, or change the cluster",
        )
