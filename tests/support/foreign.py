"""Small random models of Hugging Face's classes, and what both sides say of the same documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from solomonov.export import AUTO_CLASSES
from solomonov.interop import to_theirs
from solomonov.interop_config import written_config
from solomonov.interop_families import chosen_family, stock_family
from solomonov.model.config import ModelConfig
from solomonov.model.counts import parameter_shapes
from solomonov.model.cross import Source
from solomonov.model.transformer import Transformer

VOCAB = 37
TOLERANCE = 1e-5
"""Largest difference of logits, relative to the largest logit."""

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


SIZES_OF: dict[str, dict[str, Any]] = {
    "BertForMaskedLM": {name: value for name, value in SIZES.items() if name != "num_key_value_heads"},
    "MarianMTModel": {
        "vocab_size": VOCAB,
        "d_model": 24,
        **{"encoder_ffn_dim": 40, "decoder_ffn_dim": 40},
        **{"encoder_layers": 3, "decoder_layers": 2},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 4},
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 0,
    },
}
"""Of classes that have keys of their own."""


def foreign_model(architecture: str, *, seed: int = 0, **keys: Any) -> Any:
    """A model of a class, by its name, with weights far from their initial values."""
    import transformers

    kind = getattr(transformers, architecture)
    model = kind(kind.config_class(**SIZES_OF.get(architecture, SIZES) | keys)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("embed_positions.weight"):  # which are sinusoids
                near = 0.4 if parameter.dim() == 1 else 0.3
                parameter.add_(torch.randn(parameter.shape, generator=generator) * near)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.copy_(torch.randn(1, VOCAB, generator=generator))
    return model


def saved(model: Any, folder: Path) -> Path:
    """The folder in which a model has written itself."""
    model.save_pretrained(folder)
    return folder


def our_weights(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Canonical name -> weights far from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * 0.3 + (len(shape) == 1)
        for name, shape in parameter_shapes(config, VOCAB).items()
    }


def as_theirs(config: ModelConfig, state: dict[str, Tensor], folder: Path, model_type: str | None = None) -> Any:
    """Our model as the class of Hugging Face that holds it, or another one that does, by way of a folder, which must
    hold just its weights."""
    import transformers

    family = stock_family(config) if model_type is None else chosen_family(config, model_type)
    assert family is not None
    settings = written_config(config, family, 32) | {"vocab_size": VOCAB, "pad_token_id": 0}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    weights = {name: tensor.contiguous() for name, tensor in to_theirs(state, config, family).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    kind = getattr(transformers, AUTO_CLASSES[config.architecture])
    found, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    assert type(found).__name__ == family.architecture
    return found.eval()


def their_logits(model: Any, documents: list[Tensor]) -> Tensor:
    """(1, T, V): the logits of documents, each read by itself."""
    with torch.inference_mode():
        return torch.cat([model(input_ids=ids[None]).logits for ids in documents], dim=1)


def _ours(config: ModelConfig, state: dict[str, Tensor]) -> Transformer:
    model = Transformer(config, state["embedding.weight"].shape[0], seed=None).eval()
    model.load_state_dict(state | {"head.weight": state.get("head.weight", state["embedding.weight"])})
    return model


def our_logits(config: ModelConfig, state: dict[str, Tensor], documents: list[Tensor]) -> Tensor:
    """(1, T, V): the logits of documents, packed into one row."""
    model = _ours(config, state)
    numbers = torch.cat([torch.full_like(ids, index) for index, ids in enumerate(documents)])
    with torch.inference_mode():
        found: Tensor = model(torch.cat(documents)[None], numbers[None])
    return found


def their_pairs(model: Any, sources: list[Tensor], targets: list[Tensor]) -> Tensor:
    """(1, T, V): the logits of targets behind their sources, all in one batch with padding behind, joined again."""

    def padded(documents: list[Tensor]) -> tuple[Tensor, Tensor]:
        ids = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True)
        lengths = torch.tensor([len(document) for document in documents])
        return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()

    (source_ids, source_mask), (ids, mask) = padded(sources), padded(targets)
    with torch.inference_mode():
        found = model(
            input_ids=source_ids, attention_mask=source_mask, decoder_input_ids=ids, decoder_attention_mask=mask
        ).logits
    return torch.cat([row[: len(target)] for row, target in zip(found, targets, strict=True)])[None]


def our_pairs(config: ModelConfig, state: dict[str, Tensor], sources: list[Tensor], targets: list[Tensor]) -> Tensor:
    """(1, T, V): the same, packed into one row of sources and one of targets, with padding behind."""

    def packed(documents: list[Tensor]) -> tuple[Tensor, Tensor]:
        numbers = [torch.full_like(ids, index) for index, ids in enumerate(documents)]
        end = torch.zeros(3, dtype=torch.long)
        return torch.cat([*documents, end])[None], torch.cat([*numbers, end - 1])[None]

    model = _ours(config, state)
    ids, documents = packed(targets)
    with torch.inference_mode():
        found: Tensor = model(ids, documents, source=Source(*packed(sources)))
    return found[:, :-3]


def random_documents(*lengths: int, seed: int = 1) -> list[Tensor]:
    """Documents of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator) for length in lengths]


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())
