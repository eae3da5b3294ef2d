"""Cross-attention: a decoder's tokens look at what an encoder made of the source. A document of the target sees the
source's document of the same id, all of it and without positions; of the attention's flags it takes QK norm and gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from solomonov.model.attention import Projections, attend
from solomonov.model.cache import LayerCache
from solomonov.model.packed import PackedPlan
from solomonov.model.window import same_document


class Source(NamedTuple):
    """Rows that an encoder reads, of S tokens each."""

    input_ids: Tensor
    """(B, S) integers, or what the model's front reads (see `front.Front`)."""

    document_ids: Tensor
    """(B, S) integers (one a frame where it reads frames), equal within a document, -1 on padding; those of the target
    that belongs to it."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What all blocks of a decoder look at of the source."""

    hidden: Tensor | None
    """(B, S, D), what the encoder made of it; None: its keys and values are cached."""

    mask: Tensor | None
    """(B, 1, T, S) bool, true where a query may look; all of it where a query sees nothing. None: `packed` says it."""

    packed: PackedPlan | None
    """Who looks at whom, where a CPU's kernel finds it out."""

    nothing: Tensor
    """(B, T, 1, 1) bool, true where a query's document has no source: it finds 0."""


def memory_of(hidden: Tensor | None, source_document_ids: Tensor, document_ids: Tensor) -> Memory:
    """The source as a decoder looks at it.

    Args:
        hidden: (B, S, D) of the encoder; None: it is cached.
        source_document_ids: (B, S).
        document_ids: (B, T) of the queries.
    """
    ascending = source_document_ids.sort(dim=1).values
    asking = document_ids.to(ascending.dtype).contiguous()
    place = torch.searchsorted(ascending, asking).clamp(max=ascending.shape[1] - 1)
    nothing = (ascending.gather(1, place) != asking)[..., None, None]
    if document_ids.device.type == "cpu":
        return Memory(hidden, None, PackedPlan(document_ids, source_document_ids, causal=False), nothing)
    # A query without keys would be a softmax of minus infinities: it looks anywhere, and what it found is dropped.
    mask = same_document(document_ids, source_document_ids) | nothing[..., 0]
    return Memory(hidden, mask[:, None], None, nothing)


class CrossAttention(Projections):
    """Attention of H query heads of the target over K key-value heads of the source."""

    def forward(self, x: Tensor, memory: Memory, past: LayerCache | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D).

        Args:
            past: keeps keys and values of the source from the first call on, which needs the encoder's result.
        """
        query = self.split(self.q(x), self.heads)
        if self.q_norm is not None:
            query = self.normed(query, self.q_norm)
        if past is None:
            key, value = self._of_source(memory)
        else:
            if past.source is None:
                past.source = self._of_source(memory)
            key, value = past.source
        mixed = attend(query, key, value, mask=memory.mask, packed=memory.packed)
        return self.joined(mixed.masked_fill(memory.nothing, 0.0), x)

    def _of_source(self, memory: Memory) -> tuple[Tensor, Tensor]:
        """Keys and values, (B, S, K, E) each."""
        assert memory.hidden is not None, "keys and values of the source are not cached, and no source came"
        key = self.split(self.k(memory.hidden), self.kv_heads)
        value = self.split(self.v(memory.hidden), self.kv_heads)
        return key if self.k_norm is None else self.normed(key, self.k_norm), value
