"""BERT and Marian, the classes with biases: their config.json, and what their tensors hold beside those of ours.

BERT adds a vector for the kind of a token, which in a text alone is that of kind 0: it goes into the learned positions,
and back as zeros. Marian has the sines of a position in the first half of its channels and the cosines in the second,
where ours stand side by side: the channels of the stream are put in the other order in all weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from solomonov.interop_families import Family
from solomonov.model.config import ModelConfig
from solomonov.model.positions import sinusoids

SIZES = {
    "bert": ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "marian": (
        *("d_model", "encoder_layers", "decoder_layers", "encoder_ffn_dim", "decoder_ffn_dim"),
        *("encoder_attention_heads", "decoder_attention_heads"),
    ),
}
"""Type of model -> keys of its config.json that are sizes."""

_TYPES = "bert.embeddings.token_type_embeddings.weight"
_OTHER_HEADS = ("bert.pooler.", "cls.seq_relationship.", "bert.embeddings.position_ids")
_DECODER_BIAS = "cls.predictions.decoder.bias"
_POSITIONS = ("model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight")
_COPIES = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
_LOGITS_BIAS = "final_logits_bias"


def written_biased(model: ModelConfig, family: Family, sequence_tokens: int) -> dict[str, Any]:
    """What config.json says of the model's shape, but for the vocabulary's size.

    Args:
        model: one that the class holds.
        sequence_tokens: T of training, of a Marian written as the longest position.
    """
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        family.activation: family.feed_forwards[model.feed_forward][0],
        "tie_word_embeddings": model.tie_embeddings,
        "max_position_embeddings": sequence_tokens if model.longest_tokens is None else model.longest_tokens,
    }
    if family.model_type == "bert":
        return config | {
            "hidden_size": model.d_model,
            "intermediate_size": model.feed_forward_width,
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "layer_norm_eps": model.norm_eps,
            "type_vocab_size": 2,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
    return config | {
        "d_model": model.d_model,
        "encoder_layers": model.encoder_depth,
        "decoder_layers": model.layers,
        **{f"{stack}_ffn_dim": model.feed_forward_width for stack in ("encoder", "decoder")},
        **{f"{stack}_attention_heads": model.heads for stack in ("encoder", "decoder")},
        "scale_embedding": True,
        "share_encoder_decoder_embeddings": True,
        "is_encoder_decoder": True,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "forced_eos_token_id": None,
    }


def read_biased(
    given: Mapping[str, Any], family: Family, feed_forward: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our keys of the model that a config.json describes, and what of it ours cannot have.

    Raises:
        KeyError: a size is missing.
    """
    shared = {
        "architecture": family.holds,
        "feed_forward": feed_forward,
        "residual": family.residual,
        "norm": "layernorm",
        "bias": True,
        "embedding_norm": family.embedding_norm,
        "output_head": family.output_heads[0],
    }
    if family.model_type == "bert":
        return {
            **shared,
            "layers": given["num_hidden_layers"],
            "d_model": given["hidden_size"],
            "heads": given["num_attention_heads"],
            "d_ff": given["intermediate_size"],
            "norm_eps": given["layer_norm_eps"],
            "tie_embeddings": given["tie_word_embeddings"],
            "attention": {"position": "learned", "qk_norm": False, "train_tokens": given["max_position_embeddings"]},
        }, {}
    names = ("ffn_dim", "attention_heads")
    odd = {
        f"decoder_{name}": given[f"decoder_{name}"]
        for name in names
        if given[f"encoder_{name}"] != given[f"decoder_{name}"]
    }
    if given["decoder_vocab_size"] not in (None, given["vocab_size"]):
        odd["decoder_vocab_size"] = given["decoder_vocab_size"]
    return {
        **shared,
        "layers": given["decoder_layers"],
        "encoder_layers": given["encoder_layers"],
        "d_model": given["d_model"],
        "heads": given["decoder_attention_heads"],
        "d_ff": given["decoder_ffn_dim"],
        "norm_eps": family.only_eps,
        # Not scaled, the two are ours only as two matrices: a tied one of ours is scaled where it embeds.
        "tie_embeddings": given["scale_embedding"],
        "attention": {"preset": "vanilla"},
    }, odd


def beside_ours(weights: Mapping[str, Tensor], model: ModelConfig, family: Family) -> dict[str, Tensor]:
    """Tensors of a class as it stores them, with those that ours has not.

    Args:
        weights: its name -> tensor of a parameter of ours.
    """
    theirs = dict(weights)
    if family.model_type == "bert":
        theirs[_TYPES] = torch.zeros(2, model.d_model)
        if not model.tie_embeddings:
            theirs[_DECODER_BIAS] = theirs[family.name_of("head.bias")].clone()
    else:
        bias = theirs.get(_LOGITS_BIAS)
        theirs[_LOGITS_BIAS] = torch.zeros(1, len(theirs["model.shared.weight"])) if bias is None else bias[None]
    return theirs


def as_ours(theirs: Mapping[str, Tensor], family: Family, *, tied: bool) -> dict[str, Tensor]:
    """The inverse: tensors of a class, each that changes its logits, one for each parameter of ours. What does not fit
    stays as it is."""
    if family.model_type == "marian":
        found = {name: tensor for name, tensor in theirs.items() if name not in _COPIES}
        for name in _POSITIONS:
            if name in found and _are_sinusoids(found[name]):
                del found[name]
        vocabulary = len(found.get("model.shared.weight", ()))
        found[_LOGITS_BIAS] = found.get(_LOGITS_BIAS, torch.zeros(1, vocabulary)).squeeze(0)
        return found
    found = {}
    for name, tensor in theirs.items():
        if not name.startswith(_OTHER_HEADS):
            # As files were written before 2019.
            found[name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")] = (
                tensor
            )
    bias, positions = family.name_of("head.bias"), family.name_of("embedding.positions")
    of_decoder = found.pop(_DECODER_BIAS, None)
    if of_decoder is not None and (not tied or bias not in found):
        found[bias] = of_decoder
    if _TYPES in found and positions in found:
        found[positions] = found[positions].float() + found.pop(_TYPES)[0].float()
    return found


def _are_sinusoids(table: Tensor) -> bool:
    """Whether a table of positions (T, D) is what a Marian computes where it finds none."""
    places = sinusoids(torch.arange(len(table))[None], table.shape[1])[0]
    halves = torch.cat((places[:, 0::2], places[:, 1::2]), dim=1)
    return bool(torch.allclose(table.float(), halves, rtol=0.0, atol=1e-3 if table.dtype != torch.float32 else 1e-6))
