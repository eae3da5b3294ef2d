"""The stream of a real dataset: the same rows for any world, prefetch, cache, start and resumption."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.batches import BatchRows
from data_pipeline.dataset import Dataset
from data_pipeline.loader import Loader
from data_pipeline.stream import Stream
from tests.support.datasets import make_documents, set_weights, write_dataset

T, BATCH, STEPS = 16, 12, 25
ROWS = BATCH * STEPS


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dataset]:
    folder = tmp_path_factory.mktemp("dataset")
    sources = {"own": make_documents(1, 150, 20), "two": make_documents(2, 100, 12)}
    manifest = write_dataset(folder, sources, sequence_tokens=T, packing="best_fit", block_tokens=97)
    set_weights(manifest, {"own": 2.5, "two": 1.0})
    with Dataset.open(folder) as opened:
        yield opened


@pytest.fixture(scope="module")
def expected(dataset: Dataset) -> list[int]:
    """The digest of every row, asked for one by one."""
    stream = open_stream(dataset, 1 << 20)
    return [stream.rows([row]).digest() for row in range(ROWS)]


def open_stream(dataset: Dataset, cache_bytes: int) -> Stream:
    return Stream(dataset, sequence_tokens=T, packing="best_fit", seed=5, cache_bytes=cache_bytes)


caches = st.sampled_from([1, 3000, 1 << 20])


@settings(max_examples=40)
@given(st.lists(st.integers(0, ROWS - 1), max_size=60), caches)
def test_any_slice_is_its_rows(dataset: Dataset, expected: list[int], rows: list[int], cache_bytes: int) -> None:
    batch = open_stream(dataset, cache_bytes).rows(rows)
    assert batch.row_ids.tolist() == rows
    assert [batch.part(k, k + 1).digest() for k in range(len(rows))] == [expected[row] for row in rows]


@settings(max_examples=40)
@given(
    worlds=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 8)), min_size=1, max_size=4),
    micro=st.integers(1, 12),
    prefetch=st.integers(0, 3),
    cache_bytes=caches,
    first=st.integers(0, 3),
)
def test_each_step_has_the_same_digest_whatever_runs_it(
    dataset: Dataset,
    expected: list[int],
    worlds: list[tuple[int, int]],
    micro: int,
    prefetch: int,
    cache_bytes: int,
    first: int,
) -> None:
    """A run of several attempts, each at its own world for some steps, from a new process's empty cache."""
    for world, steps in worlds:
        steps = min(steps, STEPS - first)
        digests = [0] * steps
        for rank in range(world):
            stream = open_stream(dataset, cache_bytes)
            with Loader(
                stream,
                batches=BatchRows(BATCH),
                dp_rank=rank,
                dp_size=world,
                micro_batch_rows=micro,
                first_step=first,
                prefetch_steps=prefetch,
            ) as loader:
                for step, batches in enumerate(islice(loader, steps)):
                    digests[step] += sum(batch.digest() for batch in batches)
        for step in range(steps):
            rows = range((first + step) * BATCH, (first + step + 1) * BATCH)
            assert digests[step] % 2**64 == sum(expected[row] for row in rows) % 2**64
        first += steps
