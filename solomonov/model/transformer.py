"""The model as one module, for everything but a pipeline."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from solomonov.model.attention import SequenceShare, layer_contexts, token_positions
from solomonov.model.cache import KeyValueCache
from solomonov.model.config import NOTHING_AGAIN, ModelConfig, Recompute
from solomonov.model.init import initialise
from solomonov.model.layers import Block, Embedding, FinalNorm, Head
from solomonov.model.recompute import in_groups
from solomonov.model.residual import has_final_norm


class Transformer(nn.Module):
    """Decoder-only Transformer.

    Args:
        config: its shape.
        vocab_size: V.
        seed: of the initial values; None leaves all parameters unset, to be loaded.
        recompute: what the backward pass computes again.

    Attributes:
        share: this rank's share of rows that several ranks compute together; None: it has them whole.
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
        self.embedding = Embedding(config, vocab_size)
        selective = recompute.mode == "selective"
        self.layers = nn.ModuleList([Block(config, index, selective=selective) for index in range(config.layers)])
        self.final_norm = FinalNorm(config) if has_final_norm(config) else None
        self.head = Head(config, vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        if seed is not None:
            initialise(self, config, seed)

    def forward(
        self,
        input_ids: Tensor,
        document_ids: Tensor,
        labels: Tensor | None = None,
        *,
        cache: KeyValueCache | None = None,
        with_z: bool = False,
    ) -> Tensor:
        """Logits, or the loss.

        Args:
            input_ids: (B, T) integers; with `share` this rank's tokens, likewise `labels`.
            document_ids: (B, T) integers, equal within a document, -1 on padding; with `share` of all tokens.
            labels: (B, T) integers, -100 where nothing is predicted.
            cache: keys and values of the tokens before these; these are added to it.
            with_z: with labels, also the sum of ln^2 Z.

        Returns:
            Without labels: logits (B, T, V). With labels: fp32 scalar, the sum of the cross-entropy over the
            labels that count; divide it by their number over the whole batch. With `with_z`, fp32 (2,): that sum, and
            that of ln^2 Z, see `loss.cross_entropy_and_z_sums`.
        """
        seen = document_ids if cache is None else cache.append_documents(document_ids)
        new_tokens = None if cache is None else input_ids.shape[1]
        contexts = layer_contexts(seen, self.config, new_tokens=new_tokens, share=self.share)
        positions = token_positions(seen, new_tokens, self.share) if self.embedding.sinusoidal else None
        hidden = self.embedding(input_ids, positions)
        if self.recompute.mode == "full" and self.training and cache is None:
            blocks = [partial(block, context=context) for block, context in zip(self.layers, contexts, strict=True)]
            hidden = in_groups(blocks, hidden, self.recompute.every)
        else:
            for index, block in enumerate(self.layers):
                hidden = block(hidden, contexts[index], None if cache is None else cache.layers[index])
        if self.final_norm is not None:
            hidden = self.final_norm(hidden)
        return self.head(hidden, labels, with_z=with_z)  # type: ignore[no-any-return]


def compile_blocks(model: nn.Module) -> int:
    """Compile every block in place, each on its own, so that depth does not lengthen compilation.

    Parameter names stay as they are. Returns how many blocks there were.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        block.compile(dynamic=False)
    return len(blocks)
