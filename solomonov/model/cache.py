"""Keys and values of the tokens already seen, so that generation computes each token once."""

from __future__ import annotations

import torch
from torch import Tensor

from solomonov.model.config import ModelConfig


class LayerCache:
    """Keys and values of one block."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.tokens = 0

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, K, T, E) keys and values; returns all of them so far, (B, K, S, E) each."""
        begin, end = self.tokens, self.tokens + keys.shape[2]
        self.keys[:, :, begin:end] = keys
        self.values[:, :, begin:end] = values
        self.tokens = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class KeyValueCache:
    """The caches of all blocks and the document ids seen, in memory allocated once.

    Args:
        config: the model's shape.
        batch_rows: B.
        capacity_tokens: most tokens of a row, prompt included.
        dtype, device: those of the model's activations.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch_rows: int,
        capacity_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (batch_rows, config.kv_head_count, capacity_tokens, config.head_width)
        self.layers = [
            LayerCache(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
            for _ in range(config.layers)
        ]
        self.capacity_tokens = capacity_tokens
        self.document_ids = torch.empty((batch_rows, 0), dtype=torch.int32, device=device)

    @property
    def tokens(self) -> int:
        """Tokens of a row seen so far."""
        return self.document_ids.shape[1]

    def append_documents(self, document_ids: Tensor) -> Tensor:
        """Note the document ids (B, T) of new tokens; returns those of all tokens, (B, S).

        Raises:
            ValueError: more tokens than the cache was made for.
        """
        total = self.tokens + document_ids.shape[1]
        if total > self.capacity_tokens:
            raise ValueError(f"{total} tokens do not fit in a cache made for {self.capacity_tokens}")
        self.document_ids = torch.cat((self.document_ids, document_ids.to(self.document_ids.dtype)), dim=1)
        return self.document_ids
