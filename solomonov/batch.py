"""Rows as tensors on this rank's device, and the digest of what the model was really given."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from data_pipeline.rows import RowBatch, rows_digest
from solomonov.model.cross import Source


@dataclass(frozen=True)
class TokenBatch:
    """One micro-batch as the model gets it."""

    row_ids: torch.Tensor
    """(B,) int64 on the CPU: the rows' numbers in the stream."""
    input_ids: torch.Tensor
    """(B, T) int64."""
    labels: torch.Tensor
    """(B, T) int64; -100 where nothing is predicted."""
    document_ids: torch.Tensor
    """(B, T) int64, counted from 0 in each row; -1 on padding."""
    source: Source | None = None
    """What an encoder reads: (B, S) int64 each, documents numbered as those of the rows; None where there is none."""

    @property
    def valid_tokens(self) -> int:
        """Positions with something to predict."""
        return int((self.labels != -100).sum().item())

    def carry(self) -> tuple[torch.Tensor, ...]:
        """What the first stage of a pipeline gets (see `model.pipeline`)."""
        return *(self.source or ()), self.input_ids, self.document_ids

    def digest(self) -> int:
        """Sum modulo 2^64 over the rows of xxh3-64 of row id, input ids, labels, document ids and source, read back
        from the tensors themselves."""
        return rows_digest(
            self.row_ids.numpy(),
            self.input_ids.cpu().numpy(),
            self.labels.cpu().numpy(),
            self.document_ids.cpu().numpy(),
            *(tensor.cpu().numpy() for tensor in self.source or ()),
        )


def to_tensors(rows: RowBatch, device: torch.device) -> TokenBatch:
    """Copy one micro-batch of rows to the device (from pinned memory on CUDA, without waiting)."""

    def move(array: object) -> torch.Tensor:
        tensor = torch.as_tensor(array, dtype=torch.int64)
        if device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(device, non_blocking=True)

    return TokenBatch(
        row_ids=torch.as_tensor(rows.row_ids, dtype=torch.int64),
        input_ids=move(rows.input_ids),
        labels=move(rows.labels),
        document_ids=move(rows.document_ids),
    )


def empty_batch(
    sequence_tokens: int, device: torch.device, rows: int = 1, *, source_tokens: int | None = None
) -> TokenBatch:
    """A micro-batch of padding: loss 0, weight 0. Keeps a rank without rows in step with the others.

    Args:
        source_tokens: S; None: rows without a source.
    """

    def filled(tokens: int, value: int) -> torch.Tensor:
        return torch.full((rows, tokens), value, dtype=torch.int64, device=device)

    numbers = torch.zeros(rows, dtype=torch.int64)
    source = None if source_tokens is None else Source(filled(source_tokens, 0), filled(source_tokens, -1))
    return TokenBatch(
        numbers, filled(sequence_tokens, 0), filled(sequence_tokens, -100), filled(sequence_tokens, -1), source
    )


def padded(batch: TokenBatch, rows: int) -> TokenBatch:
    """The same micro-batch with so many rows: those that are missing are padding."""
    missing = rows - len(batch.row_ids)
    if missing <= 0:
        return batch
    tokens, of_source = batch.input_ids.shape[1], None if batch.source is None else batch.source.input_ids.shape[1]
    more = empty_batch(tokens, batch.input_ids.device, missing, source_tokens=of_source)
    source = None
    if batch.source is not None and more.source is not None:
        source = Source(*(torch.cat(both) for both in zip(batch.source, more.source, strict=True)))
    return TokenBatch(
        torch.cat([batch.row_ids, more.row_ids]),
        torch.cat([batch.input_ids, more.input_ids]),
        torch.cat([batch.labels, more.labels]),
        torch.cat([batch.document_ids, more.document_ids]),
        source,
    )
