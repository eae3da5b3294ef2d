"""Groups against the model's own parameters, and one AdamW update against the formula of the paper in float64."""

from __future__ import annotations

import pytest
import torch

from solomonov.config import OptimizerConfig
from solomonov.model.transformer import Transformer
from solomonov.optim import make_optimizer, parameter_groups
from tests.solomonov.model.common import VOCAB, spread_model, tiny_config

# What the weights multiply: matrices decay; gains, biases, numbers of a head, and the table of which a step touches few
# rows, do not.
PLAIN = {"embedding.weight", "final_norm.weight"}


def plain_by_hand(names: list[str]) -> set[str]:
    ends = ("gate.bias", "log_scale", "sink")
    return {name for name in names if name in PLAIN or name.split(".")[-2].endswith("norm") or name.endswith(ends)}


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_in_one_group_with_its_decay(tied: bool) -> None:
    flags = {"output_gate": "head", "log_n_scale": True, "sink": True}
    model = spread_model(tiny_config(tie_embeddings=tied, attention=flags))
    named = dict(model.named_parameters())
    groups = parameter_groups(named.items(), OptimizerConfig(weight_decay=0.25), model.config)
    decay_of = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(named) == len(decay_of)
    plain = plain_by_hand(list(named))
    assert {name for name, p in named.items() if decay_of[id(p)] == 0.0} == plain
    assert {name for name, p in named.items() if decay_of[id(p)] == 0.25} == set(named) - plain
    matrices = {name for name, p in named.items() if p.ndim == 2}
    assert set(named) - plain == matrices - {"embedding.weight"}


def test_a_group_without_parameters_is_left_out() -> None:
    only = [("head.weight", torch.nn.Parameter(torch.zeros(2, 2)))]
    assert len(parameter_groups(only, OptimizerConfig(), tiny_config())) == 1
    assert len(parameter_groups(only, OptimizerConfig(), tiny_config(), fill=True)) == 2


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_groups_of_a_wide_and_deep_model_have_the_constants_of_the_table(kind: str) -> None:
    """Four times as wide and three times as deep as the base, constants written out by hand."""
    config = tiny_config(parameterization="completep", base_d_model=4, layers=6, base_layers=2)
    named = dict(Transformer(config, VOCAB, seed=0).named_parameters())
    settings = OptimizerConfig.model_validate({"kind": kind, "lr": 0.01, "eps": 1e-6, "weight_decay": 0.2})
    found = {id(p): group for group in parameter_groups(named.items(), settings, config) for p in group["params"]}
    hidden = (0.5, 0.4, None) if kind == "muon" else (0.25, 0.8, 1e-6 / 12)
    expected = {
        "embedding.weight": (1.0, 0.0, 1e-6 / 4),
        "head.weight": (0.25, 0.8, 1e-6),
        "final_norm.weight": (1.0, 0.0, 1e-6 / 4),
        "layers.5.attention_norm.weight": (1.0, 0.0, 1e-6 / 12),
        "layers.5.attention.q_norm.weight": (1.0, 0.0, 1e-6 / 12),
        "layers.5.attention.out.weight": hidden,
        "layers.0.feed_forward.gate.weight": hidden,
    }
    for name, (scale, decay, eps) in expected.items():
        group = found[id(named[name])]
        assert group["lr_scale"] == pytest.approx(scale), name
        assert group["weight_decay"] == pytest.approx(decay), name
        assert eps is None or group["eps"] == pytest.approx(eps), name
        assert group["muon"] == (eps is None), name


def test_three_updates_are_those_of_the_paper() -> None:
    """Loshchilov & Hutter, algorithm 2 with the rate in front of the decay, in float64 by hand."""
    config = OptimizerConfig(lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    matrix, gain = "layers.0.attention.q.weight", "final_norm.weight"
    generator = torch.Generator().manual_seed(1)
    start = {name: torch.randn(4, 3, generator=generator) for name in (matrix, gain)}
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = make_optimizer(parameters.items(), config, tiny_config(), fused=False)
    expected = {name: value.double() for name, value in start.items()}
    first = {name: torch.zeros(4, 3, dtype=torch.float64) for name in start}
    second = {name: torch.zeros(4, 3, dtype=torch.float64) for name in start}
    for update in (1, 2, 3):
        for name, parameter in parameters.items():
            gradient = torch.randn(4, 3, generator=generator)
            parameter.grad = gradient.clone()
            g = gradient.double()
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.9 * second[name] + 0.1 * g * g
            decay = 0.3 if name == matrix else 0.0
            direction = (first[name] / (1 - 0.8**update)) / ((second[name] / (1 - 0.9**update)).sqrt() + 1e-6)
            expected[name] = expected[name] - 0.01 * decay * expected[name] - 0.01 * direction
        optimizer.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-5, atol=1e-6)
