"""The model as one module, for everything but a pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor, nn

from solomonov.model.attention import AttentionContext, SequenceShare, layer_contexts
from solomonov.model.cache import KeyValueCache
from solomonov.model.config import NOTHING_AGAIN, ModelConfig, Recompute
from solomonov.model.cross import Memory, Source, memory_of
from solomonov.model.front import Front
from solomonov.model.init import initialise
from solomonov.model.layers import Block, Embedding, FinalNorm, Head, Stream
from solomonov.model.recompute import in_groups
from solomonov.model.residual import has_final_norm
from solomonov.model.stacks import Stack


class Encoder(nn.Module):
    """The stack of an encoder_decoder that reads the source.

    Args:
        config: shape of the whole.
        stack: the first of its stacks.
        recompute: what the backward pass computes again.
    """

    def __init__(self, config: ModelConfig, stack: Stack, recompute: Recompute) -> None:
        super().__init__()
        self.config, self.stack, self.recompute = config, stack, recompute
        self.layers = _blocks(config, stack, recompute)
        self.final_norm = FinalNorm(config) if has_final_norm(config, stack) else None

    def forward(self, hidden: Tensor, document_ids: Tensor) -> Tensor:
        """Embedded (B, S, D) of documents (B, S) -> (B, S, D)."""
        contexts = layer_contexts(document_ids, self.config, stack=self.stack)
        again = self.recompute if self.training else NOTHING_AGAIN
        hidden = _through(self.layers, hidden, contexts, again)
        return hidden if self.final_norm is None else self.final_norm(hidden)


class Transformer(nn.Module):
    """Transformer of any architecture.

    Args:
        config: its shape.
        vocab_size: V.
        seed: of the initial values; None leaves all parameters unset, to be loaded.
        recompute: what the backward pass computes again.

    Attributes:
        share: this rank's share of rows that several ranks compute together; None: it has them whole.
        embedding: only where a stack reads tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        *,
        seed: int | None,
        recompute: Recompute = NOTHING_AGAIN,
    ) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.recompute = recompute
        self.share: SequenceShare | None = None
        *encoders, stack = config.stacks
        self.front = None if config.front.kind == "tokens" else Front(config)
        self.embedding: Embedding
        if config.reads_tokens:
            self.embedding = Embedding(config, vocab_size)
        self.encoder = Encoder(config, encoders[0], recompute) if encoders else None
        self.layers = _blocks(config, stack, recompute)
        self.final_norm = FinalNorm(config) if has_final_norm(config) else None
        self.head = Head(config, vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        if seed is not None:
            initialise(self, config, seed)

    def blocks(self) -> Iterator[Block]:
        """The blocks of all stacks, in the order in which they run."""
        return (module for module in self.modules() if isinstance(module, Block))

    def forward(
        self,
        input_ids: Tensor,
        document_ids: Tensor,
        labels: Tensor | None = None,
        *,
        source: Source | None = None,
        cache: KeyValueCache | None = None,
        with_z: bool = False,
    ) -> Tensor:
        """Logits, or the loss.

        Args:
            input_ids: (B, T) integers; with `share` this rank's tokens, likewise `labels`. Of an encoder with a front
                what that reads, floats (see `front.Front`).
            document_ids: (B, T) integers, equal within a document, -1 on padding; with `share` of all tokens; of frames
                one each.
            labels: (B, T) integers, -100 where nothing is predicted.
            source: of an encoder_decoder, what its encoder reads; with `cache` in the first call only.
            cache: keys and values of the tokens before these; these are added to it.
            with_z: with labels, also the sum of ln^2 Z.

        Returns:
            Without labels: logits (B, T, V). With labels: fp32 scalar, the sum of the cross-entropy over the
            labels that count; divide it by their number over the whole batch. With `with_z`, fp32 (2,): that sum, and
            that of ln^2 Z, see `loss.cross_entropy_and_z_sums`.

        Raises:
            ValueError: a source is missing, or there is one that nothing reads; the cache is full; a row is longer
                than there are learned positions.
        """
        memory = self._memory(document_ids, source, cache)
        hidden = None
        if self.front is not None and self.encoder is None:
            assert self.share is None, "rows that a front reads are not cut up between ranks"
            hidden, document_ids = self.front(input_ids, document_ids)
        seen = document_ids if cache is None else cache.append_documents(document_ids)
        new_tokens = None if cache is None else input_ids.shape[1]
        contexts = layer_contexts(seen, self.config, new_tokens=new_tokens, share=self.share)
        if hidden is None:
            hidden = self.embedding(input_ids, self.embedding.positions_of(seen, new_tokens, self.share))
        again = self.recompute if self.training and cache is None else NOTHING_AGAIN
        hidden = _through(self.layers, hidden, contexts, again, memory, cache)
        if self.final_norm is not None:
            hidden = self.final_norm(hidden)
        return self.head(hidden, labels, with_z=with_z)  # type: ignore[no-any-return]

    def _memory(self, document_ids: Tensor, source: Source | None, cache: KeyValueCache | None) -> Memory | None:
        """What the decoder looks at of the source."""
        if self.encoder is None:
            if source is not None:
                raise ValueError(
                    f"architecture {self.config.architecture} reads no source, and got one of "
                    f"{source.input_ids.shape[1]} tokens: leave it out, or take encoder_decoder"
                )
            return None
        assert self.share is None, "rows with a source are not cut up between ranks"
        cached = None if cache is None else cache.source_document_ids
        if (source is None) == (cached is None):
            raise ValueError(
                f"architecture encoder_decoder {'got no source' if source is None else 'got a second source'}: give "
                "the source's token ids and document ids, with a cache in its first call and in no other"
            )
        if source is None:
            assert cached is not None, "one of the two is there"
            return memory_of(None, cached, document_ids)
        hidden, of_source = source
        if self.front is not None:
            hidden, of_source = self.front(hidden, of_source)
        else:
            hidden = self.embedding(hidden, self.embedding.positions_of(of_source))
        if cache is not None:
            cache.source_document_ids = of_source
        return memory_of(self.encoder(hidden, of_source), of_source, document_ids)


def _blocks(config: ModelConfig, stack: Stack, recompute: Recompute) -> nn.ModuleList:
    """The blocks of a stack."""
    selective = recompute.mode == "selective"
    return nn.ModuleList([Block(config, index, stack, selective=selective) for index in range(stack.layers)])


def _through(
    blocks: nn.ModuleList,
    hidden: Tensor,
    contexts: Sequence[AttentionContext],
    again: Recompute,
    memory: Memory | None = None,
    cache: KeyValueCache | None = None,
) -> Tensor:
    """What the blocks of a stack make of (B, T, D), one after the other."""
    stream: Stream = (hidden,)
    if again.mode == "full":
        layers = [
            partial(block, context=context, memory=memory) for block, context in zip(blocks, contexts, strict=True)
        ]
        return in_groups(layers, stream, again.every)[0]
    for index, block in enumerate(blocks):
        stream = block(stream, contexts[index], None if cache is None else cache.layers[index], memory)
    return stream[0]


def compile_blocks(model: nn.Module) -> int:
    """Compile every block in place, each on its own, so that depth does not lengthen compilation.

    Parameter names stay as they are. Returns how many blocks there were.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        block.compile(dynamic=False)
    return len(blocks)
