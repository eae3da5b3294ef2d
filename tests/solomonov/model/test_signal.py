"""What is measured of a signal, against a stack that is walked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from solomonov.model.attention import layer_contexts
from solomonov.model.cross import Source, memory_of
from solomonov.model.residual import MODES
from solomonov.model.signal import bypassed, eighths, measure_signal, skip_eighths
from solomonov.model.transformer import Transformer
from tests.solomonov.model.common import VOCAB, random_ids, random_source, spread_model, tiny_config, two_stacks


def _rows() -> tuple[Tensor, Tensor, Tensor]:
    ids, labels = random_ids(2, 8), random_ids(2, 8, seed=1)
    labels[:, ::3] = -100
    return ids, torch.zeros_like(ids), labels


def _walk(model: Transformer, without: range, rows: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Mean loss, and the stream behind the embedding and each block that was not left out."""
    ids, documents, labels = rows
    contexts = layer_contexts(documents, model.config)
    streams = [model.embedding(ids)]
    for index, block in enumerate(model.layers):
        if index not in without:
            streams.append(block((streams[-1],), contexts[index])[0])
    last = streams[-1] if model.final_norm is None else model.final_norm(streams[-1])
    return model.head(last, labels) / (labels != -100).sum(), streams


@pytest.mark.parametrize("mode", MODES)
def test_signal_is_that_of_a_stack_walked_by_hand(mode: str) -> None:
    model = spread_model(tiny_config(residual=mode, layers=4))
    rows = _rows()
    found = measure_signal(model, *rows)
    loss, streams = _walk(model, range(0), rows)
    loss.backward()
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    sizes = [float(stream.detach().double().square().mean().sqrt()) for stream in streams]
    assert found.stream_rms == pytest.approx(sizes, rel=1e-5)
    assert found.growth == pytest.approx(sizes[-1] / sizes[0], rel=1e-5)
    for index, (before, after) in enumerate(pairwise(streams)):
        inner = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        assert found.cosines[index] == pytest.approx(float(inner.mean().detach()), abs=1e-5)
    # Both passes added their gradients up: equal ones.
    for index, norm in enumerate(found.gradient_norms):
        gradients = [p.grad for p in model.layers[index].parameters() if p.grad is not None]
        assert len(gradients) == len(list(model.layers[index].parameters()))
        assert 2 * norm == pytest.approx(float(torch.cat([g.flatten() for g in gradients]).norm()), rel=1e-4)
    assert found.gradient_ratio == pytest.approx(found.gradient_norms[0] / found.gradient_norms[3])


def test_a_compiled_model_is_measured_as_it_is_written() -> None:
    """Whether compiled code takes notice of a hook depends on when it came; and for each hook it is compiled anew."""
    model = spread_model(tiny_config(layers=4))
    rows = _rows()
    plain = measure_signal(model, *rows)
    graphs: list[GraphModule] = []

    def backend(graph: GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    for block in model.blocks():
        block.compile(backend=backend, dynamic=False)
    model(*rows)
    compiled = len(graphs)
    assert compiled > 0
    assert measure_signal(model, *rows) == plain
    assert len(graphs) == compiled, "nothing was compiled for it"
    model(*rows)
    assert len(graphs) == compiled, "and afterwards the same code runs"


def test_a_first_block_that_is_passed_by_leaves_its_values_to_the_others() -> None:
    model = spread_model(tiny_config(layers=3, value_residual=True))
    ids, documents, labels = _rows()
    contexts = layer_contexts(documents, model.config)
    hidden = model.embedding(ids)
    _, values = model.layers[0]((hidden,), contexts[0])
    for layer in (1, 2):
        hidden, _ = model.layers[layer]((hidden, values), contexts[layer])
    assert model.final_norm is not None
    expected = model.head(model.final_norm(hidden), labels)
    with bypassed([model.layers[0]]):
        assert torch.equal(model(ids, documents, labels), expected)
    assert len(measure_signal(model, ids, documents, labels).cosines) == 3


def _walk_two(
    model: Transformer, without: range, rows: tuple[Tensor, Tensor, Tensor], source: Source
) -> tuple[Tensor, list[Tensor]]:
    """As `_walk`, through the encoder first; blocks are counted through both stacks."""
    ids, documents, labels = rows
    encoder = model.encoder
    assert encoder is not None
    streams = [model.embedding(source.input_ids)]
    contexts = layer_contexts(source.document_ids, model.config, stack=model.config.stacks[0])
    for index, block in enumerate(encoder.layers):
        if index not in without:
            streams.append(block((streams[-1],), contexts[index])[0])
    read = streams[-1] if encoder.final_norm is None else encoder.final_norm(streams[-1])
    memory, hidden = memory_of(read, source.document_ids, documents), model.embedding(ids)
    contexts = layer_contexts(documents, model.config)
    for index, block in enumerate(model.layers):
        if index + len(encoder.layers) not in without:
            (hidden,) = block((hidden,), contexts[index], None, memory)
            streams.append(hidden)
    last = hidden if model.final_norm is None else model.final_norm(hidden)
    return model.head(last, labels) / (labels != -100).sum(), streams


@pytest.mark.parametrize("mode", ["prenorm", "deepnorm"])
def test_signal_of_two_stacks_is_that_of_a_walk_through_both(mode: str) -> None:
    model = spread_model(two_stacks(residual=mode, layers=4, encoder_layers=5))
    rows, source = _rows(), random_source(2, 6)
    found = measure_signal(model, *rows, source)
    loss, streams = _walk_two(model, range(0), rows, source)
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    sizes = [float(stream.detach().double().square().mean().sqrt()) for stream in streams]
    assert found.stream_rms == pytest.approx(sizes, rel=1e-5)
    assert found.growth == pytest.approx(max(sizes[5], sizes[9]) / sizes[0], rel=1e-5)
    assert len(found.cosines) == len(found.gradient_norms) == 9
    assert min(found.gradient_norms) > 0.0
    norms = found.gradient_norms
    ratios = norms[0] / norms[4], norms[5] / norms[8]
    assert found.gradient_ratio == max(ratios, key=lambda ratio: abs(math.log(ratio)))
    rises = skip_eighths(model, *rows, source)
    assert len(rises) == 8
    for part, rise in zip(eighths(9), rises, strict=True):
        without, _ = _walk_two(model, part, rows, source)
        assert rise == pytest.approx(float((without - loss).detach()), abs=2e-5)


@pytest.mark.parametrize("mode", ["prenorm", "deepnorm", "keel"])
def test_an_eighth_that_is_passed_by_is_not_there(mode: str) -> None:
    model = spread_model(tiny_config(residual=mode, layers=12))
    rows = _rows()
    whole, _ = _walk(model, range(0), rows)
    rises = skip_eighths(model, *rows)
    assert len(rises) == 8
    for part, rise in zip(eighths(12), rises, strict=True):
        without, _ = _walk(model, part, rows)
        assert rise == pytest.approx(float((without - whole).detach()), abs=2e-5)
    assert torch.equal(_walk(model, range(0), rows)[0], whole), "the model is as it was"


def test_nothing_is_left_out_for_good() -> None:
    model = spread_model(tiny_config(layers=3))
    ids, documents, _ = _rows()
    before = model(ids, documents)
    with bypassed([model.layers[1]]):
        assert not torch.allclose(model(ids, documents), before)
    assert torch.equal(model(ids, documents), before)


@pytest.mark.parametrize(("layers", "sizes"), [(1000, [125] * 8), (24, [3] * 8), (3, [1, 1, 1]), (12, [1, 2] * 4)])
def test_eighths_cover_all_layers(layers: int, sizes: list[int]) -> None:
    parts = eighths(layers)
    assert [len(part) for part in parts] == sizes
    assert [layer for part in parts for layer in part] == list(range(layers))


def test_a_dead_path_is_seen() -> None:
    """Post-LN at its initial values: of 64 layers the first gets next to no gradient, with DeepNorm as much as the
    last."""
    found = {}
    for mode in ("postnorm", "deepnorm"):
        model = Transformer(tiny_config(residual=mode, layers=64, d_model=32), VOCAB, seed=0)
        found[mode] = measure_signal(model, *_rows())
    assert found["postnorm"].gradient_ratio > 10 or found["postnorm"].gradient_ratio < 0.1
    assert 0.5 < found["deepnorm"].gradient_ratio < 2
