"""Muon in every layout gives the numbers of a plain loop that orthogonalises by singular values in float64."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest
import torch

from solomonov.model.transformer import Transformer
from tests.distributed.test_engine import assert_equal_within, assert_layout_ran
from tests.support import tiny
from tests.support.naive import naive_newton_schulz
from tests.support.ranks import run_ranks
from tests.support.tiny import MUON, Layout, Outcome

STEPS = 5
pytestmark = pytest.mark.dist
CASES = [
    (1, Layout(zero_stage=0, muon=True)),
    (1, Layout(zero_stage=1, muon=True)),
    (2, Layout(zero_stage=0, accumulation=2, muon=True)),
    (2, Layout(zero_stage=1, muon=True, tied=True)),
    (2, Layout(zero_stage=2, accumulation=4, muon=True)),
    (2, Layout(zero_stage=3, accumulation=2, muon=True)),
    (2, Layout(zero_stage=1, accumulation=2, pipeline=2, muon=True)),
    (2, Layout(zero_stage=1, accumulation=2, offload="optimizer", muon=True)),
    (2, Layout(zero_stage=3, offload="parameters", muon=True)),
    (4, Layout(zero_stage=1, muon=True)),
    (4, Layout(zero_stage=3, muon=True)),
    (4, Layout(zero_stage=1, pipeline=2, tied=True, muon=True)),
]


@cache
def reference(tied: bool) -> Outcome:
    """The whole batch at once; each parameter by its optimizer's formula."""
    model = Transformer(tiny.tiny_model(tied), tiny.VOCAB, seed=tiny.SEED)
    named = dict(model.named_parameters())
    hidden = {name: p for name, p in named.items() if p.dim() == 2 and name not in ("embedding.weight", "head.weight")}
    others = [p for name, p in named.items() if name not in hidden]
    decayed = [p for name, p in named.items() if name == "head.weight"]
    assert MUON.adamw_lr is not None
    groups = [{"params": decayed, "weight_decay": MUON.weight_decay}]
    groups += [{"params": [p for p in others if all(p is not q for q in decayed)], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=MUON.adamw_lr, betas=MUON.betas, eps=MUON.eps)
    momenta = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in hidden.items()}
    losses, norms = [], []
    for step in range(STEPS):
        rows = tiny.batch(step, list(range(tiny.ROWS)))
        loss = model(rows.input_ids, rows.document_ids, rows.labels) / rows.valid_tokens
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), tiny.CLIPPING)))
        with torch.no_grad():
            for name, p in hidden.items():
                assert p.grad is not None
                gradient = p.grad.double()
                momenta[name] = MUON.momentum * momenta[name] + (1 - MUON.momentum) * gradient
                ahead = MUON.momentum * momenta[name] + (1 - MUON.momentum) * gradient
                size = 0.2 * math.sqrt(max(p.shape)) * MUON.lr
                p.copy_((1 - MUON.lr * MUON.weight_decay) * p.double() - size * naive_newton_schulz(ahead))
        adamw.step()
        model.zero_grad()
        losses.append(float(loss.detach()))
    state = {(name, "master"): p.detach().reshape(-1) for name, p in named.items()}
    state |= {(name, "momentum"): momentum.float().reshape(-1) for name, momentum in momenta.items()}
    for name, p in named.items():
        if name not in hidden:
            state |= {(name, moment): adamw.state[p][moment].reshape(-1) for moment in ("exp_avg", "exp_avg_sq")}
    return Outcome(losses, norms, {}, state)


@pytest.mark.sampled(5)
@pytest.mark.parametrize(("world", "layout"), CASES, ids=[f"ranks{world}-{layout}" for world, layout in CASES])
def test_layout_equals_plain_pytorch(world: int, layout: Layout) -> None:
    outcomes = run_ranks(tiny.run, world, layout, STEPS)
    assert_layout_ran(outcomes, layout)
    for outcome in outcomes:
        assert_equal_within(outcome, reference(layout.tied), 1e-5)


@pytest.mark.parametrize(
    ("world", "saved", "resumed_world", "resumed"),
    [
        (2, Layout(zero_stage=1, muon=True), 2, Layout(zero_stage=1, muon=True)),
        (2, Layout(zero_stage=3, muon=True), 2, Layout(zero_stage=3, muon=True)),
        (2, Layout(zero_stage=1, muon=True), 4, Layout(zero_stage=3, muon=True)),
        (4, Layout(zero_stage=3, muon=True), 2, Layout(zero_stage=1, accumulation=2, pipeline=2, muon=True)),
        (2, Layout(zero_stage=2, muon=True), 1, Layout(zero_stage=0, muon=True)),
    ],
    ids=str,
)
@pytest.mark.spare
def test_momentum_goes_through_a_checkpoint(
    world: int, saved: Layout, resumed_world: int, resumed: Layout, tmp_path: Path
) -> None:
    digest, expected = run_ranks(tiny.run_and_save, world, saved, 3, tmp_path / "one")[0]
    again, outcome = run_ranks(tiny.restore_and_run, resumed_world, resumed, tmp_path / "one", tmp_path / "two")[0]
    assert again == digest, "masters and momentum to the bit, wherever they lie now"
    if (world, saved) == (resumed_world, resumed):
        assert (outcome.losses, outcome.norms) == (expected.losses, expected.norms)
        assert all(torch.equal(tensor, expected.state[key]) for key, tensor in outcome.state.items())
    else:
        assert_equal_within(outcome, expected, 1e-5)
