"""Generation against full forward passes without a cache, and choices against counted frequencies."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from solomonov.errors import ConfigurationError
from solomonov.generate import Sampling, choose, generate, stream
from tests.solomonov.model.common import VOCAB, spread_model, tiny_config

PROMPT = [3, 1, 4, 1, 5]


def test_greedy_tokens_are_those_of_full_forward_passes() -> None:
    model = spread_model(tiny_config())
    ids = list(PROMPT)
    for _ in range(12):
        row = torch.tensor([ids])
        ids.append(int(model(row, torch.zeros_like(row))[0, -1].argmax()))
    assert generate(model, PROMPT, max_new_tokens=12, temperature=0.0) == ids[len(PROMPT) :]
    assert model.training, "the mode was not given back"


def test_sampled_tokens_are_those_of_full_forward_passes() -> None:
    model = spread_model(tiny_config())
    sampling = Sampling(temperature=1.3, top_k=9, top_p=0.9, seed=5)
    ids = list(PROMPT)
    for draw in range(12):
        row = torch.tensor([ids])
        ids.append(choose(model(row, torch.zeros_like(row))[0, -1], sampling, draw))
    found = generate(model, PROMPT, max_new_tokens=12, temperature=1.3, top_k=9, top_p=0.9, seed=5)
    assert found == ids[len(PROMPT) :]
    other = generate(model, PROMPT, max_new_tokens=12, temperature=1.3, top_k=9, top_p=0.9, seed=6)
    assert found != other


def test_the_end_of_text_ends_it_and_is_left_out() -> None:
    model = spread_model(tiny_config())
    whole = generate(model, PROMPT, max_new_tokens=12, temperature=1.0, seed=1)
    end = whole[4]
    cut = generate(model, PROMPT, max_new_tokens=12, temperature=1.0, seed=1, eos_id=end)
    assert cut == whole[: whole.index(end)]
    assert generate(model, PROMPT, max_new_tokens=0) == []


def test_tokens_come_one_by_one() -> None:
    model = spread_model(tiny_config())
    tokens = stream(model, PROMPT, Sampling(temperature=0.0), max_new_tokens=10**6)
    expected = generate(model, PROMPT, max_new_tokens=3, temperature=0.0)
    assert [next(tokens) for _ in range(3)] == expected


def test_choices_follow_the_probabilities() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, -3.0])
    sampling = Sampling(temperature=0.7, seed=3)
    draws = 4000
    counts = Counter(choose(logits, sampling, draw) for draw in range(draws))
    for token, share in enumerate((logits / 0.7).softmax(0).tolist()):
        # Four standard deviations of a binomial share.
        assert abs(counts[token] / draws - share) <= 4 * (share * (1 - share) / draws) ** 0.5 + 1e-9


@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12),
    top_k=st.integers(0, 14),
    top_p=st.floats(0.01, 1.0),
    draw=st.integers(0, 1000),
)
def test_choices_stay_within_top_k_and_top_p(logits: list[float], top_k: int, top_p: float, draw: int) -> None:
    chosen = choose(torch.tensor(logits), Sampling(temperature=1.0, top_k=top_k, top_p=top_p), draw)
    probabilities = torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if top_k:
        order = order[:top_k]
    total = sum(probabilities[token] for token in order)
    nucleus: list[int] = []
    while not nucleus or sum(probabilities[token] for token in nucleus) < (top_p - 1e-9) * total:
        nucleus.append(order[len(nucleus)])
    assert chosen in nucleus
    assert choose(torch.tensor(logits), Sampling(temperature=0.0, top_k=top_k), draw) == order[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Sampling(**changes)  # type: ignore[arg-type]


def test_a_text_longer_than_learned_positions_is_refused() -> None:
    model = spread_model(tiny_config(attention={"position": "learned", "train_tokens": 8}))
    assert len(generate(model, [1, 2, 3], max_new_tokens=5)) == 5
    with pytest.raises(ConfigurationError, match="learned positions"):
        generate(model, [1, 2, 3], max_new_tokens=6)


@pytest.mark.parametrize("prompt", [[], [VOCAB], [-1]])
def test_prompts_of_no_or_strange_tokens_are_refused(prompt: list[int]) -> None:
    with pytest.raises(ConfigurationError, match="prompt"):
        generate(spread_model(tiny_config()), prompt, max_new_tokens=1)
