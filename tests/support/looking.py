"""What the float64 loops of `naive` compute on their way: the stream behind each layer, the weights of each head, and
the loss, also without some layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from unittest import mock

import numpy as np

from solomonov.batch import TokenBatch
from solomonov.model.config import ModelConfig
from tests.support import naive
from tests.support.naive import Array


@dataclass
class Looked:
    """Sums over real tokens of all rows."""

    layers: int
    heads: int
    loss: float = 0.0
    """Sum of cross-entropy."""
    streams: Array = field(init=False)
    """(L + 1, 2): squares of the stream's elements, and how many."""
    weights: Array = field(init=False)
    """(L, 4, H): entropy, distance times weight, weight, queries."""

    def __post_init__(self) -> None:
        self.streams, self.weights = np.zeros((self.layers + 1, 2)), np.zeros((self.layers, 4, self.heads))

    @property
    def stream_rms(self) -> Array:
        """(L + 1,)"""
        return np.asarray(np.sqrt(self.streams[:, 0] / self.streams[:, 1]))

    @property
    def entropy(self) -> Array:
        """(L, H) nats a query."""
        return np.asarray(self.weights[:, 0] / self.weights[:, 3])

    @property
    def distance(self) -> Array:
        """(L, H) tokens."""
        return np.asarray(self.weights[:, 1] / self.weights[:, 2])


def look(
    state: Mapping[str, Array],
    config: ModelConfig,
    rows: Sequence[Sequence[Sequence[int]]],
    without: Sequence[int] = (),
) -> Looked:
    """One stack on documents, each on its own.

    Args:
        rows: of each document its token ids and labels (-100: none).
        without: layers that are not there.
    """
    found = Looked(config.layers, config.heads)
    usual_mix, usual_added = naive.softmax_mix, naive.added
    calls, tokens = 0, 0

    def mix(logits: Sequence[float], values: Sequence[Array], sink: float | None = None) -> Array:
        nonlocal calls
        layer, rest = divmod(calls, tokens * config.heads)
        position, head = divmod(rest, config.heads)
        calls += 1
        first = 0 if config.architecture == "encoder" else position + 1 - len(logits)
        total = sum(math.exp(logit) for logit in [*logits, *([] if sink is None else [sink])])
        of_keys = [math.exp(logit) / total for logit in logits]
        outcomes = of_keys if sink is None else [*of_keys, math.exp(sink) / total]
        found.weights[layer, :, head] += (
            -sum(p * math.log(p) for p in outcomes if p > 0.0),
            sum(p * abs(position - first - number) for number, p in enumerate(of_keys)),
            sum(of_keys),
            1.0,
        )
        return usual_mix(logits, values, sink)

    def added(
        state: Mapping[str, Array], branch: str, config: ModelConfig, layer: int, x: Array, b: Array, *factor: float
    ) -> Array:
        after = x if layer in without else usual_added(state, branch, config, layer, x, b, *factor)
        if branch.endswith("feed_forward"):
            found.streams[layer + 1] += (float((after**2).sum()), len(after))
        return after

    with mock.patch.object(naive, "softmax_mix", mix), mock.patch.object(naive, "added", added):
        for ids, labels in rows:
            calls, tokens = 0, len(ids)
            for x in naive.embedded(state, config, ids):
                found.streams[0] += (float((x**2).sum()), len(x))
            for logits, label in zip(naive.logits(state, config, ids), labels, strict=True):
                found.loss += 0.0 if label == -100 else naive.cross_entropy(logits, label)
    return found


def documents_of(batch: TokenBatch) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of each document of some rows; padding is left out."""
    found = []
    for ids, labels, documents in zip(batch.input_ids, batch.labels, batch.document_ids, strict=True):
        for number in sorted(set(documents.tolist()) - {-1}):
            here = documents == number
            found.append((ids[here].tolist(), labels[here].tolist()))
    return found
