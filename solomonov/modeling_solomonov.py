"""A Solomonov model in plain PyTorch, for inference with `transformers`. Needs nothing but torch and transformers.

Load a decoder with AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True), an encoder with
AutoModelForMaskedLM, and both together with AutoModelForSeq2SeqLM. Letters in shapes as in `layers_solomonov`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, MaskedLMOutput, Seq2SeqLMOutput

from .configuration_solomonov import SolomonovConfig
from .layers_solomonov import Block, Embedding, Head, Norm


class Encoder(nn.Module):
    """What reads the source."""

    main_input_name = "input_ids"

    def __init__(self, config: SolomonovConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(config, form, at) for at, form in enumerate(config.encoder_blocks)])
        self.final_norm = None
        if config.encoder_final_norm:
            self.final_norm = Norm(config.hidden_size, config.norm_eps, with_mean=config.norm == "layernorm")

    def forward(self, hidden: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D); arguments as of `SolomonovModel.logits_of`."""
        first = None
        for block in self.layers:
            hidden, first = block(hidden, first, positions, seen, None)
        if self.final_norm is not None:
            hidden = self.final_norm(hidden)
        return hidden


def positions_of(mask: Tensor) -> Tensor:
    """(B, S), 0 on padding -> (B, S): how many tokens that are none stand before each."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def seen_by_all(mask: Tensor) -> Tensor:
    """(B, S), 0 on padding -> (B, S, S) bool. Padding sees itself, or its softmax would be of nothing."""
    return mask.bool()[:, None] | torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)


def seen_by_later(mask: Tensor, tokens: int) -> Tensor:
    """(B, S), 0 on padding -> (B, T, S) bool, of the last so many tokens."""
    index = torch.arange(mask.shape[1], device=mask.device)
    asking = index[mask.shape[1] - tokens :, None]
    return ((asking >= index) & mask.bool()[:, None]) | (asking == index)


class SolomonovModel(PreTrainedModel):  # type: ignore[misc]
    """What all share."""

    config_class = SolomonovConfig
    base_model_prefix = ""
    _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: SolomonovConfig) -> None:
        super().__init__(config)
        self.embedding = Embedding(config)
        crossed = bool(config.encoder_blocks)
        if crossed:
            self.encoder = Encoder(config)
        blocks = [Block(config, form, layer, crossed=crossed) for layer, form in enumerate(config.blocks)]
        self.layers = nn.ModuleList(blocks)
        with_mean = config.norm == "layernorm"
        self.final_norm = Norm(config.hidden_size, config.norm_eps, with_mean=with_mean) if config.final_norm else None
        self.head = Head(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.head

    def logits_of(
        self,
        input_ids: Tensor,
        positions: Tensor,
        seen: Tensor,
        cache: Any | None = None,
        memory: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(B, T, V).

        Args:
            positions: (B, T).
            seen: (B, T, S) bool, which tokens each sees.
            memory: what `Block` takes.
        """
        hidden, first = self.embedding(input_ids, positions), None
        for block in self.layers:
            hidden, first = block(hidden, first, positions, seen, cache, memory)
        if self.final_norm is not None:
            hidden = self.final_norm(hidden)
        return self.head(hidden)  # type: ignore[no-any-return]


class SolomonovForMaskedLM(SolomonovModel):
    """Encoder: each token sees all."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **rest: Any
    ) -> MaskedLMOutput:
        """Logits (B, T, V), and with labels the loss.

        Args:
            input_ids: (B, T) integers.
            attention_mask: (B, T), 0 on padding; None: there is none.
            labels: (B, T), -100 where nothing is predicted.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        logits = self.logits_of(input_ids, positions_of(attention_mask), seen_by_all(attention_mask))
        loss = None if labels is None else functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)


class SolomonovForCausalLM(SolomonovModel, GenerationMixin):  # type: ignore[misc]
    """Decoder-only Transformer."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **rest: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), and with labels the loss.

        Args:
            input_ids: (B, T) integers, after the tokens in the cache.
            attention_mask: (B, S), 0 on padding; None: there is none.
            labels: (B, T), -100 where nothing is predicted.
        """
        rows, tokens = input_ids.shape
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache()
        total = tokens + (0 if past_key_values is None else past_key_values.get_seq_length())
        if attention_mask is None:
            attention_mask = torch.ones(rows, total, dtype=torch.long, device=input_ids.device)
        positions = positions_of(attention_mask)[:, total - tokens :]
        logits = self.logits_of(input_ids, positions, seen_by_later(attention_mask, tokens), past_key_values)
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)


class Reader:
    """A model's encoder with its embedding, as `generate` calls it; no module, since it has no weights of its own."""

    main_input_name = "input_ids"

    def __init__(self, model: SolomonovModel) -> None:
        self._model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **rest: Any) -> BaseModelOutput:
        """(B, S) -> (B, S, D)."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = positions_of(mask)
        hidden = self._model.encoder(self._model.embedding(input_ids, positions), positions, seen_by_all(mask))
        return BaseModelOutput(last_hidden_state=hidden)

    __call__ = forward


class SolomonovForSeq2SeqLM(SolomonovModel, GenerationMixin):  # type: ignore[misc]
    """Decoder behind an encoder."""

    def get_encoder(self, modality: str | None = None) -> Any:
        """What reads the source."""
        return Reader(self)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any | None = None,
        past_key_values: Any | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **rest: Any,
    ) -> Seq2SeqLMOutput:
        """Logits (B, T, V), and with labels the loss.

        Args:
            input_ids: (B, S) integers, of the source; not needed with `encoder_outputs`, its (B, S, D).
            attention_mask: (B, S), 0 on padding; None: there is none.
            decoder_input_ids: (B, T) integers, after the tokens in the cache; None: the labels behind a first token.
            decoder_attention_mask: (B, those in the cache and T), likewise.
            labels: (B, T), what each token of the target is to be followed by, -100 where nothing is predicted.
        """
        if encoder_outputs is None:
            encoder_outputs = self.get_encoder()(input_ids, attention_mask)
        source = encoder_outputs[0]
        if attention_mask is None:
            attention_mask = torch.ones(source.shape[:2], dtype=torch.long, device=source.device)
        if decoder_input_ids is None and labels is not None:
            start = torch.full_like(labels[:, :1], self.config.decoder_start_token_id)
            decoder_input_ids = torch.cat((start, labels[:, :-1]), dim=1)
            decoder_input_ids = decoder_input_ids.masked_fill(decoder_input_ids == -100, self.config.pad_token_id)
        if decoder_input_ids is None:
            raise ValueError("the decoder has nothing to read: give decoder_input_ids, or labels")
        rows, tokens = decoder_input_ids.shape
        if past_key_values is None and use_cache:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        total = tokens + (0 if past_key_values is None else past_key_values.get_seq_length())
        mask = decoder_attention_mask
        if mask is None:
            mask = torch.ones(rows, total, dtype=torch.long, device=source.device)
        positions, memory = positions_of(mask)[:, total - tokens :], (source, attention_mask.bool())
        logits = self.logits_of(decoder_input_ids, positions, seen_by_later(mask, tokens), past_key_values, memory)
        loss = None if labels is None else functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return Seq2SeqLMOutput(
            loss=loss, logits=logits, past_key_values=past_key_values, encoder_last_hidden_state=source
        )
