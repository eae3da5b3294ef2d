"""A model in a folder of Hugging Face, ours or another's, read without `transformers` and without running its code."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from solomonov.bundled import MODEL_TYPE
from solomonov.errors import ConfigurationError, DamagedCheckpointError
from solomonov.interop import to_ours
from solomonov.interop_biased import as_ours
from solomonov.interop_config import read_config
from solomonov.interop_families import FAMILIES, Family, family_of
from solomonov.model.config import ModelConfig
from solomonov.model.counts import parameter_shapes

EXPORT_MARKER = "solomonov.json"
"""File of an export that says what was trained; only a folder that has it is replaced by another export."""
_IDLE_TENSORS = ("rotary_emb.inv_freq", "masked_bias")
"""Ends of names of tensors that old versions of `transformers` stored and that follow from the configuration."""


def load_hf(folder: Path | str) -> tuple[ModelConfig, dict[str, Tensor], int]:
    """Read a model: config.json and model*.safetensors of a class in `interop_families.FAMILIES`, or of an export with
    code of its own, which is not run.

    Its logits are those of the class, but for rounding: factors outside of the weights are folded into them, and a
    matrix that was embedding and head with different factors becomes two. Rows longer than the longest position of a
    SmolLM3 see no further back than that in its layers with positions.

    Returns:
        The model's shape, canonical name -> fp32 tensor, and sequence_tokens, its longest position.

    Raises:
        ConfigurationError: the folder holds no such model, or one that ours cannot be, named by key.
        DamagedCheckpointError: a file is missing, truncated, or lacks a tensor.
    """
    path = Path(folder)
    config = _read_json(path, "config.json")
    if config.get("model_type") == MODEL_TYPE:
        return _load_bundled(path, config)
    family = _family(path, config)
    try:
        read = read_config(config, family)
        shapes = parameter_shapes(read.model, config["vocab_size"])
    except (KeyError, ValidationError) as error:
        raise _damaged(path, f"config.json: {error}", f"the sizes of a {family.architecture}") from error
    tied = bool(config.get("tie_word_embeddings", family.defaults["tie_word_embeddings"]))
    wanted = {family.name_of(name): (name, shape) for name, shape in shapes.items()}
    head = family.name_of("head.weight")
    if tied:
        wanted.pop(head, None)
    state, strange, tensors = {}, [], _read_tensors(path)
    if family.biased:
        tensors = iter(as_ours(dict(tensors), family, tied=tied).items())
    for theirs, tensor in tensors:
        if theirs in wanted:
            state[wanted[theirs][0]] = tensor.float()
        elif not theirs.endswith(_IDLE_TENSORS) and not (tied and theirs == head):
            strange.append(theirs)
    for theirs, (name, shape) in wanted.items():
        _check_shape(path, theirs, state.get(name), shape)
    if strange:
        raise ConfigurationError(
            f"{path} holds tensors that a {family.architecture} of this config.json has no place for.",
            got=", ".join(sorted(strange)[:5]),
            rule="each tensor is a weight of the model that config.json describes",
            remedy="take a folder that `save_pretrained` of the class wrote, of the whole model and of nothing else",
        )
    ours = to_ours(state, read.model, family, read.multipliers)
    return read.model, {name: ours[name] for name in shapes}, read.sequence_tokens


def _load_bundled(folder: Path, config: Mapping[str, Any]) -> tuple[ModelConfig, dict[str, Tensor], int]:
    """An export with code of its own: its weights have our names."""
    try:
        model = ModelConfig.model_validate(_read_json(folder, EXPORT_MARKER)["model"])
        shapes, sequence_tokens = parameter_shapes(model, config["vocab_size"]), int(config["max_position_embeddings"])
    except (KeyError, ValidationError) as error:
        raise _damaged(folder, f"{EXPORT_MARKER} or config.json: {error}", "the keys that export writes") from error
    state = {name: tensor.float() for name, tensor in _read_tensors(folder)}
    for name, shape in shapes.items():
        _check_shape(folder, name, state.get(name), shape)
    return model, {name: state[name] for name in shapes}, sequence_tokens


def _check_shape(folder: Path, name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is None or tuple(tensor.shape) != shape:
        got = "missing" if tensor is None else tuple(tensor.shape)
        raise _damaged(folder, f"{name} is {got}", f"a tensor of shape {shape}")


def _family(folder: Path, config: Mapping[str, Any]) -> Family:
    family = family_of(config.get("model_type"))
    if family is None:
        raise _not_ours(folder, f"model_type {config.get('model_type')!r}")
    return family


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / name).read_bytes())
    except FileNotFoundError as error:
        raise _not_ours(folder, f"no {name}") from error
    except ValueError as error:
        raise _damaged(folder, f"{name}: {error}", "JSON") from error
    if not isinstance(config, dict):
        raise _damaged(folder, f"{name} is not an object", "a JSON object")
    return config


def _read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise _damaged(folder, "no weight file", "model.safetensors or numbered shards of it")
    for file in files:
        try:
            yield from load_file(file).items()
        except SafetensorError as error:
            raise _damaged(file, str(error), "a whole safetensors file") from error


def _not_ours(folder: Path, got: str) -> ConfigurationError:
    known = ", ".join(family.model_type for family in FAMILIES)
    return ConfigurationError(
        f"{folder} holds no model that we read.",
        got=got,
        rule=f"config.json with a model_type out of {known}, or an export of ours",
        remedy="name the folder of an export or of such a model",
    )


def _damaged(path: Path, got: str, rule: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"{path} is damaged.", got=got, rule=rule, remedy="export the run again, or copy the folder again"
    )
