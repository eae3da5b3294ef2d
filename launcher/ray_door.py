"""The launcher's processes that import Ray, and nothing else of it does: a private head, a look at a cluster, the
holder of a gang, and a client of Ray Jobs."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import platform
import select
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from launcher.child import tell_parents_end
from launcher.rank_env import RankEnvironment
from launcher.ray import END_SECONDS, PASSED_ON, end_all, server_environment
from launcher.ray_gang import REPORT_SECONDS, SECRET, RayRoom, no_room, run_agent
from launcher.scratch import lock_folder
from launcher.shared_storage import other_machine
from launcher.slurm_ray import host_address

STEADY_SECONDS = 10.0
"""Room for more ranks that has been there for so long will stay: a node that just came may go again."""
SETTLE_SECONDS = 3.0
"""What an attempt waits for more room, once there is room for its smallest world: what ended gives its place back."""
LISTENS_SECONDS = 2.0
"""What a node gets to take a connection."""
NOT_PASSED_ON = (SECRET, "OMP_NUM_THREADS")


def main(arguments: list[str]) -> int:
    """The processes that import Ray: `FD PARENT head SETTINGS` and `FD PARENT check ADDRESS` answer to that pipe."""
    match arguments:
        case [writer, parent, "head", settings]:
            return _head(int(writer), int(parent), **json.loads(settings))
        case [writer, _, "check", address]:
            return _check(int(writer), address)
    return 2


def _say(writer: int, **answer: object) -> None:
    """Answer, in one write."""
    os.write(writer, json.dumps(answer).encode("utf-8"))
    os.close(writer)


def _head(
    writer: int, parent: int, *, cpus: int, object_store_bytes: int, dashboard: bool, host: str | None, folder: str
) -> int:
    """The process that starts a private Ray, and ends it on SIGTERM or when its parent dies."""
    os.set_inheritable(writer, False)  # the parent sees our end by the end of the pipe
    with _left_by_sigterm():
        # Not SIGKILL: a head that is killed leaves its agents behind for a minute.
        if not tell_parents_end(parent, signal.SIGTERM):
            raise _Left
        import ray

        context = ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=dashboard,
            object_store_memory=object_store_bytes,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=folder,
            _node_ip_address=host,
        )
        signal.signal(signal.SIGTERM, _leave)  # Ray has put its own there
        url = f"http://{context.dashboard_url}" if context.dashboard_url else None
        _say(writer, address=context.address_info["gcs_address"], dashboard_url=url)
        while True:
            signal.pause()
    return 0


def node(address: str, folder: Path, cpus: float, object_store_bytes: int) -> int:
    """One more node of a private Ray, on this machine, until stdin ends; says `ready` when it has joined.

    Args:
        address: host:port of the head.
        folder: the head's, under the same name on each machine: with the token, whose first line is read from stdin.
        cpus: what its workers may reserve together.
    """
    token = folder / "token"
    said = sys.stdin.readline().strip()
    lock = None
    with contextlib.suppress(FileExistsError):  # on the head's machine
        folder.mkdir(mode=0o700)
        lock = lock_folder(folder)
        with open(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(said)
    os.environ |= server_environment(token)
    try:
        with _left_by_sigterm():
            from ray._private.node import Node
            from ray._private.parameter import RayParams
            from ray._private.services import get_node_ip_address

            joined = Node(
                RayParams(
                    gcs_address=address,
                    node_ip_address=host_address([address.rpartition(":")[0]]) or get_node_ip_address(address),
                    num_cpus=cpus,
                    num_gpus=0,
                    object_store_memory=object_store_bytes,
                    include_log_monitor=False,
                ),
                head=False,
                shutdown_at_exit=False,
                spawn_reaper=True,
            )
            signal.signal(signal.SIGTERM, _leave)
            print("ready", flush=True)
            while not select.select([sys.stdin], [], [], 1.0)[0]:
                if joined.dead_processes():
                    return 1
    finally:
        end_all(psutil.Process().children(recursive=True))
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


@contextlib.contextmanager
def _left_by_sigterm() -> Iterator[None]:
    """Until SIGTERM; then Ray is shut down, and what outlives that is killed.

    The agents would look for the head for another minute.
    """
    signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    except _Left:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        others = psutil.Process().children(recursive=True)
        import ray

        ray.shutdown()
        end_all(others)


class _Left(BaseException):
    """SIGTERM came: nothing that Ray does on the way may catch it."""


def _leave(number: int, frame: FrameType | None) -> None:
    signal.alarm(int(END_SECONDS) - 2)  # ends us, should Ray hang
    raise _Left


def _check(writer: int, address: str) -> int:
    """The process that asks a cluster who it is; Ray may abort it."""
    import ray
    from ray._common.usage.usage_lib import GcsClient, get_cluster_metadata
    from ray._private.ray_constants import DASHBOARD_ADDRESS, KV_NAMESPACE_DASHBOARD
    from ray.core.generated.gcs_pb2 import GcsNodeInfo
    from ray.exceptions import AuthenticationError

    try:
        metadata = get_cluster_metadata(GcsClient(address=address))
    except AuthenticationError:
        _say(writer, refused=True)
        return 0
    theirs = {"ray": metadata["ray_version"], "python": metadata["python_version"]}
    ours = {"ray": ray.__version__, "python": platform.python_version()}
    dashboard = GcsClient(address=address).internal_kv_get(DASHBOARD_ADDRESS.encode(), KV_NAMESPACE_DASHBOARD)
    found = f"http://{dashboard.decode()}" if dashboard else None
    nodes = GcsClient(address=address).get_all_node_info().values()
    other = other_machine(node.node_manager_address for node in nodes if node.state == GcsNodeInfo.ALIVE)
    _say(writer, refused=False, theirs=theirs, ours=ours, dashboard=found, elsewhere=other)
    return 0


# --- the holder of a gang --------------------------------------------------------------------------------------------


def hold(plan: Mapping[str, Any]) -> int:
    """Hold the workers of an attempt by Ray Train until their ranks have ended; tells the supervisor on stdout.

    Args:
        plan: of `RayGang`.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the supervisor decides what they mean
    room = RayRoom(**plan["room"])
    join(room.address)
    import ray

    world = _find_room(room)
    if world is None:
        error = no_room(room, _slots(room, asked=True))
        os.write(2, f"error: {error}\n".encode())
        # At the start it is a mistake; later, a node may come back.
        return error.exit_code if plan["attempt"] == plan["spec"]["first_attempt"] else 1
    _tell("world", world=world)
    over = threading.Event()
    watcher = threading.Thread(target=_watch_room, args=(room, world, over), name="room", daemon=True)
    watcher.start()
    supervisor = ray.util.get_node_ip_address()
    trainer = _trainer(plan, room, world, supervisor, os.environ[SECRET])
    sys.excepthook = sys.__excepthook__  # Ray's own asks the head before it lets a crash be known
    try:
        trainer.fit()
    finally:
        over.set()
    return 0


def join(address: str) -> None:
    """Become a driver of the cluster at host:port."""
    import ray

    host = address.rpartition(":")[0]
    try:
        own = host if ipaddress.ip_address(host).is_loopback else None
    except ValueError:
        own = None
    # Not in the main thread: there Ray takes SIGTERM for itself.
    thread = threading.Thread(
        target=lambda: ray.init(
            address=address, log_to_driver=False, logging_level="ERROR", _node_ip_address=own, namespace="solomonov"
        )
    )
    thread.start()
    thread.join()
    if not ray.is_initialized():
        raise SystemExit(1)


def _trainer(plan: Mapping[str, Any], room: RayRoom, world: int, supervisor: str, secret: str) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    passed_on = {
        name: value
        for name, value in os.environ.items()
        if name.startswith((*PASSED_ON, "SOLOMONOV_"))
        and name not in NOT_PASSED_ON
        and not name.endswith("VISIBLE_DEVICES")
    }
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(room.start_seconds)
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "1"
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = "60"
    os.environ["RAY_TRAIN_METRICS_ENABLED"] = "0"
    resources = {"CPU": room.cpus, **({"GPU": room.gpus} if room.gpus else {})}
    return DataParallelTrainer(
        stand_beside_a_rank,
        train_loop_config={"plan": dict(plan), "secret": secret, "supervisor": supervisor},
        scaling_config=ScalingConfig(
            num_workers=world, resources_per_worker=resources, use_gpu=bool(room.gpus), placement_strategy="PACK"
        ),
        run_config=RunConfig(
            name=f"attempt-{plan['attempt']}",
            storage_path=str(Path(plan["folder"]).absolute() / "ray-train"),
            # What follows a death, or workers that do not start in time, is the supervisor's to decide.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            worker_runtime_env={"env_vars": passed_on},
        ),
    )


def stand_beside_a_rank(config: Mapping[str, Any]) -> None:
    """The train function: one agent, to the end of its rank. A rank that fails does not take the others down here."""
    import ray
    from ray import train

    context = train.get_context()
    place = RankEnvironment(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        local_world_size=context.get_local_world_size(),
        group_rank=context.get_node_rank(),
        master_addr="",
        master_port=0,
    )
    run_agent(place, config["plan"], ray.util.get_node_ip_address(), config["secret"], config["supervisor"])


def _tell(kind: str, **fields: object) -> None:
    os.write(1, json.dumps({"kind": kind, **fields}).encode() + b"\n")


def _slots(room: RayRoom, *, asked: bool = False) -> int:
    """Ranks that could be started now, on nodes that live and stay.

    Args:
        asked: each node with room is asked whether it is there. Ray takes 14 s to know that one is lost, by its health
            checks; what is placed on that one until then waits for ever.
    """
    import ray
    from ray._private.state import available_resources_per_node

    staying = {node["NodeID"]: node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in _draining()}
    ranks: dict[str, int] = {}
    for node, free in available_resources_per_node().items():
        if node in staying:
            shares = [free.get("CPU", 0.0) / room.cpus] if room.cpus else []
            shares += [free.get("GPU", 0.0) / room.gpus] if room.gpus else []
            ranks[node] = int(min(shares, default=0.0) + 1e-9)
    having = [node for node, count in ranks.items() if count]
    if asked and having:
        addresses = [(staying[node]["NodeManagerAddress"], staying[node]["NodeManagerPort"]) for node in having]
        with ThreadPoolExecutor(min(32, len(having))) as pool:
            having = [node for node, there in zip(having, pool.map(_listens, addresses), strict=True) if there]
    return sum(ranks[node] for node in having)


def _listens(address: tuple[str, int]) -> bool:
    """Whether someone takes connections there."""
    try:
        socket.create_connection(address, LISTENS_SECONDS).close()
    except OSError:
        return False
    return True


def _draining() -> dict[str, int]:
    """Nodes that were told to leave."""
    from ray._private.state import state

    return dict(state.get_draining_nodes())


def _largest(room: RayRoom, slots: int) -> int | None:
    return max((world for world in room.worlds if world <= slots), default=None)


def _find_room(room: RayRoom) -> int | None:
    """The world size of this attempt; None where there is not even room for the smallest one."""
    # What nodes have free is not known at once where they have just joined.
    deadline = time.monotonic() + max(room.start_seconds, SETTLE_SECONDS)
    settled = None
    while True:
        now = time.monotonic()
        world = _largest(room, _slots(room, asked=True))
        if world == room.worlds[-1]:
            return world
        if world is not None:
            settled = settled or now + SETTLE_SECONDS
            if now >= settled:
                return world
        elif now >= deadline:
            return None
        time.sleep(0.2)


def _our_nodes() -> list[str]:
    """The node of each worker of this attempt: this driver has no other actors but those, and what controls them."""
    import ray
    from ray._private.state import state

    job = ray.get_runtime_context().job_id
    return [actor["Address"]["NodeID"] for actor in state.actor_table(None, job, "ALIVE").values()]


def _watch_room(room: RayRoom, world: int, over: threading.Event) -> None:
    """Tell when there has been room for more ranks for a while, and when a node of ours is about to leave."""
    since: float | None = None
    told = False
    while not over.wait(REPORT_SECONDS) and not told:
        leaving = set(_draining())
        ours = _our_nodes()
        leaving &= set(ours)
        # Before the workers are there, what they will take counts as free.
        larger = (_largest(room, world + _slots(room)) or world) if len(ours) >= world else world
        if leaving:
            _tell("resize", reason=f"{len(leaving)} Ray node(s) are about to leave")
            told = True
        elif larger > world:
            since = since or time.monotonic()
            if time.monotonic() - since >= STEADY_SECONDS:
                _tell("resize", reason=f"there is room for {larger} ranks instead of {world}")
                told = True
        else:
            since = None


# --- Ray Jobs --------------------------------------------------------------------------------------------------------


class JobsClient:
    """Ray Jobs of one cluster, over HTTP.

    Args:
        dashboard: http address of the cluster's dashboard.

    Raises:
        ConnectionError: it does not answer, or does not take this process's token.
    """

    def __init__(self, dashboard: str) -> None:
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        try:
            self._client = JobSubmissionClient(dashboard)
        except AuthenticationError as error:  # Ray reads how to authenticate once a process
            raise ConnectionError(str(error)) from error

    def submit(self, job: str, command: str, environment: Mapping[str, str]) -> None:
        """Start a command line (of a shell) on the head; RuntimeError where the cluster refuses."""
        self._client.submit_job(entrypoint=command, submission_id=job, runtime_env={"env_vars": dict(environment)})

    def status(self, job: str) -> tuple[str, int | None, str] | None:
        """State, exit code and message; None where the cluster does not know the job."""
        try:
            found = self._client.get_job_info(job)
        except RuntimeError as error:
            if "404" in str(error) or "does not exist" in str(error):
                return None
            raise
        return str(found.status.value), found.driver_exit_code, found.message or ""

    def stop(self, job: str) -> bool:
        """SIGTERM to its processes, SIGKILL after its grace."""
        return bool(self._client.stop_job(job))
