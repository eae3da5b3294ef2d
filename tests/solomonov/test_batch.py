"""Tensors against the rows they came from, and the digest against xxh3-64 of bytes that are put together here."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
import xxhash
from numpy.typing import NDArray

from data_pipeline.rows import RowBatch
from solomonov.batch import TokenBatch, empty_batch, padded, to_tensors
from solomonov.model.cross import Source

CPU = torch.device("cpu")
FIRST_ROW, ROWS, LENGTH = 2**40 + 5, 3, 7


def rows() -> RowBatch:
    draw = np.random.default_rng(4)
    labels = draw.integers(0, 300, (ROWS, LENGTH), dtype=np.int32)
    labels[1, 4:] = -100
    documents = np.sort(draw.integers(0, 3, (ROWS, LENGTH), dtype=np.int32))
    documents[1, 4:] = -1
    ids = draw.integers(0, 300, (ROWS, LENGTH), dtype=np.int32)
    return RowBatch(np.arange(FIRST_ROW, FIRST_ROW + ROWS, dtype=np.int64), ids, labels, documents)


def expected_digest(batch: RowBatch) -> int:
    """The definition, value by value: row id as int64, the three arrays as int32, little-endian, one hash a row."""

    def row(row_id: int, *arrays: NDArray[np.int32]) -> int:
        values = [int(value) for array in arrays for value in array]
        return xxhash.xxh3_64_intdigest(struct.pack(f"<q{len(values)}i", row_id, *values))

    parts = (batch.row_ids, batch.input_ids, batch.labels, batch.document_ids)
    return sum(row(int(number), *arrays) for number, *arrays in zip(*parts, strict=True)) % 2**64


def test_tensors_hold_the_rows() -> None:
    given = rows()
    batch = to_tensors(given, CPU)
    for name in ("row_ids", "input_ids", "labels", "document_ids"):
        tensor = getattr(batch, name)
        assert tensor.dtype == torch.int64, name
        assert tensor.tolist() == getattr(given, name).tolist(), name
    assert batch.valid_tokens == ROWS * LENGTH - 3


def test_digest_is_the_sum_of_the_rows_hashes() -> None:
    given = rows()
    assert to_tensors(given, CPU).digest() == expected_digest(given)
    parts = [to_tensors(given.part(first, first + 1), CPU).digest() for first in range(ROWS)]
    assert sum(parts) % 2**64 == expected_digest(given), "any share of the rows among ranks gives the same sum"


@pytest.mark.parametrize("field", ["row_ids", "input_ids", "labels", "document_ids"])
def test_a_change_in_the_tensors_changes_the_digest(field: str) -> None:
    batch = to_tensors(rows(), CPU)
    before = batch.digest()
    tensor = getattr(batch, field)
    tensor.view(-1)[-1] += 1
    assert batch.digest() != before, f"another {field} after the copy went unseen"
    tensor.view(-1)[-1] -= 1
    assert batch.digest() == before


def with_source() -> TokenBatch:
    """The rows with a source of two tokens more, documents and padding."""
    draw = np.random.default_rng(5)
    documents = np.sort(draw.integers(0, 3, (ROWS, LENGTH + 2)), axis=1)
    documents[0, 5:] = -1
    arrays = draw.integers(0, 300, (ROWS, LENGTH + 2)), documents
    return replace(to_tensors(rows(), CPU), source=Source(*(torch.from_numpy(array) for array in arrays)))


def test_the_digest_is_of_the_source_too() -> None:
    batch = with_source()
    before = batch.digest()
    parts = [batch.row_ids, batch.input_ids, batch.labels, batch.document_ids, *(batch.source or ())]
    expected = 0
    for row in range(ROWS):
        row_id, *values = [int(value) for part in parts for value in part[row].reshape(-1)]
        expected += xxhash.xxh3_64_intdigest(struct.pack(f"<q{len(values)}i", row_id, *values))
    assert before == expected % 2**64
    for tensor in batch.source or ():
        tensor[1, 2] += 1
        assert batch.digest() != before
        tensor[1, 2] -= 1
    assert replace(batch, source=None).digest() == to_tensors(rows(), CPU).digest() != before


def test_an_exchange_of_two_rows_under_their_numbers_changes_the_digest() -> None:
    batch = to_tensors(rows(), CPU)
    order = torch.tensor([1, 0, 2])
    swapped = TokenBatch(batch.row_ids, batch.input_ids[order], batch.labels[order], batch.document_ids[order])
    assert swapped.digest() != batch.digest()


def test_an_empty_batch_weighs_nothing() -> None:
    batch = empty_batch(LENGTH, CPU)
    assert batch.valid_tokens == 0
    assert batch.input_ids.shape == batch.labels.shape == batch.document_ids.shape == (1, LENGTH)
    assert set(batch.document_ids.view(-1).tolist()) == {-1}, "all of it is padding"
    assert batch.source is None
    source = empty_batch(LENGTH, CPU, 2, source_tokens=LENGTH + 2).source
    assert source is not None
    assert source.input_ids.shape == source.document_ids.shape == (2, LENGTH + 2)
    assert source.document_ids.unique().tolist() == [-1]


@pytest.mark.gpu
def test_tensors_on_a_cuda_device_hold_the_rows() -> None:
    device, given = torch.device("cuda", 0), rows()
    batch = to_tensors(given, device)
    assert batch.input_ids.device == device
    assert batch.row_ids.device == CPU
    assert batch.digest() == expected_digest(given)
    assert empty_batch(LENGTH, device).labels.device == device


def test_a_short_micro_batch_is_filled_up_with_padding() -> None:
    short = to_tensors(rows(), CPU)
    full = padded(short, ROWS + 2)
    for name in ("row_ids", "input_ids", "labels", "document_ids"):
        assert torch.equal(getattr(full, name)[:ROWS], getattr(short, name))
        assert getattr(full, name).dtype == torch.int64
    assert full.labels[ROWS:].unique().tolist() == [-100]
    assert full.document_ids[ROWS:].unique().tolist() == [-1]
    assert full.input_ids.shape == (ROWS + 2, LENGTH)
    assert full.valid_tokens == short.valid_tokens
    assert padded(short, ROWS) is short
    assert padded(short, 1) is short


def test_a_short_micro_batch_s_source_is_filled_up_with_it() -> None:
    short = with_source()
    full = padded(short, ROWS + 2)
    assert short.source is not None
    assert full.source is not None
    for found, given, value in zip(full.source, short.source, (0, -1), strict=True):
        assert torch.equal(found[:ROWS], given)
        assert found[ROWS:].tolist() == [[value] * (LENGTH + 2)] * 2
    assert padded(to_tensors(rows(), CPU), ROWS + 2).source is None
