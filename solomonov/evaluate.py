"""Held-out loss and bits per byte, beside gzip -9 and xz -9 of the very same bytes."""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_pipeline.dataset import Dataset
from data_pipeline.stream import HeldOutRows
from data_pipeline.tokenizer import Tokenizer
from solomonov.architectures import require_decoder
from solomonov.errors import ConfigurationError
from solomonov.loading import LoadedModel

BATCH_ROWS = 8


@dataclass(frozen=True)
class Evaluation:
    """What the model makes of held-out text."""

    documents: int
    text_bytes: int
    """UTF-8 bytes of these documents."""
    tokens: int
    """Predicted tokens: every token of every document, its end included."""
    loss: float
    """Mean cross-entropy (nats a token)."""
    bits_per_byte: float
    """All bits that the model needs for the documents, over their bytes."""
    gzip_bits_per_byte: float
    """gzip -9 of the same bytes, documents one after the other."""
    xz_bits_per_byte: float
    """xz -9 of the same bytes."""


def evaluate(model: LoadedModel, data_folder: Path, device: torch.device, *, max_bytes: int) -> Evaluation:
    """Evaluate on whole held-out documents, the first ones up to `max_bytes` (at least one).

    A document longer than a row is read in rows of `sequence_tokens`, each without the text before it, as in
    training; every token is predicted exactly once.

    Raises:
        ConfigurationError: the model is no decoder; the data set has no held-out documents, or another tokenizer than
            the model.
    """
    require_decoder(model.config, "evaluate")
    module = model.module(device)
    tokenizer = Tokenizer.load(model.tokenizer_model)
    with Dataset.open(data_folder) as dataset:
        if dataset.manifest.tokenizer_digest != tokenizer.digest:
            raise ConfigurationError(
                "the data set and the model have different tokenizers",
                got=f"{dataset.manifest.tokenizer_digest} in {data_folder}, {tokenizer.digest} in {model.source}",
                rule="a model is evaluated on data that was prepared with its own tokenizer",
                remedy="name the data set that the model was trained on",
            )
        documents, text = _take(dataset, model.sequence_tokens, tokenizer, max_bytes)
    if not documents:
        raise ConfigurationError(
            "the data set holds nothing out",
            got=f"no held-out documents in {data_folder}",
            rule="evaluation reads documents that training never saw",
            remedy="prepare the data with data.prepare.held_out_fraction above 0",
        )
    total, tokens = 0.0, 0
    for input_ids, labels in _batches(documents, model.sequence_tokens):
        inputs, targets = torch.from_numpy(input_ids).to(device), torch.from_numpy(labels).to(device)
        with torch.no_grad():
            total += float(module(inputs, torch.where(targets == -100, -1, 0), targets))
        tokens += int((targets != -100).sum())
    return Evaluation(
        documents=len(documents),
        text_bytes=len(text),
        tokens=tokens,
        loss=total / tokens,
        bits_per_byte=total / math.log(2) / len(text),
        gzip_bits_per_byte=8 * len(gzip.compress(text, 9, mtime=0)) / len(text),
        xz_bits_per_byte=8 * len(lzma.compress(text, preset=9)) / len(text),
    )


def _take(
    dataset: Dataset, sequence_tokens: int, tokenizer: Tokenizer, max_bytes: int
) -> tuple[list[np.ndarray], bytes]:
    """The first held-out documents whose text fits `max_bytes` (at least one), and their text."""
    held_out = HeldOutRows(dataset, sequence_tokens=sequence_tokens, packing="concat", documents_only=True)
    documents: list[np.ndarray] = []
    texts: list[bytes] = []
    size = 0
    for document in held_out.documents():
        text = tokenizer.decode([int(i) for i in document[1:-1]]).encode()
        if documents and size + len(text) > max_bytes:
            break
        documents.append(document)
        texts.append(text)
        size += len(text)
    return documents, b"".join(texts)


def _batches(documents: list[np.ndarray], sequence_tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of one piece of one document each, longest first, so that a batch carries little padding."""
    pieces = [
        document[start : start + sequence_tokens + 1].astype(np.int64)
        for document in documents
        for start in range(0, len(document) - 1, sequence_tokens)
    ]
    pieces.sort(key=len, reverse=True)
    for first in range(0, len(pieces), BATCH_ROWS):
        part = pieces[first : first + BATCH_ROWS]
        width = len(part[0]) - 1
        input_ids = np.zeros((len(part), width), dtype=np.int64)
        labels = np.full((len(part), width), -100, dtype=np.int64)
        for row, piece in enumerate(part):
            input_ids[row, : len(piece) - 1] = piece[:-1]
            labels[row, : len(piece) - 1] = piece[1:]
        yield input_ids, labels
