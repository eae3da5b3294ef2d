"""Lengths against their definition, and cut rows against the same pieces as rows of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.rows import RowBatch
from solomonov.batch import to_tensors
from solomonov.errors import ConfigurationError
from solomonov.model.transformer import Transformer
from solomonov.warmup import SequenceLengths, WarmupConfig, sequence_lengths
from tests.support.tiny import CPU, VOCAB, tiny_model


def test_lengths_by_hand() -> None:
    """From 64 to 512 over 448 tokens, a token more for each: the greatest divisor of 512 that is not above the line."""
    lengths = sequence_lengths(WarmupConfig(from_tokens=64, tokens=448), 512)
    found = [lengths.at(trained) for trained in (0, 63, 64, 191, 192, 447, 448, 10**12)]
    assert found == [64, 64, 128, 128, 256, 256, 512, 512]
    assert [sequence_lengths(None, 12).at(trained) for trained in (0, 5)] == [12, 12]
    twelfths = sequence_lengths(WarmupConfig(from_tokens=2, tokens=100), 12)
    assert [twelfths.at(trained) for trained in range(0, 101, 10)] == [2, 3, 4, 4, 6, 6, 6, 6, 6, 6, 12]


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 10**6), st.lists(st.integers(0, 2 * 10**6), min_size=2))
def test_lengths_are_the_greatest_divisors_below_the_line(
    first: int, times: int, over: int, trained: list[int]
) -> None:
    full = first * (times + 1)
    lengths = SequenceLengths(full, first, over)
    found = [lengths.at(tokens) for tokens in sorted(trained)]
    assert found == sorted(found), "they never fall"
    for tokens, length in zip(sorted(trained), found, strict=True):
        assert (length == full) == (tokens >= over)
        legal = [d for d in range(first, full + 1) if full % d == 0 and (d - first) * over <= (full - first) * tokens]
        assert length == max(legal)


@pytest.mark.parametrize(
    ("first", "remedy"), [(48, "one of 16, 32, 64"), (512, "one of 64, 128, 256"), (600, "one of 64")]
)
def test_lengths_that_do_not_divide_a_row_are_refused(first: int, remedy: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        sequence_lengths(WarmupConfig(from_tokens=first, tokens=100), 512)
    assert f"sequence_warmup.from_tokens {first}" in caught.value.got
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("length", [2, 4, 8])
def test_cut_rows_lose_what_their_pieces_lose_as_rows(length: int) -> None:
    """Losses and gradients: positions restart at a cut, and attention does not cross it."""
    draw, full = np.random.default_rng(length), 16
    labels = draw.integers(0, VOCAB, (3, full), dtype=np.int32)
    documents = np.sort(draw.integers(0, 3, (3, full), dtype=np.int32))
    labels[1, 11:], documents[1, 11:] = -100, -1
    rows = RowBatch(np.arange(3), draw.integers(0, VOCAB, (3, full), dtype=np.int32), labels, documents)
    pieces = RowBatch(
        np.arange(3 * full // length),
        *(array.reshape(-1, length) for array in (rows.input_ids, rows.labels, rows.document_ids)),
    )
    found = []
    for batch in (to_tensors(rows.cut(length), CPU), to_tensors(pieces, CPU)):
        model = Transformer(tiny_model(), VOCAB, seed=3)
        loss = model(batch.input_ids, batch.document_ids, batch.labels)
        loss.backward()
        gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
        found.append((float(loss.detach()), gradient, batch.valid_tokens))
    (loss, gradient, tokens), (expected, expected_gradient, expected_tokens) = found
    assert tokens == expected_tokens == 43
    assert loss == pytest.approx(expected, rel=1e-5)
    assert torch.linalg.vector_norm(gradient - expected_gradient) <= 1e-5 * torch.linalg.vector_norm(expected_gradient)
    whole = to_tensors(rows, CPU)
    uncut = Transformer(tiny_model(), VOCAB, seed=3)(whole.input_ids, whole.document_ids, whole.labels)
    assert float(uncut.detach()) != pytest.approx(loss, rel=1e-5), "the cut makes no difference to these rows"
