"""The overrides of each run of a sweep."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solomonov.errors import ConfigurationError
from solomonov.sweep import MAX_RUNS, combinations

KEYS = st.lists(st.from_regex(r"[a-k]{1,4}\.[a-z]{1,4}", fullmatch=True), min_size=1, max_size=3, unique=True)
VALUES = st.lists(st.from_regex(r"[0-9a-z.=-]{1,5}", fullmatch=True), min_size=1, max_size=4, unique=True)


def test_every_combination_the_last_key_fastest() -> None:
    assert combinations(["optimizer.lr=0.1,0.2", "run.seed=1,2"]) == [
        ["optimizer.lr=0.1", "run.seed=1"],
        ["optimizer.lr=0.1", "run.seed=2"],
        ["optimizer.lr=0.2", "run.seed=1"],
        ["optimizer.lr=0.2", "run.seed=2"],
    ]


@given(KEYS, st.data())
def test_each_run_has_each_key_and_no_two_runs_are_alike(keys: list[str], data: st.DataObject) -> None:
    values = [data.draw(VALUES) for _ in keys]
    found = combinations([f"{key}={','.join(each)}" for key, each in zip(keys, values, strict=True)])
    assert len({tuple(words) for words in found}) == len(found)
    total = 1
    for each in values:
        total *= len(each)
    assert len(found) == total
    for words in found:
        assert [word.partition("=")[0] for word in words] == keys
        assert all(word.partition("=")[2] in each for word, each in zip(words, values, strict=True))


@pytest.mark.parametrize(
    "sweeps",
    [
        ["optimizer.lr"],
        ["optimizer.lr="],
        ["optimizer.lr=1,"],
        ["=1,2"],
        [""],
        ["run.seed=1", "run.seed=2"],
        ["run.name=a,b"],
        ["run.folder=a,b"],
        ["launch.nodes=1,2"],
    ],
)
def test_what_is_no_sweep_is_refused(sweeps: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="this is no sweep") as caught:
        combinations(sweeps)
    assert caught.value.got == f"--sweep {sweeps[-1]}"


def test_more_runs_than_an_array_holds_are_refused() -> None:
    numbers = ",".join(map(str, range(101)))
    with pytest.raises(ConfigurationError, match="too many runs") as caught:
        combinations([f"a={numbers}", f"b={numbers[: numbers.index(',10,')]}"])
    assert caught.value.got == f"{101 * 10} combinations"
    assert len(combinations([f"a={','.join(map(str, range(MAX_RUNS)))}"])) == MAX_RUNS
