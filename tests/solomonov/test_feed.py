"""A rank's feed: inline, for a rank that needs no rows, and what it is told about its data workers."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest

from data_pipeline.dataset import Dataset
from data_pipeline.remote import Cancelled
from solomonov import feed as feed_module
from solomonov.errors import ConfigurationError
from solomonov.feed import ClusterPlace, Feed, idle_feed, open_feed, service_spec
from solomonov.plan import plan_batch
from solomonov.start import make_stream
from tests.support.processes import program_environment, run_program
from tests.support.runs import begin_run, prepared_user


def never(kind: str, **fields: Any) -> None:
    raise AssertionError(f"{kind} {fields}")


@pytest.fixture
def parts(tmp_path: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Configuration, plan and stream of a prepared run."""
    run = begin_run(prepared_user(tmp_path / "work"), *getattr(request, "param", ()), ranks=2)
    config = run.config()
    plan = plan_batch(config.training, config.schedule, sequence_tokens=config.data.sequence_tokens, data_parallel=2)
    return {"config": config, "plan": plan, "stream": make_stream(config, Dataset.open(run.data_folder()))}


def test_inline_is_a_loader_of_the_stream(parts: dict[str, Any]) -> None:
    with open_feed(**parts, rank=1, first_step=3, place=None, on_event=never) as feed:
        steps = list(islice(feed, 2))
        assert feed.faults() == (0, 0)
    assert [[part.row_ids.tolist() for part in step] for step in steps] == [[[25, 27, 29, 31]], [[33, 35, 37, 39]]]
    assert steps[0][0].digest() == parts["stream"].rows([25, 27, 29, 31]).digest()


def test_a_rank_that_needs_no_rows_asks_for_none() -> None:
    assert list(islice(idle_feed(), 3)) == [[], [], []]


@pytest.mark.parametrize("parts", [("data.workers.backend=ray",)], indirect=True)
def test_without_a_place_data_workers_are_refused(parts: dict[str, Any]) -> None:
    with (
        pytest.raises(ConfigurationError, match="not told where its data workers are"),
        open_feed(**parts, rank=0, first_step=0, place=None, on_event=never),
    ):
        pass


class NoWorkers:
    """A directory of data workers in which none ever appears; its clock stands still, or runs on with each look."""

    def __init__(self, *, clock_runs: bool) -> None:
        self.time, self.clock_runs = 0.0, clock_runs
        self.looked, self.closed = Event(), False

    def living(self) -> dict[int, Any]:
        return {}

    def wait(self, calls: Sequence[Any], timeout: float) -> list[Any]:
        self.looked.set()
        self.time += timeout * self.clock_runs
        return []

    def now(self) -> float:
        return self.time

    def close(self) -> None:
        self.closed = True


def without_workers(monkeypatch: pytest.MonkeyPatch, *, clock_runs: bool) -> tuple[NoWorkers, dict[str, Any]]:
    """Such a directory in the place of Ray's, and the place that a rank is told."""
    workers = NoWorkers(clock_runs=clock_runs)
    monkeypatch.setattr(feed_module, "join", lambda address, namespace: None)
    monkeypatch.setattr(feed_module, "WorkerDirectory", lambda count: workers)
    return workers, {"place": ClusterPlace("127.0.0.2:1", "n")}


RAY = pytest.mark.parametrize("parts", [("data.workers.backend=ray",)], indirect=True)


@RAY
@pytest.mark.parametrize("hurry", [False, True])
def test_rows_by_data_workers_are_those_of_inline(
    parts: dict[str, Any], hurry: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the step of a checkpoint on; a rank that is to leave does not have the patience of the others."""
    workers, told = without_workers(monkeypatch, clock_runs=True)
    events: list[tuple[str, dict[str, Any]]] = []

    def note(kind: str, **fields: Any) -> None:
        events.append((kind, fields))

    with open_feed(**parts, **told, rank=1, first_step=3, on_event=note, hurry=lambda: hurry) as feed:
        steps = list(islice(feed, 2))
        assert not workers.closed
    assert [[part.row_ids.tolist() for part in step] for step in steps] == [[[25, 27, 29, 31]], [[33, 35, 37, 39]]]
    assert steps[0][0].digest() == parts["stream"].rows([25, 27, 29, 31]).digest()
    assert (workers.time < parts["config"].data.workers.patience_seconds) == hurry, "in the directory's seconds"
    assert [kind for kind, _ in events] == ["fallback", "data_served"]
    assert events[-1][1]["rows_inline"] >= 8
    assert workers.closed


@RAY
def test_a_feed_ends_while_it_waits_for_data_workers(parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    workers, told = without_workers(monkeypatch, clock_runs=False)
    with open_feed(**parts, **told, rank=0, first_step=0, on_event=lambda kind, **fields: None) as feed:
        # Somebody has to ask, and then to leave; who still asks while it is closed may be told so.
        def ask() -> None:
            with contextlib.suppress(Cancelled):
                list(islice(feed, 1))

        asker = Thread(target=ask, daemon=True)
        asker.start()
        assert workers.looked.wait(60)
    asker.join(60)
    assert not asker.is_alive()
    assert workers.closed


def test_faults_are_requests_sent_again_and_workers_lost() -> None:
    assert Feed(iter([]), SimpleNamespace(reissued=3, lost=1)).faults() == (3, 1)  # type: ignore[arg-type]


# In a process of its own: it would be a driver of Ray.
IN_VAIN = """
import json, os, sys
from pathlib import Path
from data_pipeline.dataset import Dataset
from solomonov.feed import ClusterPlace, open_feed
from solomonov.plan import plan_batch
from solomonov.runfolder import RunFolder
from solomonov.start import make_stream

run = RunFolder(Path(sys.argv[1]))
config = run.config()
plan = plan_batch(config.training, config.schedule, sequence_tokens=config.data.sequence_tokens, data_parallel=2)
stream = make_stream(config, Dataset.open(run.data_folder()))
place = ClusterPlace(sys.argv[2], "nobody")
events, hook = [], sys.excepthook
with open_feed(config, plan, stream, rank=0, first_step=0, place=place,
               on_event=lambda kind, **fields: events.append([kind, fields])) as feed:
    [part] = next(iter(feed))
assert "ray" in sys.modules
assert sys.excepthook is hook, "Ray's own waits for the head before a crash is known"
print(json.dumps([part.row_ids.tolist(), events]), flush=True)
os._exit(0)
"""


@pytest.mark.ray
def test_a_cluster_that_cannot_be_joined_is_done_without(tmp_path: Path) -> None:
    run = begin_run(prepared_user(tmp_path / "work"), "data.workers.backend=ray", ranks=2)
    code, output = run_program(
        [sys.executable, "-c", IN_VAIN, run.path, "127.0.0.2:1"],
        log=tmp_path / "log",
        deadline=120,
        env=program_environment(RAY_gcs_rpc_server_reconnect_timeout_s="600"),
    )
    assert code == 0, output
    rows, [[kind, fields]] = json.loads(next(line for line in output.splitlines() if line.startswith("[[")))
    assert rows == [0, 2, 4, 6]
    assert (kind, fields["to"]) == ("fallback", "inline")
    assert "127.0.0.2:1" in fields["reason"]


def test_a_place_travels_by_the_environment() -> None:
    place = ClusterPlace("127.0.0.2:6379", "solomonov-abc-1")
    assert ClusterPlace.from_environment(place.to_environment()) == place
    assert set(place.to_environment()) == {"SOLOMONOV_RAY_ADDRESS", "SOLOMONOV_RAY_NAMESPACE"}
    assert ClusterPlace.from_environment({}) is None
    assert ClusterPlace.from_environment({"SOLOMONOV_RAY_ADDRESS": "a:1"}) is None


def test_the_service_is_told_of_the_same_stream(parts: dict[str, Any]) -> None:
    spec = service_spec(parts["config"], parts["stream"].identity, ClusterPlace("127.0.0.2:1", "n"))
    from data_pipeline.worker import DataWorker

    values = {**spec.model_dump(), "dataset": str(parts["stream"].dataset.manifest.folder)}
    assert DataWorker(values).check()["error"] is None


OTHERS = ("data.workers.count=3", "data.workers.cpus=0.5", "data.cache_bytes=12345678")


@pytest.mark.parametrize("parts", [OTHERS], indirect=True)
def test_the_service_is_told_what_the_configuration_says(parts: dict[str, Any], tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        spec = service_spec(parts["config"], "s", ClusterPlace("127.0.0.2:1", "n"))
    assert (spec.address, spec.namespace, spec.stream) == ("127.0.0.2:1", "n", "s")
    assert (spec.workers, spec.cpus, spec.cache_bytes) == (3, 0.5, 12345678)
    assert spec.dataset == f"{tmp_path}/dataset", "the nodes have working folders of their own"
