"""The stream and the heads of a model as they are watched, against float64 loops over each document alone, for every
flag of attention, in parts, in an encoder, on compiled blocks and in a pipeline's layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from solomonov.batch import TokenBatch, padded
from solomonov.model import watch as watch_module
from solomonov.model.config import ModelConfig
from solomonov.model.pipeline import BlockStage, pipeline_layers
from solomonov.model.signal import as_written, bypassed
from solomonov.model.transformer import Transformer
from solomonov.model.watch import Watch
from tests.solomonov.model.common import (
    ATTENTION,
    VOCAB,
    float64_state,
    random_ids,
    random_source,
    spread_model,
    tiny_config,
    two_stacks,
)
from tests.support.looking import Looked, documents_of, look

CPU = torch.device("cpu")


def rows() -> TokenBatch:
    """Two packed rows, one with padding behind; more tokens than any window."""
    ids, labels = random_ids(2, 9).long(), random_ids(2, 9, seed=1).long()
    documents = torch.tensor([[0] * 6 + [1] * 3, [0, 0, 1, 1, 1, 1, 1, -1, -1]])
    labels = torch.where(documents >= 0, labels, -100)
    labels[:, ::4] = -100
    return TokenBatch(torch.arange(2), ids, labels, documents)


def watched(model: Transformer, batch: TokenBatch) -> Watch:
    watch = Watch(model.config, dict(enumerate(model.blocks())), CPU)
    with watch.looking(), torch.no_grad():
        watch.rows(batch.document_ids)
        model(batch.input_ids, batch.document_ids, batch.labels)
    return watch


def assert_found(watch: Watch, expected: Looked) -> None:
    np.testing.assert_allclose(watch.streams.numpy(), expected.streams, rtol=1e-4)
    np.testing.assert_allclose(watch.heads.numpy(), expected.weights, rtol=1e-4, atol=1e-4)


CASES: list[dict[str, Any]] = [
    *({"attention": flags} for flags in ATTENTION.values()),
    {"attention": {"position": "alibi", "sink": True}, "heads": 6, "kv_heads": 3, "head_dim": 4},
    {"attention": {"preset": "rope"}, "kv_heads": 1, "residual": "deepnorm"},
    {"architecture": "encoder", "residual": "prenorm"},
    {"value_residual": True, "kv_heads": 2, "residual": "keel"},
]


@pytest.mark.parametrize("scores", [1 << 24, 80, 1], ids=["at-once", "in-parts", "a-query-at-a-time"])
@pytest.mark.parametrize("changes", CASES, ids=str)
def test_what_is_watched_equals_loops_over_each_document(
    changes: dict[str, Any], scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "MOST_SCORES", scores)
    model = spread_model(tiny_config(**{"layers": 3, "residual": "prenorm"} | changes))
    watch = watched(model, rows())
    assert_found(watch, look(float64_state(model), model.config, documents_of(rows())))
    assert float(watch.heads[0, 3, 0]) == 16.0, "queries of real tokens"


def test_looking_changes_nothing_and_ends() -> None:
    model, batch = spread_model(tiny_config(attention=ATTENTION["much at once"])), rows()
    before = model(batch.input_ids, batch.document_ids)
    watch = watched(model, batch)
    first, heads = watch.streams.clone(), watch.heads.clone()
    with watch.looking():
        watch.rows(batch.document_ids)
        assert torch.equal(model(batch.input_ids, batch.document_ids), before)
    assert torch.equal(watch.streams, 2 * first), "sums go on"
    assert torch.equal(model(batch.input_ids, batch.document_ids), before)
    assert torch.equal(watch.streams, 2 * first), "and nobody looks any more"
    assert torch.equal(watch.heads, 2 * heads)


def test_reduced_precision_is_summed_in_full() -> None:
    """Under autocast products are bf16: those of the measure are not."""
    model = spread_model(tiny_config(layers=3))
    expected = look(float64_state(model), model.config, documents_of(rows()))
    with torch.autocast("cpu", torch.bfloat16):
        watch = watched(model, rows())
    sums = watch.heads.numpy()
    np.testing.assert_allclose(sums[:, 2], 16.0, rtol=1e-6, err_msg="weights sum to 1 for each query")
    np.testing.assert_allclose(sums[:, 0], expected.weights[:, 0], rtol=0.05)
    np.testing.assert_allclose(watch.streams.numpy(), expected.streams, rtol=0.02)


@pytest.mark.parametrize("flags", ["rope", "hybrid"])
def test_compiled_blocks_are_watched_and_passed_by_as_well(flags: str) -> None:
    """What was compiled before takes no notice of hooks, and is what runs again afterwards."""
    torch._dynamo.reset()  # other tests' blocks count towards the graphs of one function, 8 at most
    model, batch, calls = spread_model(tiny_config(layers=3, attention=ATTENTION[flags])), rows(), [0]

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        def run(*args: Any) -> Any:
            calls[0] += 1
            return graph(*args)

        return run

    for block in model.blocks():
        block.compile(backend=backend, dynamic=False)
    with torch.no_grad():
        before = model(batch.input_ids, batch.document_ids)
    compiled = calls[0]
    assert compiled >= 3
    state = float64_state(model)
    assert_found(watched(model, batch), look(state, model.config, documents_of(batch)))
    assert calls[0] == compiled, "nothing compiled ran meanwhile"
    with as_written(model.blocks()), bypassed([list(model.blocks())[1]]), torch.no_grad():
        loss = float(model(batch.input_ids, batch.document_ids, batch.labels))
    assert loss == pytest.approx(look(state, model.config, documents_of(batch), without=[1]).loss, rel=1e-5)
    assert calls[0] == compiled, "nor here, in the blocks that were not passed by"
    with torch.no_grad():
        assert torch.equal(model(batch.input_ids, batch.document_ids), before)
    assert calls[0] == 2 * compiled


def stages(model: Transformer) -> list[torch.nn.Module]:
    """The layers of a pipeline with the values of a model."""
    built = []
    for layer in pipeline_layers(model.config, VOCAB, 0):
        module = layer.build()
        of_layer = {name.removeprefix(f"{layer.name}."): value for name, value in model.state_dict().items()}
        module.load_state_dict({name: value for name, value in of_layer.items() if name in module.state_dict()})
        built.append(module)
    return built


def through(layers: list[torch.nn.Module], *carry: torch.Tensor) -> tuple[torch.Tensor, ...]:
    for layer in layers:
        carry = layer(carry)
    return carry


def test_layers_of_a_pipeline_are_watched_on_the_carry() -> None:
    """Rows of padding that fill a micro-batch up do not count."""
    model, batch = spread_model(tiny_config(layers=3, attention=ATTENTION["hybrid"])), rows()
    layers = stages(model)
    blocks = dict(enumerate(layer for layer in layers if isinstance(layer, BlockStage)))
    watch = Watch(model.config, blocks, CPU)
    filled = padded(batch, 3)
    with watch.looking(), torch.no_grad():
        watch.rows(batch.document_ids)
        through(layers, filled.input_ids, filled.document_ids)
    assert_found(watch, look(float64_state(model), model.config, documents_of(batch)))
    plain = Transformer(model.config, VOCAB, seed=None)
    plain.load_state_dict(model.state_dict())
    with bypassed([blocks[2]]), torch.no_grad():
        hidden, weight = through(layers, batch.input_ids, batch.document_ids)
    with bypassed([plain.layers[2]]), torch.no_grad():
        torch.testing.assert_close(hidden @ weight.T, plain(batch.input_ids, batch.document_ids))


@pytest.mark.parametrize("last", [False, True])
def test_blocks_behind_an_encoder_are_passed_by_in_a_pipeline(last: bool) -> None:
    """The last block of all hands on less than it is given: stages agree once on what travels between them."""
    config = two_stacks(layers=2)
    model, source, batch = spread_model(config), random_source(2, 5), rows()
    layers, place = stages(model), 4 if last else 1
    blocks = [layer for layer in layers if isinstance(layer, BlockStage)]
    plain = list(model.blocks())
    carry = (source.input_ids.long(), source.document_ids.long(), batch.input_ids, batch.document_ids)
    sizes: list[list[torch.Size]] = []
    for layer in layers:
        layer.register_forward_hook(lambda _, given, result: sizes.append([part.shape for part in given[0]]))
    through(layers, *carry)
    usual = list(sizes)
    with bypassed([blocks[place]]), bypassed([plain[place]]), torch.no_grad():
        hidden, weight = through(layers, *carry)
        assert sizes == 2 * usual
        torch.testing.assert_close(hidden @ weight.T, model(batch.input_ids, batch.document_ids, source=source))


def test_both_stacks_are_watched_where_the_source_is_told() -> None:
    config: ModelConfig = two_stacks(layers=2)
    model, source, batch = spread_model(config), random_source(2, 5), rows()
    streams: list[torch.Tensor] = []
    for block in model.blocks():
        block.register_forward_hook(lambda _, given, result: streams.extend([given[0][0], result[0]]))
    watch, blind = (Watch(config, dict(enumerate(model.blocks())), CPU) for _ in range(2))
    for each, told in ((watch, source.document_ids), (blind, None)):
        with each.looking(), torch.no_grad():
            each.rows(batch.document_ids, told)
            model(batch.input_ids, batch.document_ids, source=source)
    real = batch.document_ids >= 0
    expected = [streams[0].double().square().sum()]
    expected += [streams[2 * number + 1].double().square().sum() for number in range(3)]
    expected += [streams[2 * number + 1][real].double().square().sum() for number in (3, 4)]
    torch.testing.assert_close(watch.streams[:, 0], torch.stack(expected).double(), rtol=1e-5, atol=0.0)
    assert watch.heads[:, 3, 0].tolist() == [10.0] * 3 + [16.0] * 2
    assert torch.equal(blind.streams[4:], watch.streams[4:])
    assert not bool(blind.streams[:4].any()), "and without it nothing is made up"
