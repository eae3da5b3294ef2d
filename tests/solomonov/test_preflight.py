"""The look at the machines of a run: the verdict by itself, and two ranks that take themselves for two machines."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from launcher.ports import free_port
from solomonov import exits
from solomonov import preflight as module
from solomonov.distributed import RankInfo
from solomonov.errors import ConfigurationError, SolomonovError
from solomonov.preflight import NodeFacts, RankFacts, Report, Sight, judge, judge_links
from solomonov.reach import Answer
from solomonov.runfolder import RunFolder
from solomonov.snapshot import PACKAGES
from tests.support.processes import ROOT, Program, program_environment
from tests.support.runs import begin_run
from tests.support.tiny_run import lines_of
from tests.support.user import User, unexpected

GOOD = Answer(None, 1e-4, 1e-5)


def facts(node: int, **changes: Any) -> NodeFacts:
    fields: dict[str, Any] = {
        "host": f"host{node}",
        "ranks": 2,
        "cores": 8,
        "versions": {"torch": "2.13.0", "ray": None},
        "code": "c0de",
        "free_bytes": 10**9,
        "address": {},
    }
    return NodeFacts(node, **{**fields, **changes})


def report(*changes: dict[str, Any], devices: tuple[str, ...] = ()) -> Report:
    """Three machines of two ranks each; a dict changes what one of them tells."""
    nodes = [facts(node, **(changes[node] if node < len(changes) else {})) for node in range(3)]
    ranks = [RankFacts(rank, rank // 2, devices[rank] if devices else "CPU") for rank in range(6)]
    sights = [Sight(node, {other: GOOD for other in range(3) if other != node}, None) for node in range(3)]
    return Report(nodes, ranks, sights, "gloo")


def judged(given: Report, checkpoint_bytes: int = 1000) -> Report:
    judge(given, checkpoint_bytes)
    return given


def test_equal_machines_are_good() -> None:
    found = judged(report())
    assert (found.problems, found.warnings, found.verdict) == ([], [], "good")


@pytest.mark.parametrize(
    ("node", "change", "said"),
    [
        (1, {"versions": {"torch": "2.12.0", "ray": None}}, "torch is 2.13.0 on host0, 2.12.0 on host1"),
        (2, {"versions": {"torch": "2.13.0", "ray": "2.60"}}, "ray is None on host0, 2.60 on host2"),
        (2, {"versions": {"torch": "2.13.0", "ray": None, "NCCL": "2.30"}}, "NCCL is None on host0, 2.30 on host2"),
        (1, {"code": "0dd"}, "host0 and host1 run different code (c0de, 0dd)"),
        (2, {"free_bytes": 999}, "0.0 GB are free in the run's folder, a checkpoint takes 0.0 GB"),
    ],
)
def test_a_machine_that_is_not_like_the_others(node: int, change: dict[str, Any], said: str) -> None:
    found = judged(report(*[{}] * node, change))
    assert found.problems == [said]
    assert found.verdict == f"these machines cannot train this run: {said}"


def test_a_rank_without_a_gpu_among_others() -> None:
    found = judged(report(devices=("H100", "H100", "H100", "CPU", "H100", "H100")))
    assert found.problems == ["rank 3 has no CUDA device, others have (host1)"]
    assert found.warnings == [], "said once"


def test_devices_of_different_kinds_are_said() -> None:
    found = judged(report(devices=("H100", "H100", "H100", "H100", "A100", "H100")))
    assert found.problems == []
    assert found.warnings == ["the ranks' devices differ: 5 x H100 (0 GiB), 1 x A100 (0 GiB)"]
    given = report()
    given.ranks = [RankFacts(rank, rank // 2, "H100", (94 if rank == 5 else 80) << 30) for rank in range(6)]
    assert judged(given).warnings == ["the ranks' devices differ: 5 x H100 (80 GiB), 1 x H100 (94 GiB)"]


def test_what_machines_see_of_each_other() -> None:
    given = report()
    given.sights[1] = Sight(1, {0: GOOD, 2: Answer("10.0.0.3:5: no answer")}, "the run's folder is not shared")
    assert judged(given).problems == [
        "host1: the run's folder is not shared",
        "host1 does not reach host2 (10.0.0.3:5: no answer)",
    ]


def test_a_clock_that_is_wrong_is_said_once_a_pair() -> None:
    given = report()
    given.sights[0] = Sight(0, {1: GOOD, 2: Answer(None, 1e-4, -3.0)}, None)
    given.sights[2] = Sight(2, {0: Answer(None, 1e-4, 3.0), 1: GOOD}, None)
    found = judged(given)
    assert (found.problems, found.warnings) == ([], ["the clocks of host0 and host2 are 3.0 s apart"])
    assert found.verdict == "good, but: the clocks of host0 and host2 are 3.0 s apart"
    assert "-3000.0 ms" in found.lines()[3]


@pytest.mark.parametrize(("free", "count"), [(2999, "2 checkpoints"), (1000, "1 checkpoint")])
def test_a_folder_that_is_nearly_full_is_said(free: int, count: str) -> None:
    found = judged(report({"free_bytes": free}))
    assert (found.problems, found.warnings) == ([], [f"the run's folder has room for {count} only"])
    assert not judged(report({"free_bytes": 3000})).warnings


def test_a_slow_link_is_named() -> None:
    given = report()
    given.links = {(0, 1): 20e9, (0, 2): 16e9, (1, 2): 3.9e9}
    judge_links(given)
    assert given.warnings == ["the link between host1 and host2 carries 3.90 GB/s, the median 16.00 GB/s"]
    assert "3.90 GB/s to 2" in given.lines()[2]
    assert "16.00 GB/s to 0" not in given.lines()[3], "the slowest of each"
    assert given.record()["slowest_links_bytes_per_second"] == {"1-2": 3.9e9, "0-2": 16e9, "0-1": 20e9}


def test_the_table_and_the_record_of_a_good_verdict() -> None:
    given = judged(report())
    assert len(given.lines()) == 5, "nothing was measured yet"
    given.all_reduce = 5e9
    rows = [line.split("  ") for line in given.lines()[1:4]]
    assert [[text.strip() for text in row if text] for row in rows] == [
        ["0", "host0", "0-1", "2 x CPU", "+0.0 ms", "1.0 GB"],
        ["1", "host1", "2-3", "2 x CPU", "+0.0 ms", "1.0 GB"],
        ["2", "host2", "4-5", "2 x CPU", "+0.0 ms", "1.0 GB"],
    ]
    assert given.lines()[4:] == ["all-reduce over 6 ranks (gloo): 5.00 GB/s bus bandwidth", "preflight: good"]
    given.links = {(0, other): other * 1e9 for other in range(20, 0, -1)}
    kept = given.record()["slowest_links_bytes_per_second"]
    assert kept == {f"0-{other}": other * 1e9 for other in range(1, 17)}, "the slowest ones of many"


def test_of_two_links_neither_is_the_odd_one() -> None:
    given = report()
    given.links = {(0, 1): 20e9, (1, 2): 1e9}
    judge_links(given)
    assert given.warnings == []


def test_ranks_that_do_not_come_are_named(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COLLECTIVE_TIMEOUT_SECONDS", 0.2)
    run, store = begin_run(user), HashStore()
    look = module.Preflight(run, RankInfo(0, 0, 3, 1), torch.device("cpu"), store)
    look._put("rank/1", {})
    with pytest.raises(SolomonovError, match="not all ranks of the run came") as caught:
        look._collect("rank", 3)
    assert caught.value.got == "nothing from rank/0, rank/2"


def alone(user: User, monkeypatch: pytest.MonkeyPatch) -> module.Preflight:
    """The look of the only rank of a run."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    return module.Preflight(begin_run(user), RankInfo(0, 0, 1, 1), torch.device("cpu"), HashStore())


def test_a_folder_that_cannot_be_written_is_told_as_such(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own file is not seen there either, but that is not the cause."""
    look = alone(user, monkeypatch)
    look._folder.touch()  # nothing can be made in a file
    with pytest.raises(ConfigurationError, match="these machines cannot train this run") as caught:
        look.exchange()
    assert "the run's folder cannot be written: " in caught.value.got
    assert str(look._folder) in caught.value.got
    assert "not shared" not in caught.value.got


@pytest.mark.parametrize("lacking", [1, 0])
def test_a_checkpoint_has_twelve_bytes_a_parameter(lacking: int, user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fp32 master and two moments: the folder of the run must have room for one."""
    look = alone(user, monkeypatch)
    free = 12 * look._run.resolved()["derived"]["parameters"] - lacking
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    if lacking:
        with pytest.raises(ConfigurationError, match="these machines cannot train this run"):
            look.exchange()
    else:
        look.exchange()
    assert look.report is not None
    assert [bool(look.report.problems), bool(look.report.warnings)] == [bool(lacking), not lacking]
    assert bool(look._run.journal.last("preflight")) is bool(lacking), "a good one is told after the measurement"
    assert not look._folder.exists()


class Gathered:
    """In place of the ranks' control group: answers what each of them would have given."""

    def __init__(self, answers: list[list[Any]]) -> None:
        self.answers = iter(answers)

    def all_gather_object(self, value: object) -> list[Any]:
        return next(self.answers)

    def barrier(self) -> None:
        pass


@pytest.mark.parametrize(("rank", "peers"), [(0, [2, 4]), (1, []), (2, [0, 4]), (3, []), (4, [0, 2]), (5, [])])
def test_first_ranks_measure_the_links(
    rank: int, peers: list[int], user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three machines of two ranks, as each of the ranks sees them; the link between two of them is slow."""
    measured = []

    def measure_pair(peer: int, device: torch.device) -> float:
        measured.append(peer)
        return 1.0

    monkeypatch.setattr(module, "measure_pair", measure_pair)
    monkeypatch.setattr(module, "measure_all", lambda device: 5e9)
    leaders = [(node, local == 0) for node in range(3) for local in range(2)]
    rates = [{(0, 1): 20e9, (0, 2): 16e9}, {}, {(0, 1): 20e9, (1, 2): 1e9}, {}, {(0, 2): 16e9, (1, 2): 1e9}, {}]
    look = module.Preflight(
        begin_run(user), RankInfo(rank, rank % 2, 6, 2, node=rank // 2), torch.device("cpu"), HashStore()
    )
    look.report = report() if rank == 0 else None
    look.measure(Gathered([leaders, rates]))  # type: ignore[arg-type]
    assert sorted(measured) == peers
    event = look._run.journal.last("preflight")
    assert (event is not None) is (rank == 0)
    if event is not None:
        assert event["all_reduce_bytes_per_second"] == 5e9
        assert event["slowest_links_bytes_per_second"] == {"1-2": 1e9, "0-2": 16e9, "0-1": 20e9}
        assert event["warnings"] == ["the link between host1 and host2 carries 1.00 GB/s, the median 16.00 GB/s"]


# --- real ranks ------------------------------------------------------------------------------------------------------


@contextmanager
def two_machines(user: User, second: dict[str, Any]) -> Iterator[tuple[RunFolder, list[Program]]]:
    """Two ranks of a run, each told that it is alone on its machine; `second` changes what the second one is given."""
    run = begin_run(user, "training.total_steps=2", "evaluation.every_steps=0", "schedule.warmup_steps=0", ranks=2)
    port = str(free_port())
    with ExitStack() as stack:
        programs = []
        for rank, given in ((0, {}), (1, second)):
            place = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
            place |= {"GROUP_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            place |= {"SOLOMONOV_NODE": f"machine-{rank}", "CUDA_VISIBLE_DEVICES": ""}
            environment = program_environment(**place)
            environment["PYTHONPATH"] = f"{given.get('packages', ROOT)}:{environment['PYTHONPATH']}"
            argv = [sys.executable, "-m", "solomonov.rank", given.get("run", run.path)]
            log = user.folder / f"rank-{rank}.txt"
            programs.append(stack.enter_context(Program(argv, log=log, cwd=user.folder, env=environment)))
        yield run, programs


def refused(run: RunFolder, programs: list[Program]) -> str:
    """Both ranks end with 78 before the first step; the one problem of the journal."""
    for program in programs:
        assert program.wait(deadline=180) == exits.CONFIGURATION, program.output()
        assert "these machines cannot train this run" in program.output()
    assert not run.metrics.exists() or not lines_of(run)
    event = run.journal.last("preflight")
    assert event is not None
    (problem,) = event["problems"]
    assert f"problem: {problem}" in programs[0].output()
    assert not (run.path / "preflight").exists()
    return str(problem)


@pytest.mark.e2e
def test_two_machines_are_looked_at_and_train(user: User) -> None:
    with two_machines(user, {}) as (run, programs):
        for program in programs:
            assert program.wait(deadline=240) == exits.DONE, program.output()
        output = programs[0].output()
    event = run.journal.last("preflight")
    assert event is not None
    assert (event["verdict"], event["ranks"], event["backend"]) == ("good", 2, "gloo")
    assert [node["host"] for node in event["nodes"]] == ["machine-0", "machine-1"]
    assert event["slowest_links_bytes_per_second"]["0-1"] > 0
    assert event["all_reduce_bytes_per_second"] > 0
    assert "preflight: good\n" in output
    assert "1     machine-1  1      1 x CPU" in output
    assert not (run.path / "preflight").exists()
    assert [line["step"] for line in lines_of(run)] == [1, 2]
    assert not unexpected(list(run.journal.events()))


@pytest.mark.sampled(1, group="preflight")
@pytest.mark.e2e
def test_a_machine_with_other_code_is_refused(user: User, tmp_path: Path) -> None:
    packages = tmp_path / "older"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, packages / name)
    with (packages / "solomonov" / "schedule.py").open("a") as file:
        file.write("# a line more\n")
    with two_machines(user, {"packages": packages}) as (run, programs):
        assert "machine-0 and machine-1 run different code" in refused(run, programs)


@pytest.mark.sampled(1, group="preflight")
@pytest.mark.e2e
def test_a_machine_with_another_version_of_a_package_is_refused(user: User, tmp_path: Path) -> None:
    record = tmp_path / "installed" / "sentencepiece-0.0.1.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: sentencepiece\nVersion: 0.0.1\n")
    with two_machines(user, {"packages": record.parent}) as (run, programs):
        problem = refused(run, programs)
    assert problem.startswith("sentencepiece is ")
    assert problem.endswith("on machine-0, 0.0.1 on machine-1")


@pytest.mark.sampled(1, group="preflight")
@pytest.mark.e2e
def test_a_run_folder_that_is_not_shared_is_refused(user: User, tmp_path: Path) -> None:
    """The second machine has a folder of that content, but another one."""
    run = begin_run(user, "training.total_steps=2", "evaluation.every_steps=0", "schedule.warmup_steps=0", ranks=2)
    other = tmp_path / "other" / run.path.name
    shutil.copytree(run.path, other)
    with two_machines(user, {"run": other}) as (_, programs):
        for program in programs:
            assert program.wait(deadline=180) == exits.CONFIGURATION, program.output()
    event = run.journal.last("preflight")
    assert event is not None
    assert len(event["problems"]) == 2, "neither sees what the other wrote"
    assert all("the run's folder is not shared" in problem for problem in event["problems"])
