"""Names: ours to the pipeline's and back over all parameters of random shapes, with and without wrappers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solomonov.model.config import ModelConfig
from solomonov.model.counts import parameter_shapes
from solomonov.model.naming import canonical, is_hidden_matrix, layer_names, pipeline_name
from solomonov.model.pipeline import pipeline_layers
from solomonov.model.stacks import Architecture
from tests.solomonov.model.common import BIASES


def _config(layers: int, tied: bool, architecture: Architecture = "decoder", **changes: Any) -> ModelConfig:
    return ModelConfig(architecture=architecture, layers=layers, d_model=4, heads=1, tie_embeddings=tied, **changes)


def test_layer_names() -> None:
    one_stack = ["embedding", "layers.0", "layers.1", "final_norm", "head"]
    assert layer_names(_config(2, False)) == layer_names(_config(2, False, "encoder")) == one_stack
    two = ModelConfig(architecture="encoder_decoder", layers=1, encoder_layers=2, d_model=4, heads=1)
    of_encoder = ["encoder.layers.0", "encoder.layers.1", "encoder.final_norm"]
    assert layer_names(two) == ["embedding", *of_encoder, "layers.0", "final_norm", "head"]


def test_hidden_matrices_are_those_of_blocks() -> None:
    shapes = parameter_shapes(_config(1, False, "encoder_decoder"), 5)
    found = {name for name, shape in shapes.items() if is_hidden_matrix(name, shape)}
    assert found == {name for name, shape in shapes.items() if len(shape) == 2} - {"embedding.weight", "head.weight"}
    assert sum(name.startswith("encoder.") for name in found) == 8


@given(
    layers=st.integers(1, 120),
    tied=st.booleans(),
    prefix=st.sampled_from(["", "module.", "_orig_mod.", "module.module.", "module._orig_mod."]),
    data=st.data(),
    architecture=st.sampled_from(["decoder", "encoder_decoder"]),
    changes=st.sampled_from([{}, BIASES]),
)
def test_there_and_back(
    layers: int, tied: bool, prefix: str, data: st.DataObject, architecture: Architecture, changes: dict[str, Any]
) -> None:
    config = _config(layers, tied, architecture, **changes)
    names = layer_names(config)
    shapes = list(parameter_shapes(config, 5))
    pipeline_names = [pipeline_name(name, names, tied=tied) for name in shapes]
    assert len(set(pipeline_names)) == len(shapes)
    name = data.draw(st.sampled_from(shapes))
    in_pipeline = pipeline_name(name, names, tied=tied)
    assert canonical(prefix + in_pipeline, names) == name
    assert canonical(prefix + name, names) == name
    head, dot, tail = name.rpartition(".")
    assert canonical(f"{head}._orig_mod{dot}{tail}", names) == name


@pytest.mark.parametrize("changes", [{}, BIASES], ids=["plain", "biases"])
@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
@pytest.mark.parametrize("tied", [False, True])
def test_names_of_a_built_pipeline(tied: bool, architecture: Architecture, changes: dict[str, Any]) -> None:
    config = _config(3, tied, architecture, **changes)
    names = layer_names(config)
    found = set()
    for number, layer in enumerate(pipeline_layers(config, 5, seed=0)):
        place = f"{number}." if layer.tied_key is None else f"tied_modules.{layer.tied_key}."
        found |= {place + name for name, _ in layer.build().named_parameters()}
    assert {canonical(name, names) for name in found} == set(parameter_shapes(config, 5))
    assert found == {pipeline_name(name, names, tied=tied) for name in parameter_shapes(config, 5)}


@pytest.mark.parametrize(
    "name",
    ["9.weight", "layers.7.attention.q.weight", "encoder.layers.0.a.weight", "embedding", "layers.1", "wte.weight", ""],
)
def test_names_of_no_layer_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no layer of this model"):
        canonical(name, layer_names(_config(2, False)))


def test_the_heads_name_of_a_tied_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="is tied"):
        pipeline_name("head.weight", layer_names(_config(2, True)), tied=True)
