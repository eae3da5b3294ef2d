"""Row batches, and their digest against one computed byte by byte with struct."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import xxhash

from data_pipeline.rows import RowBatch, rows_digest


def make_rows(batch: int = 5, length: int = 7) -> RowBatch:
    rng = np.random.default_rng(batch)
    return RowBatch(
        rng.integers(0, 2**40, batch),
        rng.integers(0, 60_000, (batch, length), dtype=np.int32),
        rng.integers(-100, 60_000, (batch, length), dtype=np.int32),
        rng.integers(-1, 5, (batch, length), dtype=np.int32),
    )


def reference(rows: RowBatch) -> int:
    total = 0
    for row in range(len(rows)):
        data = struct.pack("<q", int(rows.row_ids[row]))
        for array in (rows.input_ids, rows.labels, rows.document_ids):
            data += struct.pack(f"<{array.shape[1]}i", *array[row].tolist())
        total += xxhash.xxh3_64_intdigest(data)
    return total % 2**64


def test_it_is_the_sum_of_the_rows_hashes() -> None:
    rows = make_rows()
    assert rows.digest() == reference(rows)


def test_the_digest_of_a_known_row_is_fixed_for_good() -> None:
    ids = np.array([[1, 5, 6, 3]])
    digest = rows_digest(np.array([42]), ids, np.array([[5, 6, 2, -100]]), np.array([[0, 0, 0, -1]]))
    data = b"\x2a" + bytes(7) + b"\1\0\0\0\5\0\0\0\6\0\0\0\3\0\0\0" + b"\5\0\0\0\6\0\0\0\2\0\0\0\x9c\xff\xff\xff"
    assert digest == xxhash.xxh3_64_intdigest(data + bytes(12) + b"\xff\xff\xff\xff")


@pytest.mark.parametrize("dtype", ["<i4", ">i4", "<i8", ">i8", "<u8", "<u4"])
def test_any_integer_type_and_layout_gives_the_same(dtype: str) -> None:
    rows = make_rows()
    rows = RowBatch(rows.row_ids, rows.input_ids, np.abs(rows.labels), np.abs(rows.document_ids))
    arrays: list[Any] = [rows.input_ids, rows.labels, rows.document_ids]
    others = [np.asfortranarray(array.astype(dtype)) for array in arrays]
    assert rows_digest(rows.row_ids.astype(">i8"), *others) == rows.digest()


def test_digests_of_parts_add_up_in_any_order() -> None:
    rows = make_rows(9)
    parts = [rows.part(4, 9), rows.part(0, 4)]
    assert [len(part) for part in parts] == [5, 4]
    assert sum(part.digest() for part in parts) % 2**64 == rows.digest()


def test_no_rows_have_digest_zero() -> None:
    empty = np.zeros((0, 4), dtype=np.int32)
    assert rows_digest(np.zeros(0, dtype=np.int64), empty, empty, empty) == 0


@pytest.mark.parametrize("field", ["row_ids", "input_ids", "labels", "document_ids"])
def test_one_altered_number_changes_it(field: str) -> None:
    rows, before = make_rows(), make_rows().digest()
    getattr(rows, field).flat[3] += 1
    assert rows.digest() != before


def test_a_source_is_a_part_of_its_row() -> None:
    """By hand: its ids and its document ids behind the row's own arrays."""
    row = [np.array([[1, 5]]), np.array([[5, 2]]), np.array([[0, 0]])]
    source = [np.array([[7, 8, 9]]), np.array([[0, 0, -1]])]
    data = struct.pack("<q6i6i", 42, 1, 5, 5, 2, 0, 0, 7, 8, 9, 0, 0, -1)
    assert rows_digest(np.array([42]), *row, *source) == xxhash.xxh3_64_intdigest(data)
    for array in source:
        array[0, 1] += 1
        assert rows_digest(np.array([42]), *row, *source) != xxhash.xxh3_64_intdigest(data)
        array[0, 1] -= 1


def test_exchanged_contents_of_two_rows_change_it() -> None:
    rows = make_rows()
    swapped = RowBatch(rows.row_ids[[1, 0, 2, 3, 4]], rows.input_ids, rows.labels, rows.document_ids)
    assert swapped.digest() != rows.digest()
    whole = RowBatch(*(getattr(rows, f)[[1, 0, 2, 3, 4]] for f in ("row_ids", "input_ids", "labels", "document_ids")))
    assert whole.digest() == rows.digest(), "the order of whole rows does not matter"


def test_values_that_do_not_fit_and_floats_are_refused() -> None:
    rows = make_rows()
    wide = rows.input_ids.astype(np.int64)
    wide[0, 0] += 2**32
    with pytest.raises(ValueError, match="does not fit"):
        rows_digest(rows.row_ids, wide, rows.labels, rows.document_ids)
    with pytest.raises(ValueError, match="does not fit"):
        rows_digest(rows.row_ids, rows.labels.astype(np.uint32), rows.labels, rows.document_ids)
    with pytest.raises(ValueError, match="integers"):
        rows_digest(rows.row_ids, rows.input_ids.astype(np.float64), rows.labels, rows.document_ids)


def test_shapes_must_agree() -> None:
    rows = make_rows()
    with pytest.raises(ValueError, match="shape"):
        rows_digest(rows.row_ids[:-1], rows.input_ids, rows.labels, rows.document_ids)
    with pytest.raises(ValueError, match="shape"):
        rows_digest(rows.row_ids, rows.input_ids, rows.labels[:, :-1], rows.document_ids)
    arrays = rows.row_ids, rows.input_ids, rows.labels, rows.document_ids
    with pytest.raises(ValueError, match="shape"):
        rows_digest(*arrays, rows.labels, rows.labels[:, :-1])
    with pytest.raises(ValueError, match="shape"):
        rows_digest(*arrays, rows.labels[:-1], rows.labels[:-1])


def test_cut_documents_are_pieces_of_their_own_and_nothing_else_changes() -> None:
    documents = np.array([[0, 0, 0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 1, -1, -1, -1]], dtype=np.int32)
    ids, labels = np.arange(16, dtype=np.int32).reshape(2, 8), np.arange(1, 17, dtype=np.int32).reshape(2, 8)
    rows = RowBatch(np.array([4, 9]), ids, labels, documents)
    cut = rows.cut(4)
    assert cut.document_ids.tolist() == [[0, 0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, -1, -1, -1]]
    assert rows.cut(2).document_ids.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 2, 2, 3, -1, -1, -1]]
    assert cut.document_ids.dtype == np.int32
    assert (cut.row_ids.tolist(), cut.input_ids.tolist(), cut.labels.tolist()) == (
        [4, 9],
        ids.tolist(),
        labels.tolist(),
    )
    assert rows.cut(8) is rows
    assert rows.document_ids.tolist() == documents.tolist(), "the rows themselves stay"
    assert cut.digest() != rows.digest()


@pytest.mark.parametrize("tokens", [0, 3, 14, -7])
def test_unequal_pieces_are_refused(tokens: int) -> None:
    with pytest.raises(ValueError, match="cannot be cut into equal pieces"):
        make_rows().cut(tokens)
