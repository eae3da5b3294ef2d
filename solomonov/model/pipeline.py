"""The same layers one by one, as the stages of a pipeline take them.

Between layers travels a tuple, the carry. Of one stack it is (hidden (B, T, D), document_ids (B, T)); the first layer
gets (input_ids, document_ids). Of an encoder_decoder it is (source (B, S, D), source's document_ids (B, S), hidden (B,
T, D), document_ids (B, T)); the first layer gets the ids of both and embeds both, the encoder's layers change the
first, and the decoder's the third: the embedded target rides along while the encoder runs, and what the encoder made
of the source while the decoder does, up to its last block: a stage behind that has no gradient to send back for it. So
there is one embedding, on one stage. With value residual the values of a stack's first block travel behind its
hidden, from that block to the last one.

Where the first stack reads no token ids the carry begins with what its front reads, and the documents of that. The
front is a layer before the embedding, which then embeds the target alone.

The last layer returns hidden, the head's weight and, where it has one, its bias, for `loss.pipeline_loss`. Each layer
derives masks and rotary tables from the document ids: a few integers a token cross the wire instead of T booleans.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from solomonov.model.attention import attention_context
from solomonov.model.config import ModelConfig
from solomonov.model.cross import memory_of
from solomonov.model.front import Front
from solomonov.model.init import initial_value, initialise
from solomonov.model.layers import Block, Embedding, FinalNorm, Head, Stream
from solomonov.model.naming import TIED_LAYERS, layer_names
from solomonov.model.stacks import Stack, block_number, stack_of

Carry = tuple[Tensor, ...]
"""What is computed, or at the first layer token ids or what a front reads, and its document ids: of the source, where
there is one, and of what is predicted."""


class FrontStage(Front):
    """`Front` on the carry."""

    def __init__(self, config: ModelConfig, name: str, seed: int) -> None:
        super().__init__(config)
        initialise(self, config, seed, prefix=f"{name}.")

    def forward(self, carry: Carry) -> Carry:  # type: ignore[override]
        """What the first stack reads becomes hidden."""
        return *super().forward(*carry[:2]), *carry[2:]


class EmbeddingStage(Embedding):
    """`Embedding` on the carry."""

    def __init__(self, config: ModelConfig, vocab_size: int, name: str, seed: int) -> None:
        super().__init__(config, vocab_size)
        self.begin = 0 if config.front.kind == "tokens" else 2
        initialise(self, config, seed, prefix=f"{name}.")

    def forward(self, carry: Carry) -> Carry:  # type: ignore[override]
        """Token ids become hidden."""
        embedded = list(carry[: self.begin])
        for input_ids, document_ids in zip(carry[self.begin :: 2], carry[self.begin + 1 :: 2], strict=True):
            embedded += [super().forward(input_ids, self.positions_of(document_ids)), document_ids]
        return tuple(embedded)


class BlockStage(Block):
    """`Block` on the carry."""

    def __init__(self, config: ModelConfig, index: int, name: str, seed: int, selective: bool) -> None:
        super().__init__(config, index, stack_of(config, name), selective=selective)
        initialise(self, config, seed, prefix=f"{name}.")

    def forward(self, carry: Carry, gain: Tensor | None = None) -> Carry:  # type: ignore[override]
        """Changes the stream of its stack; `gain` as of `Block`."""
        before, (*stream, document_ids), behind = _split(carry, self.stack)
        behind_block = self._kept_of(self._on_documents, tuple(stream), document_ids, gain, *before)
        return *self._handed_on(before, behind_block), document_ids, *behind

    def hidden_of(self, stream: Carry) -> Tensor:
        """As of `Block`."""
        return _split(stream, self.stack)[1][0]

    def with_hidden(self, stream: Carry, hidden: Tensor) -> Carry:
        """As of `Block`."""
        before, (_, *rest), behind = _split(stream, self.stack)
        return *before, hidden, *rest, *behind

    def passed_by(self, carry: Carry, *_: Any) -> Carry:
        """As of `Block`."""
        before, (*stream, document_ids), behind = _split(carry, self.stack)
        hidden, *values = super().passed_by(tuple(stream))
        if self._is_last:
            # Perhaps nothing on this stage has used them, which has gradients to send back for them: of 0.
            ending = [each for each in (*before, *values) if each.is_floating_point()]
            hidden = sum((each.flatten()[:0].sum() for each in ending), start=hidden)
        return *self._handed_on(before, (hidden, *values)), document_ids, *behind

    @property
    def _is_last(self) -> bool:
        """Whether no block of its stack is behind this one."""
        return self.index == self.stack.layers - 1

    def _handed_on(self, before: Carry, stream: Stream) -> Carry:
        """What the layers behind this one get of what it was given and made, but for document ids: of the last block of
        a stack hidden alone."""
        return stream[:1] if self._is_last else (*before, *stream)

    def _on_documents(self, stream: Stream, document_ids: Tensor, gain: Tensor | None, *source: Tensor) -> Stream:
        context = attention_context(document_ids, self.config, self.index, stack=self.stack)
        memory = memory_of(source[0], source[1], document_ids) if source else None
        return self._branches(stream, context, None, memory, gain)


class FinalNormStage(FinalNorm):
    """`FinalNorm` on the carry."""

    def __init__(self, config: ModelConfig, name: str, seed: int) -> None:
        super().__init__(config)
        self.stack = stack_of(config, name)
        initialise(self, config, seed, prefix=f"{name}.")

    def forward(self, carry: Carry) -> Carry:  # type: ignore[override]
        """Norms the hidden of its stack."""
        before, (hidden, document_ids), behind = _split(carry, self.stack)
        return *before, super().forward(hidden), document_ids, *behind


def _split(carry: Carry, stack: Stack) -> tuple[Carry, Carry, Carry]:
    """What stands before a stack's own part in the carry, that part, and what stands behind it. Each part ends with its
    document ids, which are all in it that is not of floats."""
    ends = [place + 1 for place, each in enumerate(carry) if not each.is_floating_point()]
    begin, end = (0, ends[0]) if stack.prefix else ([0, *ends][-2], ends[-1])
    return carry[:begin], carry[begin:end], carry[end:]


class HeadStage(Head):
    """`Head` at the end of a pipeline: hands its weight, and its bias where it has one, to the loss. A tied one has a
    copy of the embedding's matrix as its weight."""

    def __init__(self, config: ModelConfig, vocab_size: int, seed: int) -> None:
        super().__init__(config, vocab_size)
        embedding, head = TIED_LAYERS
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                layer = embedding if config.tie_embeddings and name == "weight" else head
                parameter.copy_(initial_value(f"{layer}.{name}", parameter.shape, config, seed))

    def forward(self, carry: Carry) -> Carry:  # type: ignore[override]
        """The carry -> hidden, weight (V, D), and bias (V,) if there is one."""
        hidden = carry[-2] if self.transform is None else self.transform(carry[-2])
        return hidden, *(_handed_over(each) for each in (self.weight, self.bias) if each is not None)


def _handed_over(parameter: Tensor) -> Tensor:
    """The same values as a tensor of their own: DeepSpeed clears gradients when the first one of an output of the
    module comes, and in bf16 that of a parameter which is itself an output would be there already, and be lost."""
    return parameter.view_as(parameter)


@dataclass(frozen=True)
class PipelineLayer:
    """How to build one layer of a pipeline: what a LayerSpec or a TiedLayerSpec is made of."""

    name: str
    """Canonical name of the layer; the position in the list is its number in the pipeline."""

    module_type: type[nn.Module]
    """Class to build, on the stage that owns it."""

    arguments: tuple[Any, ...]
    """Of the constructor."""

    tied_key: str | None = None
    """Of layers with one key each has a copy of `weight`, whose gradients are summed over their stages. They are never
    on one stage."""

    def build(self) -> nn.Module:
        """The module, with its initial values."""
        return self.module_type(*self.arguments)


def pipeline_layers(config: ModelConfig, vocab_size: int, seed: int, *, selective: bool = False) -> list[PipelineLayer]:
    """The layers in order, with the same initial values as `Transformer(config, vocab_size, seed=seed)`.

    Args:
        selective: whether a block keeps only products for the backward pass.
    """
    tied = TIED_LAYERS[0] if config.tie_embeddings else None
    layers = []
    for name in layer_names(config):
        index = block_number(name)
        if index is not None:
            layer = PipelineLayer(name, BlockStage, (config, index, name, seed, selective))
        elif name == "front":
            layer = PipelineLayer(name, FrontStage, (config, name, seed))
        elif name == "embedding":
            layer = PipelineLayer(name, EmbeddingStage, (config, vocab_size, name, seed), tied)
        elif name != "head":
            layer = PipelineLayer(name, FinalNormStage, (config, name, seed))
        else:
            layer = PipelineLayer(name, HeadStage, (config, vocab_size, seed), tied)
        layers.append(layer)
    return layers
