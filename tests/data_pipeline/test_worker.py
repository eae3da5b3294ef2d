"""A data worker without its cluster: its rows against the stream's, and what it says when it cannot read them."""

from __future__ import annotations

import errno
import os
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.cluster import Worker
from data_pipeline.dataset import Dataset
from data_pipeline.errors import DamagedDataError, DataConfigurationError
from data_pipeline.spec import ServiceSpec
from data_pipeline.stream import Stream
from data_pipeline.worker import DataWorker
from tests.support.datasets import make_documents, write_dataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    documents = {"one": make_documents(1, 200, 30.0), "two": make_documents(2, 100, 60.0)}
    write_dataset(tmp_path / "dataset", documents, sequence_tokens=32, packing="best_fit", lanes=8)
    return tmp_path / "dataset"


def stream_of(folder: Path, **changes: Any) -> Stream:
    arguments = {"sequence_tokens": 32, "packing": "best_fit", "seed": 3, "weights": {"one": 1.0, "two": 2.0}}
    return Stream(Dataset.open(folder), **{**arguments, **changes})  # type: ignore[arg-type]


def spec_of(folder: Path, **changes: Any) -> dict[str, Any]:
    values = {
        "address": "127.0.0.2:1", "namespace": "n", "workers": 2, "dataset": str(folder),
        "stream": stream_of(folder).identity, "sequence_tokens": 32, "packing": "best_fit", "seed": 3,
        "weights": {"one": 1.0, "two": 2.0}, "cache_bytes": 1 << 20,
    }  # fmt: skip
    return {**values, **changes}


def test_its_rows_are_the_streams(folder: Path) -> None:
    worker, numbers = DataWorker(spec_of(folder)), np.array([90, 3, 3, 1000], dtype=np.int64)
    reply = worker.rows(numbers)
    assert reply.pid == os.getpid()
    assert reply.rows(numbers).digest() == stream_of(folder).rows(numbers).digest()
    assert reply.blocks_read > 0
    assert worker.rows(numbers).blocks_read == reply.blocks_read, "the second time from the cache"
    assert worker.check()["error"] is None


def test_its_cache_is_as_large_as_it_is_told(folder: Path) -> None:
    worker, numbers = DataWorker(spec_of(folder, cache_bytes=1)), np.arange(4, dtype=np.int64)
    first = worker.rows(numbers).blocks_read
    assert worker.rows(numbers).blocks_read > first, "nothing fits: read again"


def test_each_block_is_read_once_by_the_worker_that_owns_its_lane(folder: Path) -> None:
    """All rows of an epoch, a lane's share a worker: the cluster reads as many blocks as there are."""
    stream = stream_of(folder)
    numbers = np.arange(400, dtype=np.int64)
    owners = stream.lanes_of(numbers) % 3
    read = []
    for number in range(3):
        worker = DataWorker(spec_of(folder))
        for part in np.array_split(numbers[owners == number], 7):
            read.append(worker.rows(part).blocks_read)
    alone = stream_of(folder)
    alone.rows(numbers)
    assert sum(read[6::7]) == alone.blocks_read


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"dataset": "/nowhere/at/all"}, DataConfigurationError, "/nowhere/at/all"),
        ({"stream": "of another run"}, DataConfigurationError, "of another run"),
        ({"sequence_tokens": 64}, DataConfigurationError, "was not prepared"),
    ],
)
def test_what_it_cannot_serve_it_says_with_its_place(
    folder: Path, changes: dict[str, Any], kind: type[Exception], words: str
) -> None:
    worker = DataWorker(spec_of(folder, **changes))
    facts = worker.check()
    assert facts["error"], "known before any row is asked for"
    reply = worker.rows(np.arange(4, dtype=np.int64))
    assert reply.error == facts["error"]
    with pytest.raises(kind, match=f"(?s)pid {os.getpid()}") as caught:
        reply.rows(np.arange(4, dtype=np.int64))
    assert words in str(caught.value)
    assert socket.gethostname() in str(caught.value), "which machine"


def test_damage_is_told_from_a_mistake(folder: Path) -> None:
    worker = DataWorker(spec_of(folder))
    for shard in (folder / "shards").glob("*.tar"):
        data = bytearray(shard.read_bytes())
        data[512:] = bytes(byte ^ 1 for byte in data[512:])
        shard.write_bytes(data)
    reply = worker.rows(np.arange(4, dtype=np.int64))
    with pytest.raises(DamagedDataError, match="is damaged"):
        reply.rows(np.arange(4, dtype=np.int64))


@pytest.mark.parametrize(
    ("number", "passing"),
    [
        (errno.ENOENT, False),
        (errno.ENOTDIR, False),
        (errno.EACCES, False),
        (errno.EPERM, False),
        (errno.ESTALE, True),
        (errno.EIO, True),
        (errno.EMFILE, True),
    ],
)
def test_what_the_system_refuses_is_answered(
    folder: Path, number: int, passing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(spec: ServiceSpec) -> Stream:
        raise OSError(number, os.strerror(number), "/data/shards/0.tar")

    monkeypatch.setattr("data_pipeline.worker.open_stream", fail)
    reply = DataWorker(spec_of(folder)).rows(np.arange(4, dtype=np.int64))
    assert reply.error is not None
    assert (reply.error["damaged"], reply.error["passing"]) == (False, passing), "tried again where it may pass"
    for words in (os.strerror(number), "/data/shards/0.tar", socket.gethostname(), f"pid {os.getpid()}"):
        assert words in reply.error["got"]
    with pytest.raises(DataConfigurationError, match="cannot read the shards"):
        reply.rows(np.arange(4, dtype=np.int64))


def test_it_answers_while_it_stays(folder: Path) -> None:
    worker = DataWorker(spec_of(folder))
    thread = threading.Thread(target=worker.stay, daemon=True)
    thread.start()
    worker.ping()
    asked = threading.Thread(target=worker.rows, args=(np.arange(4, dtype=np.int64),), daemon=True)
    asked.start()
    asked.join(10)
    assert not asked.is_alive(), "it builds rows as well"
    assert thread.is_alive()
    worker._over.set()
    thread.join(10)
    assert not thread.is_alive()


def spec_of_nothing() -> dict[str, Any]:
    return {
        "address": "a:1", "namespace": "n", "workers": 1, "dataset": "/x", "stream": "s", "sequence_tokens": 8,
        "packing": "concat", "seed": 1, "weights": {}, "cache_bytes": 1,
    }  # fmt: skip


# --- specification -------------------------------------------------------------------------------------------


def test_a_specification_is_read_as_it_was_written(tmp_path: Path) -> None:
    spec = ServiceSpec.from_json(spec_of_nothing())
    spec.write(tmp_path)
    assert ServiceSpec.load(tmp_path) == spec
    assert [path.name for path in tmp_path.iterdir()] == ["data-service.json"]


@pytest.mark.parametrize("text", [None, "{", "[]", '{"schema_version": 2}'])
def test_no_specification_is_one_message(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "data-service.json").write_text(text)
    with pytest.raises(DataConfigurationError, match="remedy"):
        ServiceSpec.load(tmp_path)


# --- names ---------------------------------------------------------------------------------------------------


def test_a_worker_is_known_by_its_name() -> None:
    worker = Worker(12, 1700000000000)
    assert Worker.of(worker.name) == worker
    for other in ("rows", "rows-1", "rows-1-", "rows-a-1", "cols-1-2", "rows-1-2-3", ""):
        assert Worker.of(other) is None
