"""What the ranks of a proof run: a layout without a fault holds, and one gradient that is off by a thousandth is found
in its layer; outcomes survive the way through files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from solomonov.config import parse_config
from solomonov.distributed import Control
from solomonov.equivalence import REFERENCE, Case, Outcome, Trial, compare, scale_down
from solomonov.equivalence_rank import load_outcome, rows_of, run_case, save_outcome
from tests.support.faulty_rank import FAULTY, scale_a_gradient
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist(world=4)
CONFIG = """\
run: {name: proven, seed: 3}
model: {layers: 3, d_model: 32, heads: 4, kv_heads: 2, d_ff: 64}
data: {folder: d, sources: [{name: own, path: x}]}
training: {total_steps: 9, gradient_clipping: 0.5, z_loss: 0.001, ema_decay: 0.8}
"""


def trial(*words: str) -> Trial:
    return scale_down(parse_config(CONFIG, words, where="here").config, 2)


def run_cases(of: Trial, cases: list[Case], fault: bool) -> list[Outcome]:
    """Inside a rank: the outcomes of some layouts, with or without the fault in each."""
    plant = (lambda case, engine: scale_a_gradient(engine)) if fault else (lambda case, engine: None)
    return [run_case(of, case, Control(), plant) for case in cases]


@pytest.fixture(scope="module")
def reference() -> Outcome:
    """One rank that shares nothing."""
    [[found]] = run_ranks(run_cases, 1, trial(), [REFERENCE], False)
    assert isinstance(found, Outcome)
    return found


CASES = [
    Case(ranks=2, zero_stage=0, accumulation=4, recompute="selective"),
    Case(ranks=2, zero_stage=2, accumulation=2, recompute="full"),
    Case(ranks=2, zero_stage=3),
    Case(ranks=2, zero_stage=1, pipeline=2, accumulation=2),
    Case(ranks=2, zero_stage=0, pipeline=2),
    Case(ranks=2, zero_stage=1, sequence=2, accumulation=2, recompute="selective"),
    Case(ranks=2, zero_stage=0, sequence=2, recompute="full"),
    Case(ranks=2, zero_stage=3, offload="parameters", accumulation=2),
    Case(ranks=2, zero_stage=1, precision="bf16"),
    Case(ranks=2, zero_stage=2, sequence=2, precision="bf16"),
]


def test_layouts_hold(reference: Outcome) -> None:
    outcomes = run_ranks(run_cases, 2, trial(), CASES, False, timeout=180)
    for case, found in zip(CASES, outcomes[0], strict=True):
        verdict = compare(case, trial(), found, reference)
        assert verdict.holds, verdict
        assert (verdict.master is None) == (case.precision == "bf16")
    assert [found.losses for found in outcomes[0]] == [found.losses for found in outcomes[1]]


OTHERS = {
    "encoder": [
        Case(ranks=2, zero_stage=1, sequence=2, accumulation=2, recompute="full"),
        Case(ranks=2, zero_stage=0, pipeline=2, accumulation=2),
        Case(ranks=2, zero_stage=3, offload="parameters", recompute="selective"),
    ],
    "encoder_decoder": [
        Case(ranks=2, zero_stage=0, pipeline=2, accumulation=4, recompute="full", every=2),
        Case(ranks=2, zero_stage=1, pipeline=2, accumulation=2, offload="optimizer"),
        Case(ranks=2, zero_stage=2, accumulation=2, recompute="full"),
        Case(ranks=2, zero_stage=3, recompute="selective", accumulation=2),
        Case(ranks=2, zero_stage=1, pipeline=2, precision="bf16"),
    ],
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("architecture", OTHERS)
@pytest.mark.parametrize("tied", ["false", "true"])
@pytest.mark.spare
def test_layouts_of_other_architectures_hold_and_a_fault_is_found_in_its_layer(architecture: str, tied: str) -> None:
    of = trial(f"model.architecture={architecture}", f"model.tie_embeddings={tied}")
    [[reference]] = run_ranks(run_cases, 1, of, [REFERENCE], False)
    cases = OTHERS[architecture]
    for case, found in zip(cases, run_ranks(run_cases, 2, of, cases, False, timeout=180)[0], strict=True):
        verdict = compare(case, of, found, reference)
        assert verdict.holds, verdict
    for case, found in zip(cases, run_ranks(run_cases, 2, of, cases[:2], True, timeout=180)[0], strict=False):
        verdict = compare(case, of, found, reference)
        assert str(verdict.parts).startswith(f"layers.1, by the gradient of {FAULTY} in step 1: 1.0e-03"), case


@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
@pytest.mark.spare
def test_layouts_hold_with_muon(architecture: str) -> None:
    """The first stage of a pipeline has no head, which AdamW updates with decay: its groups of parameters differ."""
    of = trial("optimizer.kind=muon", "model.tie_embeddings=false", f"model.architecture={architecture}")
    [[reference]] = run_ranks(run_cases, 1, of, [REFERENCE], False)
    cases = [
        Case(ranks=2, zero_stage=0, pipeline=2, accumulation=2),
        Case(ranks=2, zero_stage=1, pipeline=2, offload="optimizer"),
        Case(ranks=2, zero_stage=3, offload="optimizer", accumulation=4),
    ]
    for case, found in zip(cases, run_ranks(run_cases, 2, of, cases, False, timeout=180)[0], strict=True):
        verdict = compare(case, of, found, reference)
        assert verdict.holds, verdict


@pytest.mark.spare
def test_rows_are_shared_by_more_ranks_than_there_are_key_heads() -> None:
    """Each of four ranks gets a copy of one of the two; or there are two copies of the model, on two ranks each."""
    of = trial()
    [[reference]] = run_ranks(run_cases, 1, of, [REFERENCE], False)
    cases = [Case(ranks=4, zero_stage=1, sequence=4), Case(ranks=4, zero_stage=3, sequence=2, accumulation=2)]
    for case, found in zip(cases, run_ranks(run_cases, 4, of, cases, False, timeout=180)[0], strict=True):
        verdict = compare(case, of, found, reference)
        assert verdict.holds, verdict


def test_a_gradient_that_is_off_by_a_thousandth_is_found_in_its_layer(reference: Outcome) -> None:
    outcomes = run_ranks(run_cases, 2, trial(), CASES[:8], True, timeout=180)[0]
    for case, found in zip(CASES, outcomes, strict=False):
        verdict = compare(case, trial(), found, reference)
        assert verdict.verdict == "differs", verdict
        assert str(verdict.parts).startswith(f"layers.1, by the gradient of {FAULTY} in step 1: 1.0e-03"), case


def test_rows_are_those_of_the_step_wherever_they_are_drawn() -> None:
    of = trial()
    whole = rows_of(of, 2, range(of.rows))
    part = rows_of(of, 2, [5, 1])
    assert torch.equal(part.input_ids, whole.input_ids[[5, 1]])
    assert torch.equal(part.labels, whole.labels[[5, 1]])
    assert len({int((row != -100).sum()) for row in whole.labels}) > 3, "rows predict as many tokens as each other"
    assert not torch.equal(rows_of(of, 3, range(of.rows)).input_ids, whole.input_ids)
    assert whole.source is None


def test_sources_are_those_of_the_step_and_some_documents_have_none() -> None:
    of = trial("model.architecture=encoder_decoder")
    whole, part = rows_of(of, 2, range(of.rows)), rows_of(of, 2, [5, 1])
    assert whole.source is not None
    assert part.source is not None
    for some, every in zip(part.source, whole.source, strict=True):
        assert torch.equal(some, every[[5, 1]])
    assert whole.source.input_ids.shape[1] > whole.input_ids.shape[1]
    having = [set(row.tolist()) for row in whole.source.document_ids]
    assert having[0] == {0}, "the second document has none"
    assert having[1] == {1, -1}, "the first one has none, and there is padding"
    assert having[2] == {0, 1, -1}
    assert {-1, 0, 1} == set(whole.document_ids[2].tolist())
    decoder = rows_of(trial(), 2, range(of.rows))
    assert torch.equal(decoder.input_ids, whole.input_ids), "the source is drawn behind the rest"


def test_an_outcome_survives_its_files(reference: Outcome, tmp_path: Path) -> None:
    assert load_outcome(tmp_path, 7) is None
    save_outcome(tmp_path, 7, reference)
    found = load_outcome(tmp_path, 7)
    assert found is not None
    assert (found.losses, found.norms, found.layouts) == (reference.losses, reference.norms, reference.layouts)
    assert found.state.keys() == reference.state.keys()
    assert all(torch.equal(found.state[key], tensor) for key, tensor in reference.state.items())
