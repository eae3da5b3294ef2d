"""Rows as arrays, and the digest that proves which rows were trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

IGNORE_LABEL = -100
"""Label of a position with nothing to predict."""
PAD_DOCUMENT = -1
"""Document id of a padded position."""


@dataclass(frozen=True, slots=True, eq=False)
class RowBatch:
    """B rows of T positions."""

    row_ids: NDArray[np.int64]
    """(B,): numbers of the rows in their stream."""
    input_ids: NDArray[np.int32]
    """(B, T): tokens; the pad id on padding."""
    labels: NDArray[np.int32]
    """(B, T): the token after each input; -100 on padding."""
    document_ids: NDArray[np.int32]
    """(B, T): pieces of documents numbered from 0 in each row; -1 on padding."""

    def __len__(self) -> int:
        return len(self.row_ids)

    def part(self, first: int, end: int) -> RowBatch:
        """Rows [first, end) as views of the same arrays."""
        return RowBatch(
            self.row_ids[first:end],
            self.input_ids[first:end],
            self.labels[first:end],
            self.document_ids[first:end],
        )

    def cut(self, tokens: int) -> RowBatch:
        """The same rows with their documents cut at every multiple of `tokens`, each piece a document of its own.

        Inputs, labels and padding stay: the last token before a cut still predicts the one after it.

        Raises:
            ValueError: `tokens` does not divide the rows' length.
        """
        length = self.document_ids.shape[1]
        if tokens < 1 or length % tokens:
            raise ValueError(f"rows of {length} tokens cannot be cut into equal pieces of {tokens}")
        if tokens == length:
            return self
        begins = np.arange(length) % tokens == 0
        begins = np.broadcast_to(begins, self.document_ids.shape).copy()
        begins[:, 1:] |= self.document_ids[:, 1:] != self.document_ids[:, :-1]
        padding = self.document_ids == PAD_DOCUMENT
        pieces = np.cumsum(begins & ~padding, axis=1, dtype=np.int32) - 1
        return RowBatch(self.row_ids, self.input_ids, self.labels, np.where(padding, np.int32(PAD_DOCUMENT), pieces))

    def digest(self) -> int:
        """`rows_digest` of these rows."""
        return rows_digest(self.row_ids, self.input_ids, self.labels, self.document_ids)


def rows_digest(
    row_ids: NDArray[Any],
    input_ids: NDArray[Any],
    labels: NDArray[Any],
    document_ids: NDArray[Any],
    *source: NDArray[Any],
) -> int:
    """Sum modulo 2^64 over rows of xxh3-64(row id, input ids, labels, document ids, source).

    A row's bytes are its id as int64 and the others as int32, all little-endian. A sum, so it does not
    depend on the order of rows nor on how they were shared out; digests of parts add up (modulo 2^64).

    Args:
        row_ids: (B,) of any integer type; the others (B, T) of any integer type.
        source: of rows that have one its ids and its document ids, (B, S) of any integer type; else nothing.

    Raises:
        ValueError: shapes differ, or a value is not an integer that fits its type above.
    """
    batch, length = input_ids.shape
    same = row_ids.shape == (batch,) and labels.shape == (batch, length) and document_ids.shape == (batch, length)
    if not same or any(array.shape != (batch, source[0].shape[1]) for array in source):
        shapes = [row_ids.shape, labels.shape, document_ids.shape, *(array.shape for array in source)]
        raise ValueError(
            f"shapes {input_ids.shape}, {', '.join(map(str, shapes))}: one row id a row, three arrays of one shape, "
            "and those of a source of another"
        )
    arrays = [input_ids, labels, document_ids, *source]
    record = np.dtype([("row", "<i8"), ("ids", "<i4", (sum(array.shape[1] for array in arrays),))])
    rows = np.empty(batch, dtype=record)
    rows["row"] = _exact(row_ids, np.dtype("<i8"))
    np.concatenate([_exact(array, np.dtype("<i4")) for array in arrays], axis=1, out=rows["ids"])
    flat = memoryview(rows.tobytes())
    size = record.itemsize
    total = sum(xxhash.xxh3_64_intdigest(flat[row * size : (row + 1) * size]) for row in range(batch))
    return total % 2**64


def _exact(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    if array.dtype.kind not in "iu":
        raise ValueError(f"a digest is of integers, got {array.dtype}")
    converted = array.astype(dtype)
    if array.dtype.itemsize >= dtype.itemsize and not np.array_equal(converted, array):
        raise ValueError(f"a value does not fit {dtype}: {array.min()}..{array.max()}")
    return converted
