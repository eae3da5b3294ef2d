"""The loader: its steps against the stream's own rows, its errors, and that its thread ends."""

from __future__ import annotations

import threading
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipeline.batches import BatchRows
from data_pipeline.dataset import Dataset
from data_pipeline.errors import DamagedDataError
from data_pipeline.loader import Loader
from data_pipeline.rows import RowBatch
from data_pipeline.stream import Stream
from tests.support.datasets import make_documents, write_dataset


class Numbers:
    """A stream whose rows hold their own numbers; it records what was asked for."""

    def __init__(self, *, broken_from: int | None = None) -> None:
        self.asked: list[list[int]] = []
        self.broken_from = broken_from
        self.changed = threading.Condition()

    def rows(self, indices: NDArray[np.int64], /) -> RowBatch:
        with self.changed:
            self.asked.append(indices.tolist())
            self.changed.notify_all()
        if self.broken_from is not None and indices[-1] >= self.broken_from:
            raise DamagedDataError("a block is damaged", got=str(indices[0]), rule="whole", remedy="prepare")
        ids = np.repeat(indices[:, None], 4, axis=1).astype(np.int32)
        return RowBatch(indices, ids, ids, np.zeros_like(ids))

    def wait_for_steps(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.asked) >= count, timeout=60), "the thread does not read on"


def row_ids(step: list[RowBatch]) -> list[list[int]]:
    return [batch.row_ids.tolist() for batch in step]


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "rows"]


@pytest.fixture(autouse=True)
def _no_thread_stays() -> object:
    yield
    assert not threads(), "a loader left its thread running"


def test_steps_are_consecutive_rows_cut_into_micro_batches() -> None:
    with Loader(Numbers(), batches=BatchRows(8), micro_batch_rows=3, first_step=2) as loader:
        assert row_ids(next(loader)) == [[16, 17, 18], [19, 20, 21], [22, 23]]
        assert row_ids(next(loader)) == [[24, 25, 26], [27, 28, 29], [30, 31]]
        assert loader.next_step == 4


def test_a_rank_takes_the_rows_of_its_remainder() -> None:
    for rank, expected in enumerate([[[12, 15], [18]], [[10, 13], [16, 19]], [[11, 14], [17]]]):
        with Loader(
            Numbers(), batches=BatchRows(10), dp_rank=rank, dp_size=3, micro_batch_rows=2, first_step=1
        ) as loader:
            assert row_ids(next(loader)) == expected


def test_a_rank_without_rows_gets_an_empty_step() -> None:
    with Loader(Numbers(), batches=BatchRows(2), dp_rank=2, dp_size=3, micro_batch_rows=1) as loader:
        assert [row_ids(step) for step in islice(loader, 3)] == [[], [[2]], [[5]]]


@pytest.mark.parametrize("prefetch_steps", [0, 1, 5])
def test_prefetch_does_not_change_the_rows(prefetch_steps: int, tmp_path: Path) -> None:
    write_dataset(tmp_path, {"own": make_documents(1, 150, 20)}, sequence_tokens=16, packing="best_fit")
    with Dataset.open(tmp_path) as dataset:
        stream = Stream(dataset, sequence_tokens=16, packing="best_fit", seed=3)
        with Loader(stream, batches=BatchRows(12), micro_batch_rows=5, prefetch_steps=prefetch_steps) as loader:
            for step, batches in enumerate(islice(loader, 20)):
                assert sum(len(batch) for batch in batches) == 12
                expected = stream.rows(range(step * 12, step * 12 + 12))
                assert sum(batch.digest() for batch in batches) % 2**64 == expected.digest()


def test_the_thread_reads_no_further_than_it_may() -> None:
    numbers = Numbers()
    with Loader(numbers, batches=BatchRows(2), micro_batch_rows=2, prefetch_steps=3) as loader:
        assert numbers.asked == [], "nothing is read before the first step is asked for"
        next(loader)
        numbers.wait_for_steps(4)
        next(loader)
        numbers.wait_for_steps(5)
    # The thread has ended: what it read is 2 steps taken, and 3 ahead.
    assert numbers.asked == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


@pytest.mark.parametrize("prefetch_steps", [0, 1, 4])
def test_an_error_is_raised_as_itself_at_the_step_that_it_spoilt(prefetch_steps: int) -> None:
    with Loader(
        Numbers(broken_from=6), batches=BatchRows(2), micro_batch_rows=2, prefetch_steps=prefetch_steps
    ) as loader:
        assert [row_ids(step) for step in islice(loader, 3)] == [[[0, 1]], [[2, 3]], [[4, 5]]]
        for _ in range(2):
            with pytest.raises(DamagedDataError) as raised:
                next(loader)
            assert raised.value.got == "6"
        assert loader.next_step == 3


def test_closing_ends_iteration_and_the_thread() -> None:
    loader = Loader(Numbers(), batches=BatchRows(2), micro_batch_rows=2, prefetch_steps=2)
    next(loader)
    [thread] = threads()
    assert thread.daemon
    loader.close()
    loader.close()
    assert not thread.is_alive()
    assert list(loader) == []
    with Loader(Numbers(), batches=BatchRows(2), micro_batch_rows=2, prefetch_steps=0) as unthreaded:
        next(unthreaded)
        assert not threads()
    assert list(unthreaded) == []


def test_closing_before_the_first_step_starts_nothing() -> None:
    numbers = Numbers()
    with Loader(numbers, batches=BatchRows(2), micro_batch_rows=2) as loader:
        pass
    assert list(loader) == []
    assert numbers.asked == []


def test_an_error_of_the_consumer_closes_it_too() -> None:
    class ConsumerError(Exception):
        pass

    def train() -> None:
        with Loader(Numbers(), batches=BatchRows(2), micro_batch_rows=2) as loader:
            next(loader)
            raise ConsumerError("the training failed")

    with pytest.raises(ConsumerError):
        train()
    assert not threads()


def test_closing_from_another_thread_wakes_a_waiting_consumer() -> None:
    class Slow(Numbers):
        release = threading.Event()

        def rows(self, indices: NDArray[np.int64], /) -> RowBatch:
            batch = super().rows(indices)
            self.release.wait(60)
            return batch

    slow = Slow()
    loader = Loader(slow, batches=BatchRows(2), micro_batch_rows=2, prefetch_steps=1)
    got: list[list[RowBatch]] = []
    consumer = threading.Thread(target=lambda: got.extend(loader))
    consumer.start()
    slow.wait_for_steps(1)
    closer = threading.Thread(target=loader.close)
    closer.start()
    consumer.join(60)
    assert not consumer.is_alive()
    assert got == []
    slow.release.set()
    closer.join(60)


@pytest.mark.parametrize(
    "wrong",
    [
        {"micro_batch_rows": 0},
        {"dp_size": 0},
        {"first_step": -1},
        {"prefetch_steps": -1},
        {"dp_rank": 2, "dp_size": 2},
        {"dp_rank": -1},
    ],
)
def test_numbers_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Loader(Numbers(), **{"batches": BatchRows(4), "micro_batch_rows": 2, **wrong})


@pytest.mark.parametrize("prefetch_steps", [0, 1, 5])
def test_it_ends_before_the_end_step_and_builds_nothing_for_it(prefetch_steps: int) -> None:
    asked: list[int] = []

    class Asked:
        def rows(self, indices: NDArray[np.int64], /) -> RowBatch:
            asked.extend(indices.tolist())
            ids = indices[:, None].astype(np.int32)
            return RowBatch(indices, ids, ids, ids)

    arguments = {"batches": BatchRows(4), "micro_batch_rows": 4, "first_step": 2, "end_step": 5}
    with Loader(Asked(), **arguments, prefetch_steps=prefetch_steps) as loader:
        assert [part.row_ids[0] for [part] in loader] == [8, 12, 16]
        assert next(loader, None) is None
    assert asked == list(range(8, 20))
    with Loader(Asked(), **{**arguments, "first_step": 5}, prefetch_steps=prefetch_steps) as loader:
        assert next(loader, None) is None
