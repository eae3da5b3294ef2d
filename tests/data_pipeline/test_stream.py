"""Streams of rows against rows built slowly from the documents, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.dataset import Dataset
from data_pipeline.errors import DamagedDataError, DataConfigurationError
from data_pipeline.mixture import Phase
from data_pipeline.packing import pack_block
from data_pipeline.rows import RowBatch
from data_pipeline.stream import HeldOutRows, Stream
from tests.support.datasets import make_documents, set_weights, write_dataset
from tests.support.naive_order import naive_mixture, naive_source

T = 16
SOURCES = {"own": make_documents(1, 150, 20), "two": make_documents(2, 120, 12)}
HELD_OUT = {"own": make_documents(3, 15, 25), "two": make_documents(4, 6, 200)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for packing in ("best_fit", "concat"):
        made[packing] = tmp_path_factory.mktemp(packing)
        write_dataset(made[packing], SOURCES, sequence_tokens=T, packing=packing, block_tokens=129, held_out=HELD_OUT)
    return made


@pytest.fixture(params=["best_fit", "concat"])
def dataset(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[Dataset]:
    with Dataset.open(folders[request.param]) as opened:
        yield opened


def packing_of(dataset: Dataset) -> str:
    return dataset.manifest.sources[0].train.rows[0].packing


def make_stream(dataset: Dataset, **changes: Any) -> Stream:
    return Stream(dataset, **{"sequence_tokens": T, "packing": packing_of(dataset), "seed": 3, **changes})


def naive_rows(dataset: Dataset, source: str, split: str, block: int) -> list[tuple[list[int], ...]]:
    """(input ids, labels, document ids) of all rows of a block, token by token."""
    content = dataset.read_block(source, split, block)
    documents = [part.tolist() for part in np.split(content.tokens, np.cumsum(content.lengths)[:-1])]
    rows: list[tuple[list[int], ...]] = []
    for pieces in pack_block(content.lengths, T, packing_of(dataset)):
        ids, labels, numbers = [], [], []
        for number, (document, start, positions) in enumerate(pieces):
            for position in range(start, start + positions):
                ids.append(documents[document][position])
                labels.append(documents[document][position + 1])
                numbers.append(number)
        padding = T - len(ids)
        rows.append((ids + [3] * padding, labels + [-100] * padding, numbers + [-1] * padding))
    return rows


def as_lists(batch: RowBatch) -> list[tuple[list[int], ...]]:
    return list(zip(batch.input_ids.tolist(), batch.labels.tolist(), batch.document_ids.tolist(), strict=True))


def test_rows_are_those_of_the_naive_order_built_token_by_token(dataset: Dataset) -> None:
    weights = {"own": 2.0, "two": 1.0}
    stream = make_stream(dataset, weights=weights)
    batch = stream.rows(range(300))
    assert batch.row_ids.tolist() == list(range(300))
    naive = {
        name: naive_source(
            name, dataset.rows(name, "train", T, packing_of(dataset)).tolist(), lanes=8, window_blocks=4, seed=3
        )
        for name in SOURCES
    }
    for row, source in enumerate(naive_mixture(stream.order.mixture.parts[0], 300)):
        name = list(SOURCES)[source]
        lane, epoch, block, row_in_block = next(naive[name])
        assert stream.locate(row) == (name, lane, epoch, block, row_in_block)
        assert as_lists(batch)[row] == naive_rows(dataset, name, "train", block)[row_in_block]


def test_shapes_and_types(dataset: Dataset) -> None:
    batch = make_stream(dataset).rows([5, 1])
    assert batch.row_ids.dtype == np.int64
    for array in (batch.input_ids, batch.labels, batch.document_ids):
        assert array.dtype == np.int32
        assert array.shape == (2, T)
    assert len(make_stream(dataset).rows([])) == 0


def test_an_epoch_gives_every_position_of_every_document_once(dataset: Dataset) -> None:
    stream = make_stream(dataset, weights={"own": 1.0, "two": 0.0})
    lane_rows = stream.order.sources[0].lane_rows
    rows = np.arange(8 * int(lane_rows.max()))
    rows = rows[rows // 8 < lane_rows[rows % 8]]
    batch = stream.rows(rows)
    found = sorted(
        zip(batch.input_ids[batch.labels >= 0].tolist(), batch.labels[batch.labels >= 0].tolist(), strict=True)
    )
    pairs = (zip(d[:-1].tolist(), d[1:].tolist(), strict=True) for d in SOURCES["own"])
    assert found == sorted(pair for document in pairs for pair in document)


def test_a_row_depends_on_its_number_alone(dataset: Dataset) -> None:
    rows = make_stream(dataset).rows(np.arange(200))
    asked = np.random.default_rng(0).integers(0, 200, 77)
    stream = make_stream(dataset, cache_bytes=1)
    some = stream.rows(asked)
    assert some.row_ids.tolist() == asked.tolist()
    assert as_lists(some) == [as_lists(rows)[row] for row in asked.tolist()]
    assert as_lists(stream.rows(asked[::-1].astype(np.uint16))) == as_lists(some)[::-1]
    assert make_stream(dataset, seed=4).rows(np.arange(200)).digest() != rows.digest()


def test_the_cache_keeps_its_bound(dataset: Dataset) -> None:
    stream = make_stream(dataset, cache_bytes=5_000)
    for first in range(0, 600, 50):
        stream.rows(range(first, first + 50))
        assert stream._cache.bytes <= 5_000


def test_identity_is_of_what_decides_the_order(dataset: Dataset, folders: dict[str, Path]) -> None:
    base = make_stream(dataset)
    assert base.identity == make_stream(dataset, weights={"two": 5.0, "own": 5.0}, cache_bytes=1).identity
    others = [
        make_stream(dataset, seed=4),
        make_stream(dataset, weights={"own": 1.0, "two": 2.0}),
        make_stream(dataset, weights=[Phase(0, {"own": 1.0, "two": 1.0}), Phase(9, {"own": 1.0, "two": 1.0})]),
    ]
    other_packing = "concat" if packing_of(dataset) == "best_fit" else "best_fit"
    with Dataset.open(folders[other_packing]) as other:
        others.append(make_stream(other))
    assert len({base.identity, *(stream.identity for stream in others)}) == 5


def test_weights_default_to_the_manifest_s(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path, SOURCES, sequence_tokens=T, packing="concat", block_tokens=129)
    set_weights(manifest, {"own": 3.0, "two": 1.0})
    with Dataset.open(tmp_path) as dataset:
        stream = Stream(dataset, sequence_tokens=T, packing="concat", seed=3)
        assert stream.rows_before(400) == {"own": 300, "two": 100}
        assert stream.identity == make_stream(dataset, weights={"own": 6.0, "two": 2.0}).identity


def test_phases_change_the_weights_at_their_row(dataset: Dataset) -> None:
    phases = [Phase(0, {"own": 1.0, "two": 0.0}), Phase(40, {"own": 0.0, "two": 1.0})]
    stream = make_stream(dataset, weights=phases)
    assert [stream.locate(row).source for row in (0, 39, 40, 90)] == ["own", "own", "two", "two"]
    assert stream.rows_before(60) == {"own": 40, "two": 20}


@pytest.mark.parametrize("weights", [{"own": 1.0}, {"own": 1.0, "two": 1.0, "x": 1.0}, {"own": 0.0, "two": 0.0}, []])
def test_unusable_weights_are_refused(dataset: Dataset, weights: Any) -> None:
    with pytest.raises(DataConfigurationError) as raised:
        make_stream(dataset, weights=weights)
    assert raised.value.exit_code == 78


def test_an_unprepared_row_length_is_refused(dataset: Dataset) -> None:
    with pytest.raises(DataConfigurationError, match="not prepared"):
        make_stream(dataset, sequence_tokens=T * 2)
    with pytest.raises(DataConfigurationError, match="not prepared"):
        HeldOutRows(dataset, sequence_tokens=T * 2, packing="concat")


@pytest.mark.parametrize("indices", [[-1], [0.5], [[1, 2]]])
def test_row_numbers_must_be_row_numbers(dataset: Dataset, indices: Any) -> None:
    with pytest.raises(ValueError):
        make_stream(dataset).rows(indices)
    with pytest.raises(ValueError):
        HeldOutRows(dataset, sequence_tokens=T, packing=packing_of(dataset)).rows(indices)


def test_a_damaged_block_spoils_no_row_of_others(tmp_path: Path) -> None:
    write_dataset(tmp_path, SOURCES, sequence_tokens=T, packing="concat", block_tokens=129)
    with Dataset.open(tmp_path) as dataset:
        stream = make_stream(dataset)
        record = dataset.blocks("own", "train")[4]
        path = tmp_path / dataset.split("own", "train").shards[int(record["shard"])].file
        data = bytearray(path.read_bytes())
        data[int(record["tokens_offset"])] ^= 1
        path.write_bytes(data)
        refused = 0
        for row in range(200):
            if stream.locate(row)[:1] + stream.locate(row)[3:4] == ("own", 4):
                refused += 1
                with pytest.raises(DamagedDataError, match=r"tokens\.bin"):
                    stream.rows([row])
            else:
                stream.rows([row])
        assert refused


def test_held_out_rows_are_all_blocks_one_after_the_other(dataset: Dataset) -> None:
    held_out = HeldOutRows(dataset, sequence_tokens=T, packing=packing_of(dataset))
    expected = [
        row
        for name in SOURCES
        for block in range(dataset.split(name, "held_out").block_count)
        for row in naive_rows(dataset, name, "held_out", block)
    ]
    assert len(held_out) == len(expected)
    assert as_lists(held_out.rows(range(len(held_out)))) == expected
    some = held_out.rows([7, 3, 7])
    assert some.row_ids.tolist() == [7, 3, 7]
    assert as_lists(some) == [expected[7], expected[3], expected[7]]
    assert held_out.tokens == sum(label >= 0 for _, labels, _ in expected for label in labels)
    assert held_out.text_bytes == sum(4 * len(d) for documents in HELD_OUT.values() for d in documents)
    with pytest.raises(ValueError, match="held-out rows"):
        held_out.rows([len(held_out)])


def test_held_out_documents_are_whole_again(dataset: Dataset) -> None:
    assert max(len(document) for document in HELD_OUT["two"]) > 2 * 129, "one document is in three parts or more"
    held_out = HeldOutRows(dataset, sequence_tokens=T * 8, packing="concat", documents_only=True)
    assert len(held_out) == 0
    found = [document.tolist() for document in held_out.documents()]
    assert found == [document.tolist() for documents in HELD_OUT.values() for document in documents]
    assert [d.tolist() for d in islice(held_out.documents(), 2)] == found[:2], "the documents can be read again"


def test_a_dataset_without_held_out_documents_has_no_such_rows(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"own": SOURCES["own"]}, sequence_tokens=T, packing="concat", block_tokens=129)
    with Dataset.open(tmp_path) as dataset:
        held_out = HeldOutRows(dataset, sequence_tokens=T, packing="concat")
        assert (len(held_out), held_out.tokens, held_out.text_bytes) == (0, 0, 0)
        assert list(held_out.documents()) == []
        assert len(held_out.rows([])) == 0
        with pytest.raises(ValueError, match="packing"):
            HeldOutRows(dataset, sequence_tokens=T, packing="other")
