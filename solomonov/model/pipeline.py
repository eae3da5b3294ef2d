"""The same layers one by one, as the stages of a pipeline take them.

Between layers travels the tuple (hidden (B, T, D), document_ids (B, T)); the first layer gets (input_ids,
document_ids), the last returns (hidden, head weight), for `loss.pipeline_loss`. Each layer derives mask and
rotary tables from the document ids: a few integers a token cross the wire instead of T booleans.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from solomonov.model.attention import attention_context, token_positions
from solomonov.model.config import ModelConfig
from solomonov.model.init import initialise
from solomonov.model.layers import Block, Embedding, FinalNorm, Head
from solomonov.model.naming import TIED_LAYERS, layer_names

Carry = tuple[Tensor, Tensor]
"""(hidden (B, T, D), document_ids (B, T)), or at the first layer (input_ids (B, T), document_ids)."""


class EmbeddingStage(Embedding):
    """`Embedding` on the carry."""

    def __init__(self, config: ModelConfig, vocab_size: int, name: str, seed: int) -> None:
        super().__init__(config, vocab_size)
        initialise(self, config, seed, prefix=f"{name}.")

    def forward(self, carry: Carry) -> Carry:  # type: ignore[override]
        """(input_ids, document_ids) -> (hidden, document_ids)."""
        input_ids, document_ids = carry
        positions = token_positions(document_ids) if self.sinusoidal else None
        return super().forward(input_ids, positions), document_ids


class BlockStage(Block):
    """`Block` on the carry."""

    def __init__(self, config: ModelConfig, index: int, name: str, seed: int, selective: bool) -> None:
        super().__init__(config, index, selective=selective)
        self.config, self.index = config, index
        initialise(self, config, seed, prefix=f"{name}.")

    def forward(self, carry: Carry) -> Carry:  # type: ignore[override]
        """(hidden, document_ids) -> (hidden, document_ids)."""
        hidden, document_ids = carry
        return self._kept_of(self._on_documents, hidden, document_ids), document_ids

    def _on_documents(self, hidden: Tensor, document_ids: Tensor) -> Tensor:
        return self._both_branches(hidden, attention_context(document_ids, self.config, self.index))


class FinalNormStage(FinalNorm):
    """`FinalNorm` on the carry."""

    def __init__(self, config: ModelConfig, name: str, seed: int) -> None:
        super().__init__(config)
        initialise(self, config, seed, prefix=f"{name}.")

    def forward(self, carry: Carry) -> Carry:  # type: ignore[override]
        """(hidden, document_ids) -> (hidden, document_ids)."""
        hidden, document_ids = carry
        return super().forward(hidden), document_ids


class HeadStage(Head):
    """`Head` at the end of a pipeline: hands its weight to the loss."""

    def __init__(self, config: ModelConfig, vocab_size: int, name: str, seed: int) -> None:
        super().__init__(config, vocab_size)
        initialise(self, config, seed, prefix=f"{name}.")

    def forward(self, carry: Carry) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(hidden, document_ids) -> (hidden, weight (V, D))."""
        return carry[0], _handed_over(self.weight)


def tied_head(embedding: nn.Module, carry: Carry) -> tuple[Tensor, Tensor]:
    """`HeadStage` with the embedding's matrix: (hidden, document_ids) -> (hidden, weight (V, D))."""
    weight = embedding.weight
    assert isinstance(weight, Tensor), "a tied head needs a module with a weight"
    return carry[0], _handed_over(weight)


def _handed_over(weight: Tensor) -> Tensor:
    """The same values as a tensor of their own: DeepSpeed clears gradients when the first one of an output of the
    module comes, and in bf16 that of a parameter which is itself an output would be there already, and be lost."""
    return weight.view_as(weight)


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
    """Layers with one key share one module, whose `weight` is summed over stages."""

    forward: Callable[[nn.Module, Carry], tuple[Tensor, Tensor]] | None = None
    """Called with the module and its input instead of the module itself."""

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
        if name == "embedding":
            layer = PipelineLayer(name, EmbeddingStage, (config, vocab_size, name, seed), tied)
        elif name == "final_norm":
            layer = PipelineLayer(name, FinalNormStage, (config, name, seed))
        elif name != "head":
            layer = PipelineLayer(name, BlockStage, (config, int(name.partition(".")[2]), name, seed, selective))
        elif tied is None:
            layer = PipelineLayer(name, HeadStage, (config, vocab_size, name, seed))
        else:
            layer = PipelineLayer(name, EmbeddingStage, (config, vocab_size, tied, seed), tied, tied_head)
        layers.append(layer)
    return layers
