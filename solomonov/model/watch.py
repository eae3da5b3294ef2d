"""What blocks do in forward passes that run anyway: the size of the stream behind each, and where its heads look.

Sums over real tokens, never means: those of several ranks, each with rows, tokens or layers of its own, add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from solomonov.model.attention import SequenceShare
from solomonov.model.attention_config import LayerAttention
from solomonov.model.config import ModelConfig
from solomonov.model.layers import Block, Stream
from solomonov.model.positions import alibi_slopes
from solomonov.model.signal import hooked

MOST_SCORES = 1 << 24
"""Attention weights that are there at a time: 64 MiB, and some times as much for what is computed of them."""


class Watch:
    """Looks at blocks while `looking`, at the rows that `rows` names before each forward pass.

    Args:
        config: the model's shape.
        blocks: this rank's, by their number through all stacks.
        device: where they compute.
        share: this rank's share of rows that several ranks compute together.
        gather: with a share, this rank's (B, T/S, ...) -> all tokens' (B, T, ...); collective over these ranks.
    """

    def __init__(
        self,
        config: ModelConfig,
        blocks: Mapping[int, Block],
        device: torch.device,
        share: SequenceShare | None = None,
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._config, self._blocks, self._share, self._gather = config, blocks, share, gather
        self._places = [(stack, index) for stack in config.stacks for index in range(stack.layers)]
        self._documents: dict[str, Tensor] = {}
        layers = len(self._places)
        self.streams = torch.zeros(layers + 1, 2, dtype=torch.float64, device=device)
        """Of the stream behind the embedding and behind each block, 0 where that is another rank's: the sum of the
        squares of its elements, and how many they are."""
        self.heads = torch.zeros(layers, 4, config.heads, dtype=torch.float64, device=device)
        """`attention_sums` of each block, 0 where it is another rank's."""

    def rows(self, document_ids: Tensor, source_document_ids: Tensor | None = None) -> None:
        """The next forward pass is over these rows, and maybe others of padding behind them.

        Args:
            document_ids: (B, T), -1 on padding; with a share of all tokens.
            source_document_ids: (B, S) of an encoder_decoder's source; where they are missing its encoder is not
                looked at.
        """
        *encoders, last = self._config.stacks
        self._documents = {last.prefix: document_ids}
        if encoders and source_document_ids is not None:
            self._documents[encoders[0].prefix] = source_document_ids

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Inside, forward passes of the model are looked at; what they compute stays the same."""
        with ExitStack() as hooks:
            for number, block in self._blocks.items():
                hooks.enter_context(hooked(block, partial(self._passed, number)))
                hooks.callback(setattr, block.attention, "observer", None)
                block.attention.observer = partial(self._attended, number)
            yield

    def _passed(self, number: int, block: nn.Module, given: tuple[Any, ...], result: Stream) -> None:
        assert isinstance(block, Block), f"a {type(block).__name__} was hooked as a block"
        if number == 0:
            self._measure(number, block.hidden_of(given[0]))
        self._measure(number + 1, block.hidden_of(result))

    def _measure(self, at: int, hidden: Tensor) -> None:
        """Take in the stream (B, T, D) behind a block, or the embedding."""
        prefix = self._places[max(0, at - 1)][0].prefix
        if prefix not in self._documents:
            return
        documents = self._documents[prefix]
        mine = documents if self._share is None else documents[:, self._share.tokens(documents.shape[1])]
        norms = torch.linalg.vector_norm(hidden[: len(mine)], dim=-1, dtype=torch.float32)
        self.streams[at, 0] += torch.where(mine >= 0, norms.double().square(), 0.0).sum()
        self.streams[at, 1] += (mine >= 0).sum() * hidden.shape[-1]

    def _attended(self, number: int, query: Tensor, key: Tensor, sink: Tensor | None) -> None:
        stack, index = self._places[number]
        if stack.prefix not in self._documents:
            return
        documents, begin = self._documents[stack.prefix], 0
        if self._share is not None and self._gather is not None:
            key, begin = self._gather(key), self._share.tokens(documents.shape[1]).start
        kind = self._config.layer_attention(index, stack)
        for row, ids in enumerate(documents):
            self.heads[number] += attention_sums(query[row], key[row], ids, kind, sink=sink, begin=begin)


def attention_sums(
    query: Tensor,
    key: Tensor,
    document_ids: Tensor,
    kind: LayerAttention,
    *,
    sink: Tensor | None = None,
    begin: int = 0,
) -> Tensor:
    """How widely and how far the heads of a layer look, written out plainly: softmax(q k / sqrt(E) + bias) in fp32.

    Args:
        query: (T, H, E) as the product takes it: normed, rotated and scaled.
        key: (S, K, E) likewise, of all tokens of the row; each serves H/K heads.
        document_ids: (S,), -1 on padding, whose queries do not count.
        kind: what the layer does.
        sink: (H,) logits.
        begin: number of the first query among the keys.

    Returns:
        (4, H) float64, each a sum over the queries: the entropy in nats, of which a sink is one of the outcomes; the
        distance in tokens times the weight; the weight, which is 1 a query less what a sink takes; and 1.
    """
    (tokens, heads, width), (total, kv_heads, _) = query.shape, key.shape
    keys = key.permute(1, 2, 0).float()
    index = torch.arange(total, device=query.device)
    slopes = torch.tensor(alibi_slopes(heads), device=query.device) if kind.position == "alibi" else None
    sums = torch.zeros(4, heads, dtype=torch.float64, device=query.device)
    step = max(1, MOST_SCORES // (heads * total))
    # Autocast would compute the product in bf16.
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        for first in range(0, tokens, step):
            part = query[first : first + step].float() / math.sqrt(width)
            asking = slice(begin + first, begin + first + len(part))
            low = max(0, asking.start - kind.window + 1) if kind.window is not None else 0
            seen = slice(low, asking.stop if kind.causal else total)
            grouped = part.view(len(part), kv_heads, -1, width).permute(1, 2, 0, 3).flatten(1, 2)
            scores = (grouped @ keys[:, :, seen]).view(heads, len(part), -1)
            distance = index[asking, None] - index[seen]
            if slopes is not None:
                scores = scores - slopes[:, None, None] * distance
            sees = document_ids[asking, None] == document_ids[seen]
            if kind.causal:
                sees &= (distance >= 0) & (distance < (total if kind.window is None else kind.window))
            scores = scores.masked_fill(~sees, -math.inf)
            if sink is not None:
                scores = torch.cat([scores, sink.float()[:, None, None].expand(-1, len(part), 1)], dim=2)
            weights = scores.softmax(dim=2)
            entropy = torch.special.entr(weights).sum(dim=2)
            weights = weights[..., : distance.shape[1]]
            found = torch.stack(
                [entropy, (weights * distance.abs()).sum(dim=2), weights.sum(dim=2), torch.ones_like(entropy)]
            )
            sums += torch.where(document_ids[asking] >= 0, found.double(), 0.0).sum(dim=2)
    return sums
