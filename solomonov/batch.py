"""Rows as tensors on this rank's device, and the digest of what the model was really given."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from data_pipeline.rows import RowBatch, rows_digest


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

    @property
    def valid_tokens(self) -> int:
        """Positions with something to predict."""
        return int((self.labels != -100).sum().item())

    def digest(self) -> int:
        """Sum modulo 2^64 over the rows of xxh3-64 of row id, input ids, labels and document ids, read back from the
        tensors themselves."""
        return rows_digest(
            self.row_ids.numpy(),
            self.input_ids.cpu().numpy(),
            self.labels.cpu().numpy(),
            self.document_ids.cpu().numpy(),
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


def empty_batch(sequence_tokens: int, device: torch.device, rows: int = 1) -> TokenBatch:
    """A micro-batch of padding: loss 0, weight 0. Keeps a rank without rows in step with the others."""
    ids = torch.zeros((rows, sequence_tokens), dtype=torch.int64, device=device)
    return TokenBatch(torch.zeros(rows, dtype=torch.int64), ids, torch.full_like(ids, -100), torch.full_like(ids, -1))


def padded(batch: TokenBatch, rows: int) -> TokenBatch:
    """The same micro-batch with so many rows: those that are missing are padding."""
    missing = rows - len(batch.row_ids)
    if missing <= 0:
        return batch
    more = empty_batch(batch.input_ids.shape[1], batch.input_ids.device, missing)
    names = ("row_ids", "input_ids", "labels", "document_ids")
    return TokenBatch(*(torch.cat([getattr(batch, name), getattr(more, name)]) for name in names))
