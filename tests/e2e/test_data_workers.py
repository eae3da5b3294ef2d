"""Data workers on a real Ray of several nodes: killed, frozen, lost with their node or with their service. Training is
never started again for it, and no digest changes.

Everything is asserted from the run's own journal and records; `prove_record` computes each digest anew from the order
function.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from solomonov.proof import prove_record
from solomonov.runfolder import RunFolder
from tests.support.events import read_scalars
from tests.support.processes import Program, assert_no_process, program_environment, wait_for
from tests.support.ray_cluster import RayCluster
from tests.support.sampling import sampler
from tests.support.user import User, unexpected

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.timeout(600)]

LONG = ("training.total_steps=100000", "checkpoint.every_steps=200", "evaluation.every_steps=0")
"""Until the test has seen enough: it then asks the run to save and leave."""
# A small window, so that the ranks go on asking for rows all the time.
SMALL = ("data.workers.window_bytes=32768",)


def on(cluster: RayCluster, workers: int, *words: str) -> tuple[str, ...]:
    """Words that train on that cluster."""
    return (
        "data.workers.backend=ray",
        f"data.workers.count={workers}",
        f"launch.ray_address={cluster.address}",
        *words,
    )


def living(user: User, name: str = "own") -> dict[int, dict[str, Any]]:
    """The newest life of each data worker, by number, of those that have begun and not died."""
    found: dict[int, dict[str, Any]] = {}
    for event in user.journal("data_worker_started", "data_worker_died", name=name):
        if event["event"] == "data_worker_started":
            found[event["worker"]] = event
        elif found.get(event["worker"], event)["worker_pid"] == event.get("worker_pid"):
            found.pop(event["worker"], None)
    return found


def begun(user: User, workers: int, name: str = "own") -> bool:
    """The run trains, and all its data workers live."""
    return (
        (user.run(name) / "journal.jsonl").exists() and len(living(user, name)) == workers and user.steps_done(name) > 0
    )


def further(user: User, program: Program, steps: int) -> None:
    """Waits until so many more steps are done."""
    target = user.steps_done() + steps
    program.wait_for(lambda: user.steps_done() >= target, deadline=120, what=f"step {target}")


def leave(program: Program) -> None:
    """The run saves and leaves."""
    program.send(signal.SIGTERM)
    assert program.wait(deadline=120) == 75, program.output()


def assert_exact(user: User, name: str = "own") -> None:
    """No row is lost or repeated, every digest is the order function's, and training was never started again."""
    proof = prove_record(RunFolder(user.run(name)))
    assert proof.holds, proof
    assert proof.steps > 0
    why = user.journal("hang", "rank_exited", "incident", name=name)
    assert len(user.journal("attempt_started", name=name)) == 1, f"training started again: {why}"


@pytest.mark.sampled(1)
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.measured
def test_the_records_are_those_of_inline(workers: int, user: User, undisturbed: User, ray_cluster: RayCluster) -> None:
    user.must("train", "own.yaml", *on(ray_cluster, workers), **ray_cluster.environment)
    assert user.metrics() == undisturbed.metrics(), "data_digest, loss, every column"
    assert not unexpected(user.journal())
    served = user.journal("data_served")
    assert {event["rank"] for event in served} == {0, 1}
    pids = {int(pid) for event in served for pid in event["rows_by_pid"]}
    assert len(pids) == workers, "each worker process served rows"
    assert sum(sum(event["rows_by_pid"].values()) for event in served) == 60 * 8
    assert not any(event["rows_inline"] or event["reissued"] for event in served)
    scalars = read_scalars(user.run() / "tensorboard")
    assert scalars["data/reissued_requests"] == scalars["data/workers_lost"] == dict.fromkeys(range(1, 61), 0.0)
    if workers > 1:
        nodes = {event["worker_node"] for event in user.journal("data_worker_started")}
        assert len(nodes) == 2, "spread over the nodes"
    assert_no_process("serve runs/own", user.folder)


@pytest.mark.sampled(3, group="data workers")
@pytest.mark.spare
def test_twenty_kills_of_data_workers(user: User, ray_cluster: RayCluster) -> None:
    draw = sampler("kills of data workers")
    words = on(ray_cluster, 3, *LONG, *SMALL)
    with user.command("train", "own.yaml", *words, **ray_cluster.environment) as program:
        program.wait_for(lambda: begun(user, 3), deadline=120, what="three workers")
        for number in range(20):
            victim = draw.choice(sorted(living(user).items()))[1]
            os.kill(victim["worker_pid"], signal.SIGKILL)
            program.wait_for(
                lambda n=number: len(user.journal("data_worker_died")) > n,
                deadline=180,
                what="the death is noticed",  # type: ignore[misc]
            )
            program.wait_for(lambda: living(user), deadline=180, what="a worker to kill")
            further(user, program, draw.randrange(1, 20))
        program.wait_for(lambda: len(living(user)) == 3, deadline=180, what="all workers are back")
        further(user, program, 20)
        leave(program)
    assert_exact(user)
    assert len(user.journal("data_worker_died")) == 20
    assert len(user.journal("data_worker_started")) == 23
    again = sum(event["requests"] for event in user.journal("data_reissued"))
    assert again, "no kill met a request"
    scalars = read_scalars(user.run() / "tensorboard")
    assert 0 < list(scalars["data/reissued_requests"].values())[-1] <= again, "in TensorBoard as in the journal"
    assert 0 < list(scalars["data/workers_lost"].values())[-1] <= 2 * 20, "two ranks, twenty deaths"
    assert not unexpected(user.journal(), "data_worker_died", "data_reissued")


@pytest.mark.sampled(3, group="data workers")
@pytest.mark.spare
def test_a_frozen_worker_and_a_killed_service(user: User, ray_cluster: RayCluster) -> None:
    words = on(ray_cluster, 2, *LONG, *SMALL)
    with user.command("train", "own.yaml", *words, **ray_cluster.environment) as program:
        program.wait_for(lambda: begun(user, 2), deadline=120, what="two workers")
        frozen = living(user)[sampler("freeze").randrange(2)]
        os.kill(frozen["worker_pid"], signal.SIGSTOP)
        program.wait_for(lambda: user.journal("data_worker_frozen"), deadline=180, what="it is noticed")
        program.wait_for(lambda: len(user.journal("data_worker_started")) == 3, deadline=180, what="its next life")
        wait_for(lambda: not psutil.pid_exists(frozen["worker_pid"]), deadline=30, what="the frozen one is gone")
        further(user, program, 20)

        service = user.journal("sidecar_started")[-1]["pid"]
        os.kill(service, signal.SIGKILL)
        program.wait_for(lambda: len(user.journal("data_service_started")) == 2, deadline=180, what="a new service")
        further(user, program, 50)
        leave(program)
    assert_exact(user)
    again = [event["cause"] for event in user.journal("data_reissued")]
    assert "frozen" in again
    causes = [event["cause"] for event in user.journal("data_worker_died")]
    assert causes, "the frozen one was ended"
    assert not any("did not reach it" in cause for cause in causes), "by a kill where it runs, not given up"
    assert [event["signal"] for event in user.journal("sidecar_exited")] == ["SIGKILL", None]
    injected = ("data_worker_frozen", "data_worker_died", "data_reissued", "sidecar_restart")
    assert not unexpected(user.journal(), *injected)


@pytest.mark.sampled(3, group="data workers")
@pytest.mark.spare
def test_a_node_is_lost_with_its_workers(user: User) -> None:
    with RayCluster((1, 1), first_host="127.0.0.12") as cluster:
        words = on(cluster, 2, *LONG, *SMALL)
        with user.command("train", "own.yaml", *words, **cluster.environment) as program:
            program.wait_for(lambda: begun(user, 2), deadline=120, what="two workers")
            lost = next(w for w in living(user).values() if cluster.processes(1)[0].pid in _ancestors(w["worker_pid"]))
            cluster.kill_node(1)
            further(user, program, 50)
            program.wait_for(lambda: user.journal("data_worker_died"), deadline=180, what="the loss is noticed")
            cluster.add_node(1)
            program.wait_for(lambda: len(user.journal("data_worker_started")) == 3, deadline=180, what="its next life")
            further(user, program, 50)
            leave(program)
        assert_exact(user)
        died = user.journal("data_worker_died")
        assert {event["worker_pid"] for event in died if "worker_pid" in event} == {lost["worker_pid"]}
        assert user.journal("data_worker_started")[-1]["worker_node"] not in {w["worker_node"] for w in (lost,)}
        assert not unexpected(user.journal(), "data_worker_died", "data_reissued")


def _ancestors(pid: int) -> set[int]:
    return {process.pid for process in psutil.Process(pid).parents()}


@pytest.mark.sampled(3, group="data workers")
@pytest.mark.spare
def test_a_worker_that_comes_back_blind_is_tried_again(user: User, ray_cluster: RayCluster) -> None:
    """Its next life does not find the data: it is refused, the other one goes on, and later there are two again."""
    data, aside = user.folder / "dataset", user.folder / "aside"
    with user.command("train", "own.yaml", *on(ray_cluster, 2, *LONG, *SMALL), **ray_cluster.environment) as program:
        program.wait_for(lambda: begun(user, 2), deadline=120, what="two workers")
        data.rename(aside)
        os.kill(living(user)[1]["worker_pid"], signal.SIGKILL)
        program.wait_for(lambda: user.journal("data_worker_refused"), deadline=180, what="it is refused")
        further(user, program, 20)
        aside.rename(data)
        program.wait_for(lambda: len(living(user)) == 2, deadline=180, what="two workers again")
        further(user, program, 20)
        leave(program)
    assert_exact(user)
    assert "no access to the shards" in user.journal("data_worker_refused")[0]["message"]
    injected = ("data_worker_died", "data_worker_refused", "data_reissued", "data_refused")
    assert not unexpected(user.journal(), *injected)


@pytest.mark.sampled(3, group="data workers")
@pytest.mark.spare
def test_two_runs_on_one_cluster_do_not_meet(user: User, ray_cluster: RayCluster) -> None:
    """Other seeds: rows of the one would be wrong for the other."""
    first = on(ray_cluster, 2, *LONG, *SMALL)
    second = on(ray_cluster, 2, *LONG, *SMALL, "run.name=other", "run.seed=6")
    with (
        user.command("train", "own.yaml", *first, **ray_cluster.environment) as one,
        user.command("train", "own.yaml", *second, **ray_cluster.environment) as other,
    ):
        one.wait_for(lambda: begun(user, 2), deadline=120, what="the first run's workers")
        other.wait_for(lambda: begun(user, 2, "other"), deadline=120, what="the second run's workers")
        for program in (one, other):
            program.send(signal.SIGTERM)
        for program in (one, other):
            assert program.wait(deadline=120) == 75, program.output()
    pids = {}
    for name in ("own", "other"):
        assert_exact(user, name)
        assert not unexpected(user.journal(name=name))
        workers = {event["worker_pid"] for event in user.journal("data_worker_started", name=name)}
        pids[name] = {int(pid) for event in user.journal("data_served", name=name) for pid in event["rows_by_pid"]}
        assert pids[name] <= workers, "only its own workers served it"
    assert not pids["own"] & pids["other"]


@pytest.mark.sampled(3, group="data workers")
@pytest.mark.spare
def test_without_workers_the_ranks_help_themselves(user: User, ray_cluster: RayCluster) -> None:
    """More CPUs than the cluster has: no worker ever starts; after its patience each rank builds its rows."""
    words = on(ray_cluster, 1, "data.workers.cpus=50", "data.workers.patience_seconds=2", "training.total_steps=10")
    user.must("train", "own.yaml", *words, **ray_cluster.environment)
    assert_exact(user)
    fallbacks = user.journal("fallback")
    assert {(event["rank"], event["to"]) for event in fallbacks} == {(0, "inline"), (1, "inline")}
    assert {event["rows_inline"] for event in user.journal("data_served")} == {40}
    assert not unexpected(user.journal(), "fallback")


def test_inline_training_needs_no_ray(user: User, tmp_path: Path) -> None:
    """A package of that name that cannot be imported stands in front of the real one."""
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").write_text("raise RuntimeError('Ray was imported')\n")
    user.must("train", "own.yaml", "training.total_steps=4", PYTHONPATH=str(tmp_path))
    words = ("data.workers.backend=ray", "run.name=other")
    code, output = user.solomonov("train", "own.yaml", *words, PYTHONPATH=str(tmp_path))
    assert code == 78
    assert "Ray was imported" in output, "the package does stand in front"


# --- bad input ---------------------------------------------------------------------------------------------


def refused(user: User, *words: str, **environment: str) -> str:
    """`train` refuses before any rank is started: one message of four parts."""
    code, output = user.solomonov("train", "own.yaml", *words, **environment)
    assert code == 78, output
    assert output.count("error: ") == 1, output
    assert all(f"  {part}:" in output for part in ("got", "rule", "remedy")), output
    assert "Traceback" not in output
    assert not user.journal("attempt_started"), "refused at the start, not after minutes"
    return output


def test_an_address_where_nobody_listens(user: User) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        words = ("data.workers.backend=ray", f"launch.ray_address={address}")
        assert address in refused(user, *words)


def test_a_token_that_is_refused(user: User, ray_cluster: RayCluster, tmp_path: Path) -> None:
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    environment = {**ray_cluster.environment, "RAY_AUTH_TOKEN_PATH": str(wrong)}
    output = refused(user, *on(ray_cluster, 1), **environment)
    assert "token" in output
    assert "0" * 64 not in output


@pytest.fixture
def blind_node(user: User) -> Iterator[RayCluster]:
    """A cluster whose only node with CPUs does not see the data folder: another file system hides it there."""
    folder = user.folder / "dataset"
    with RayCluster((), first_host="127.0.0.22") as cluster:
        start = f"mount -t tmpfs tmpfs '{folder}' && exec \"$0\" -m ray.scripts.scripts start --block "
        start += f"--address={cluster.address} --node-ip-address=127.0.0.23 --num-cpus=1 --object-store-memory=80000000"
        probe = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True, check=False)
        if probe.returncode:
            pytest.skip(f"no mount namespace can be made here: {probe.stderr}")
        with Program(
            ["unshare", "--mount", "sh", "-c", start, sys.executable],
            log=user.folder / "node.log",
            env=program_environment(**cluster.environment),
        ) as node:
            node.wait_for(lambda: "Ray runtime started" in node.output(), deadline=180, what="a node")
            yield cluster
            descendants = psutil.Process(node.pid).children(recursive=True)
            node.send(signal.SIGTERM)
            node.wait(deadline=180)
            psutil.wait_procs(descendants, timeout=30)


@pytest.mark.spare
def test_a_node_without_access_to_the_shards(user: User, blind_node: RayCluster) -> None:
    code, output = user.solomonov("train", "own.yaml", *on(blind_node, 1), **blind_node.environment)
    assert code == 78, output
    assert str(user.folder / "dataset") in output
    assert socket.gethostname() in output, "the node is named"
    assert "remedy:" in output
    assert len(user.journal("attempt_started")) == 1, "retrying would not help"
    assert user.steps_done() == 0
