"""The table: one row a parameter, initial values of wide heads, and sizes that stay while the width grows."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from pydantic import ValidationError

from solomonov.config import OptimizerConfig
from solomonov.model import parameterization
from solomonov.model.config import ModelConfig
from solomonov.model.counts import parameter_shapes
from solomonov.model.init import initial_value
from solomonov.model.parameterization import TABLE, Row, factors, row_of
from solomonov.model.residual import MODES
from solomonov.model.transformer import Transformer
from solomonov.optim import make_optimizer
from tests.solomonov.model.common import BIASES, VOCAB, random_ids, tiny_config, two_stacks


def test_every_parameter_has_exactly_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = {"output_gate": "head", "log_n_scale": True, "sink": True}
    for mode in MODES:
        for config in (tiny_config, two_stacks):
            for name in parameter_shapes(config(attention=everything, residual=mode, norm="layernorm"), VOCAB):
                row_of(name)
            for name in parameter_shapes(config(**BIASES | {"residual": mode, "value_residual": True}), VOCAB):
                row_of(name)
    for kind in ("patches", "frames"):
        biased = BIASES | {"attention": {"preset": "vanilla"}, "front": {"kind": kind}, "value_residual": True}
        for name in parameter_shapes(two_stacks(**biased), VOCAB):
            row_of(name)
    with pytest.raises(ValueError, match="0 rows"):
        row_of("layers.0.attention.door.weight")
    monkeypatch.setattr(parameterization, "TABLE", (*TABLE, Row(r"head\..*", "head", None)))
    with pytest.raises(ValueError, match="2 rows"):
        row_of("head.weight")


def test_a_wide_head_starts_smaller_than_its_inputs_alone_would_have_it() -> None:
    shape = {"d_model": 512, "heads": 8, "kv_heads": 8}
    wide = tiny_config(**shape, parameterization="mup", base_d_model=32)
    for config, std in ((wide, 1 / math.sqrt(512) / 4), (tiny_config(**shape), 1 / math.sqrt(512))):
        value = initial_value("head.weight", (300, 512), config, 0)
        assert float(value.std()) == pytest.approx(std, rel=0.02)


def test_at_the_base_nothing_is_multiplied() -> None:
    base = tiny_config(parameterization="completep", base_d_model=16, base_layers=2, layers=2)
    for name in parameter_shapes(base, VOCAB):
        for muon in (False, True):
            found, plain = factors(name, base, muon=muon), factors(name, tiny_config(), muon=muon)
            assert (found.lr, found.eps) == (plain.lr, plain.eps) == (1.0, 1.0)
            assert found.decay == plain.decay or muon


def moved(kind: str, width: int, optimizer: Literal["adamw", "muon"], updates: int = 4) -> float:
    """Root mean square of what some updates at a rate of 0.001, on the same rows, change of the logits. Those of Muon
    are without momentum, and orthogonal by an SVD."""
    base = {} if kind == "sp" else {"base_d_model": 32}
    config = ModelConfig.model_validate(
        {"layers": 2, "d_model": width, "heads": width // 16, "d_ff": 2 * width, "parameterization": kind, **base}
        | {"base_layers": 2, "residual": "scaled"}
    )
    model = Transformer(config, VOCAB, seed=0)
    settings = OptimizerConfig(kind=optimizer, lr=0.001, weight_decay=0.0)
    adamw = make_optimizer(model.named_parameters(), settings, config, fused=False)
    by_muon = [group for group in adamw.param_groups if group["muon"]]
    adamw.param_groups = [group for group in adamw.param_groups if not group["muon"]]
    ids, labels = random_ids(4, 16), random_ids(4, 16, seed=1)
    documents = torch.zeros_like(ids)
    before = model(ids, documents).detach()
    for _ in range(updates):
        model.zero_grad()
        (model(ids, documents, labels) / labels.numel()).backward()
        for group in adamw.param_groups:
            group["lr"] = settings.lr * group["lr_scale"]
        adamw.step()
        with torch.no_grad():
            for group in by_muon:
                for matrix in group["params"]:
                    assert matrix.grad is not None
                    left, _, right = torch.linalg.svd(matrix.grad, full_matrices=False)
                    size = 0.2 * math.sqrt(max(matrix.shape))
                    matrix -= settings.lr * group["lr_scale"] * size * (left @ right)
    return float((model(ids, documents).detach() - before).square().mean().sqrt())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_updates_move_logits_alike_at_every_width_but_in_the_standard_way(optimizer: Literal["adamw", "muon"]) -> None:
    """The coordinate check of arXiv 2203.03466, appendix D.1, 16 times as wide: logits move about as far (what comes of
    the head's initial values falls as 1/sqrt(n)); the standard parameterization moves them eight times as far."""
    found = {kind: [moved(kind, width, optimizer) for width in (32, 512)] for kind in ("sp", "mup", "completep")}
    assert found["mup"] == found["completep"], "of the base's depth"
    assert found["mup"][0] == found["sp"][0], "of the base's width"
    assert 0.5 < found["mup"][1] / found["mup"][0] < 1.5
    assert found["sp"][1] / found["sp"][0] > 6


def test_of_a_front_what_widens_follows_the_width() -> None:
    """The first matrix has as many inputs at every width: its rate and decay stay, as an embedding's rate does (arXiv
    2203.03466, table 8). The second one is a hidden matrix, of no stack's depth."""
    scale = {"parameterization": "completep", "residual": "auto", "base_d_model": 8, "base_layers": 2, "layers": 4}
    for architecture in ("encoder", "encoder_decoder"):
        patches = tiny_config(**scale, architecture=architecture, front={"kind": "patches"})
        frames = tiny_config(**scale, architecture=architecture, front={"kind": "frames"})
        for config, name, expected in (
            (patches, "front.projection.weight", (1.0, 1.0, 0.5)),
            (patches, "front.projection.bias", (1.0, 0.0, 0.5)),
            (frames, "front.first.weight", (1.0, 1.0, 0.5)),
            (frames, "front.second.weight", (0.5, 2.0, 0.5)),
            (frames, "front.second.bias", (1.0, 0.0, 0.5)),
        ):
            assert name in parameter_shapes(config, VOCAB)
            found = factors(name, config)
            assert (found.lr, found.decay, found.eps) == expected, name
    plain = tiny_config(architecture="encoder", front={"kind": "patches"})
    assert factors("front.projection.weight", plain).decay == 1.0
    assert factors("front.projection.bias", plain).decay == 0.0


def test_of_two_stacks_eps_follows_the_depth_of_its_own() -> None:
    config = two_stacks(
        parameterization="completep",
        residual="auto",
        base_d_model=8,
        base_layers=2,
        layers=4,
        encoder_layers=16,
        value_residual=True,
    )
    expected = {
        "encoder.layers.0.attention.q.weight": (0.5, 2.0, 1 / 16),
        "layers.0.attention.q.weight": (0.5, 2.0, 1 / 4),
        "layers.3.cross_attention.k.weight": (0.5, 2.0, 1 / 4),
        "encoder.layers.15.attention_norm.weight": (1.0, 0.0, 1 / 16),
        "layers.1.cross_attention.q_norm.weight": (1.0, 0.0, 1 / 4),
        "encoder.layers.1.attention_value_mix": (1.0, 0.0, 1 / 16),
        "layers.3.attention_value_mix": (1.0, 0.0, 1 / 4),
        "encoder.final_norm.weight": (1.0, 0.0, 1 / 2),
    }
    for name, (lr, decay, eps) in expected.items():
        assert name in parameter_shapes(config, VOCAB)
        found = factors(name, config)
        assert (found.lr, found.decay, found.eps) == (lr, decay, eps), name


def test_what_is_beside_the_matrices_follows_its_row() -> None:
    config = tiny_config(
        **BIASES | {"residual": "auto", "parameterization": "completep", "base_d_model": 8, "base_layers": 2},
        layers=8,
    )
    expected = {
        "embedding.positions": (1.0, 0.0, 1 / 2),
        "embedding.norm.bias": (1.0, 0.0, 1 / 2),
        "layers.0.attention.q.bias": (1.0, 0.0, 1 / 8),
        "layers.7.feed_forward.down.bias": (1.0, 0.0, 1 / 8),
        "head.transform.dense.weight": (0.5, 2.0, 1 / 2),
        "head.transform.dense.bias": (1.0, 0.0, 1 / 2),
        "head.transform.norm.weight": (1.0, 0.0, 1 / 2),
        "head.bias": (1.0, 0.0, 1 / 2),
    }
    shapes = parameter_shapes(config, VOCAB)
    for name, (lr, decay, eps) in expected.items():
        found = factors(name, config)
        assert (found.lr, found.decay, found.eps) == (lr, decay, eps), name
        value = initial_value(name, shapes[name], config, 0)
        assert bool(value.any()) == (not name.endswith("bias")), name


def test_values_begin_as_the_mean_of_those_of_the_first_block_and_their_own() -> None:
    """ResFormer with learned numbers (arXiv 2410.17897) starts them at 0.5."""
    model = Transformer(tiny_config(layers=3, value_residual=True), VOCAB, seed=0)
    assert model.layers[0].attention_value_mix is None
    assert [block.attention_value_mix.tolist() for block in list(model.layers)[1:]] == [[0.5, 0.5]] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameterization": "completep", "residual": "prenorm"}, "Set residual to auto or scaled"),
        ({"parameterization": "completep", "residual": "deepnorm"}, "or parameterization to mup"),
        ({"parameterization": "mup", "tie_embeddings": True}, "Set tie_embeddings to false"),
        ({"base_d_model": 64}, "Set parameterization to mup or completep"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny_config(**changes)


def test_completep_scales_its_branches_from_the_base_depth_on() -> None:
    assert tiny_config(parameterization="completep").residual_mode == "scaled"
    assert tiny_config(parameterization="mup").residual_mode == "prenorm"
