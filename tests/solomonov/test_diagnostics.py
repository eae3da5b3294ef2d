"""What is measured while a model trains, in every layout, against float64 loops over its own masters before and after
the update; training goes on to the bit as it does without; and the tags that all of it gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.rows import RowBatch
from solomonov import diagnostics as diagnostics_module
from solomonov.batch import TokenBatch
from solomonov.diagnostics import Diagnosis, Diagnostics
from solomonov.distributed import Control
from solomonov.engine import Engine
from solomonov.model.config import ModelConfig
from solomonov.model.stacks import block_place
from solomonov.model.transformer import Transformer
from tests.support import tiny
from tests.support.looking import documents_of, look
from tests.support.naive import Array
from tests.support.ranks import run_ranks
from tests.support.tiny import Layout, Outcome

STEPS, HELD_OUT = 3, 3
WEIGHTS = dict[str, torch.Tensor]


class Rows:
    """Three held-out rows: an odd number for two ranks."""

    def __len__(self) -> int:
        return HELD_OUT

    def rows(self, part: Sequence[int]) -> RowBatch:
        batch = held_out_rows(part)
        fields = (batch.row_ids, batch.input_ids, batch.labels, batch.document_ids)
        return RowBatch(*(field.numpy() for field in fields))


def held_out_rows(part: Sequence[int]) -> TokenBatch:
    """Of `tiny.batch`, with two tokens of padding behind the first row, three behind the next, and so on."""
    batch = tiny.batch(7, list(part))
    padding = torch.arange(tiny.SEQUENCE) >= tiny.SEQUENCE - 2 - torch.tensor(part)[:, None]
    labels, documents = batch.labels.masked_fill(padding, -100), batch.document_ids.masked_fill(padding, -1)
    return TokenBatch(batch.row_ids, batch.input_ids, labels, documents)


def measured(layout: Layout, held_out: bool = True) -> tuple[Diagnosis, WEIGHTS, WEIGHTS, Outcome]:
    """Train three updates of which the third is measured, and two more: what was found, the masters before and after
    the third, and what a rank saw of the run."""
    diagnostics_module.COMPARED_ELEMENTS = 100
    engine = tiny.make_engine(layout)
    rows: Any = Rows() if held_out else None
    diagnostics = Diagnostics(engine, Control(), rows, STEPS)
    assert [step for step in range(1, STEPS + 3) if diagnostics.due(step)] == [STEPS]
    first = tiny.train(engine, 0, STEPS - 1)
    before = masters(engine)
    diagnostics.before(STEPS)
    second = tiny.train(engine, STEPS - 1, STEPS)
    after, found = masters(engine), diagnostics.measure()
    assert not diagnostics._before, "the copy is given back"
    diagnostics.before(STEPS + 1)
    assert not diagnostics._before, "and none is made in vain"
    rest = tiny.train(engine, STEPS, STEPS + 2)
    losses, norms = ([*a, *b, *c] for a, b, c in zip(first, second, rest, strict=True))
    return found, before, after, Outcome(losses, norms, engine.layout, tiny.whole_state(engine))


def masters(engine: Any) -> WEIGHTS:
    return {name: tensor.clone() for (name, kind), tensor in tiny.whole_state(engine).items() if kind == "master"}


CASES = [
    *[(1, Layout(zero_stage=stage)) for stage in (0, 3)],
    *[(2, Layout(zero_stage=stage)) for stage in (0, 1, 2, 3)],
    (2, Layout(zero_stage=1, accumulation=2, tied=True, attention="hybrid")),
    (2, Layout(zero_stage=3, attention="alibi", residual="deepnorm")),
    (2, Layout(zero_stage=1, accumulation=2, pipeline=2, tied=True)),
    (2, Layout(zero_stage=0, accumulation=2, pipeline=2, recompute="full", attention="hybrid")),
    (4, Layout(zero_stage=1, pipeline=2, tied=True, shuffled=True)),
    (2, Layout(zero_stage=1, sequence=2, attention="hybrid")),
    (4, Layout(zero_stage=3, sequence=2, attention="alibi")),
    (2, Layout(zero_stage=2, offload="optimizer", muon=True)),
    (2, Layout(zero_stage=3, offload="parameters", recompute="selective")),
    (2, Layout(zero_stage=1, precision="bf16")),
    (2, Layout(zero_stage=3, precision="bf16_autocast", ema=0.5)),
    (2, Layout(zero_stage=1, precision="bf16", accumulation=2, pipeline=2)),
    (2, Layout(zero_stage=1, precision="bf16", sequence=2)),
]


def update_to_weight(before: WEIGHTS, after: WEIGHTS, places: Sequence[int | None], wanted: Sequence[int]) -> float:
    """||w' - w|| / ||w|| of all parameters of some blocks."""
    names = [name for name, place in zip(before, places, strict=True) if place in wanted]
    was, now = (torch.cat([weights[name] for name in names]).double() for weights in (before, after))
    return float((now - was).norm() / was.norm())


def float64(weights: WEIGHTS, config: ModelConfig) -> dict[str, Array]:
    """Masters as `naive` takes them."""
    model = Transformer(config, tiny.VOCAB, seed=None)
    return {name: weights[name].double().numpy().reshape(p.shape) for name, p in model.named_parameters()}


@pytest.mark.dist
@pytest.mark.sampled(4)
@pytest.mark.parametrize(("world", "layout"), CASES, ids=[f"ranks{world}-{layout}" for world, layout in CASES])
@pytest.mark.spare
def test_each_measure_in_each_layout(world: int, layout: Layout) -> None:
    config = tiny.tiny_model(layout.tied, attention=layout.attention, residual=layout.residual)
    plain = run_ranks(tiny.run, world, layout, STEPS + 2)
    outcomes = run_ranks(measured, world, layout)
    found, before, after, _ = outcomes[0]
    assert all(repr(other) == repr(found) for other, *_ in outcomes), "all ranks know it all"
    for (*_, outcome), alone in zip(outcomes, plain, strict=True):
        assert (outcome.losses, outcome.norms) == (alone.losses, alone.norms), "training felt it"
        assert all(torch.equal(outcome.state[key], tensor) for key, tensor in alone.state.items())

    places = [block_place(config, name) for name in before]
    ratios = [update_to_weight(before, after, places, [layer]) for layer in range(2)]
    assert found.update_to_weight == pytest.approx(ratios, rel=1e-6)
    assert found.update_to_weight_of_parts == found.update_to_weight, "of two layers each is a part"
    assert min(ratios) > 1e-3

    # In bf16 the model that is looked at is rounded, layer by layer.
    bounds = {"rtol": 1e-4, "atol": 1e-4} if layout.precision == "fp32" else {"rtol": 0.02, "atol": 0.01}
    state = float64(after, config)
    documents = documents_of(held_out_rows(range(HELD_OUT)))
    whole = look(state, config, documents)
    np.testing.assert_allclose(found.stream_rms, whole.stream_rms, **bounds)
    np.testing.assert_allclose(found.distance, whole.distance, **bounds)
    np.testing.assert_allclose(found.entropy, whole.entropy, **bounds)
    tokens = sum(label != -100 for _, labels in documents for label in labels)
    rises = [(look(state, config, documents, without=[layer]).loss - whole.loss) / tokens for layer in range(2)]
    bound = 1e-4 if layout.precision == "fp32" else 4e-3
    np.testing.assert_allclose(found.skip_eighth, rises, atol=bound)
    assert min(map(abs, rises)) > 2 * bound, "a layer must matter for this to say anything"


@pytest.mark.dist(world=2)
@pytest.mark.spare
def test_without_held_out_rows_updates_are_measured_all_the_same() -> None:
    layout = Layout(zero_stage=2)
    with_rows, without = (run_ranks(measured, 2, layout, rows)[0][0] for rows in (True, False))
    assert without == Diagnosis(with_rows.update_to_weight, with_rows.update_to_weight_of_parts)
    assert without.scalars() == {f"depth/update_to_weight/{n}": x for n, x in enumerate(without.update_to_weight)}


def parts_of_a_deep_one(layout: Layout) -> tuple[Diagnosis, WEIGHTS, WEIGHTS]:
    """`measured` of a model of ten layers, after one update."""
    spec = tiny.make_spec(layout, 1)
    engine = Engine(replace(spec, model=tiny.tiny_model(layers=10)), tiny.CPU)
    rows: Any = Rows()
    diagnostics = Diagnostics(engine, Control(), rows, 1)
    before = masters(engine)
    diagnostics.before(1)
    tiny.train(engine, 0, 1)
    return diagnostics.measure(), before, masters(engine)


@pytest.mark.dist(world=1)
@pytest.mark.spare
def test_a_deep_model_is_told_eighth_by_eighth() -> None:
    [(found, before, after)] = run_ranks(parts_of_a_deep_one, 1, Layout(zero_stage=1))
    config = tiny.tiny_model(layers=10)
    places = [block_place(config, name) for name in before]
    sizes = [len(part) for part in found.parts]
    assert sizes == [1, 1, 1, 2] * 2
    names = ["0", "1", "2", "3-4", "5", "6", "7", "8-9"]
    scalars = found.scalars()
    for name, part in zip(names, found.parts, strict=True):
        ratio = update_to_weight(before, after, places, part)
        assert scalars[f"depth/update_to_weight/{name}"] == pytest.approx(ratio, rel=1e-6)
        assert scalars[f"depth/growth/{name}"] == found.stream_rms[part[-1] + 1]
        heads = [value for layer in part for value in found.entropy[layer]]
        assert scalars[f"attention/entropy/{name}/mean"] == pytest.approx(sum(heads) / len(heads))
        assert scalars[f"attention/entropy/{name}/least"] == min(heads)
        assert scalars[f"attention/entropy/{name}/most"] == max(heads)
    assert len(scalars) == 3 * 8 + 1 + 2 * (3 * 8 + 40)
    state = float64(after, config)
    documents = documents_of(held_out_rows(range(HELD_OUT)))
    tokens = sum(label != -100 for _, labels in documents for label in labels)
    losses = [look(state, config, documents, without=part).loss / tokens for part in ((), found.parts[3])]
    assert found.skip_eighth[3] == pytest.approx(losses[1] - losses[0], abs=1e-4)


def test_the_tags_of_a_shallow_model_name_layers_and_heads() -> None:
    entropy, distance = ((0.5, 0.75), (1.0, 2.0)), ((3.0, 5.0), (7.0, 9.0))
    found = Diagnosis((0.25, 0.5), (0.25, 0.5), (1.0, 2.0, 3.0), (0.125, -0.25), distance, entropy)
    assert found.scalars() == {
        "depth/update_to_weight/0": 0.25,
        "depth/update_to_weight/1": 0.5,
        "depth/growth/embedding": 1.0,
        "depth/growth/0": 2.0,
        "depth/growth/1": 3.0,
        "depth/skip_eighth/0": 0.125,
        "depth/skip_eighth/1": -0.25,
        "attention/distance/0/least": 3.0,
        "attention/distance/0/mean": 4.0,
        "attention/distance/0/most": 5.0,
        "attention/distance/1/least": 7.0,
        "attention/distance/1/mean": 8.0,
        "attention/distance/1/most": 9.0,
        "attention/distance/0/0": 3.0,
        "attention/distance/0/1": 5.0,
        "attention/distance/1/0": 7.0,
        "attention/distance/1/1": 9.0,
        "attention/entropy/0/least": 0.5,
        "attention/entropy/0/mean": 0.625,
        "attention/entropy/0/most": 0.75,
        "attention/entropy/1/least": 1.0,
        "attention/entropy/1/mean": 1.5,
        "attention/entropy/1/most": 2.0,
        "attention/entropy/0/0": 0.5,
        "attention/entropy/0/1": 0.75,
        "attention/entropy/1/0": 1.0,
        "attention/entropy/1/1": 2.0,
    }


@pytest.mark.parametrize(("heads", "of_their_own"), [(32, True), (33, False)])
def test_a_thousand_heads_have_no_tags_of_their_own(heads: int, of_their_own: bool) -> None:
    values = tuple(tuple(float(head) for head in range(heads)) for _ in range(2))
    tags = Diagnosis((1.0, 1.0), (1.0, 1.0), (1.0, 1.0, 1.0), (0.0, 0.0), values, values).scalars()
    assert ("attention/entropy/1/31" in tags) == of_their_own
    assert tags["attention/distance/1/most"] == heads - 1
