"""Keys and values of the tokens already seen, so that generation computes each token once."""

from __future__ import annotations

import torch
from torch import Tensor

from solomonov.model.config import ModelConfig


class LayerCache:
    """Keys and values of one block.

    Attributes:
        source: in a decoder behind an encoder, those of cross-attention, (B, S, K, E) each, from the first call on.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values
        self.source: tuple[Tensor, Tensor] | None = None
        self.tokens = 0

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, K, T, E) keys and values; returns all of them so far, (B, K, S, E) each."""
        begin, end = self.tokens, self.tokens + keys.shape[2]
        self.keys[:, :, begin:end] = keys
        self.values[:, :, begin:end] = values
        self.tokens = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class WindowCache(LayerCache):
    """Keys and values of one local block: of the tokens before the new ones only those within its window.

    Args:
        keys, values: (B, K, 0, E), of no tokens.
        window: tokens that are kept.
    """

    def __init__(self, keys: Tensor, values: Tensor, window: int) -> None:
        super().__init__(keys, values)
        self.window = window

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, K, T, E) keys and values; returns them after those that were kept."""
        keys, values = torch.cat((self.keys, keys), dim=2), torch.cat((self.values, values), dim=2)
        # Copies, or a long prompt would stay as a whole.
        self.keys, self.values = keys[:, :, -self.window :].clone(), values[:, :, -self.window :].clone()
        self.tokens = self.keys.shape[2]
        return keys, values


class KeyValueCache:
    """The caches of all blocks and the document ids seen, in memory allocated once but for
    local blocks, which keep a window. Of an encoder_decoder those of the decoder, with the source's.

    Args:
        config: the model's shape.
        batch_rows: B.
        capacity_tokens: most tokens of a row, prompt included.
        dtype, device: those of the model's activations.

    Raises:
        ValueError: an encoder has no use for it: what it makes of a token follows from all the others.

    Attributes:
        source_document_ids: (B, S) of the source, once it was read.
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
        def tensor(tokens: int) -> Tensor:
            shape = (batch_rows, config.kv_head_count, tokens, config.head_width)
            return torch.empty(shape, dtype=dtype, device=device)

        if config.architecture == "encoder":
            raise ValueError(
                "architecture encoder has nothing to cache: each new token changes what is made of those before it. "
                "Give it all tokens of a row at once"
            )
        self.source_document_ids: Tensor | None = None
        windows = [config.layer_attention(layer).window for layer in range(config.layers)]
        self.layers = [
            LayerCache(tensor(capacity_tokens), tensor(capacity_tokens))
            if window is None
            else WindowCache(tensor(0), tensor(0), window)
            for window in windows
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
