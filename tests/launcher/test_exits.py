"""The meaning of exit codes against the published table, and which end of several is named as the cause."""

from __future__ import annotations

import signal

import pytest

from launcher.exits import (
    Outcome,
    RankExit,
    classify,
    describe,
    first_cause,
    order_of_death,
    shell_code,
    signal_name,
)


def ends(*codes: int, killed: tuple[int, ...] = (), lost: tuple[int, ...] = ()) -> list[RankExit]:
    """Ends of ranks 0.. in the order given."""
    return [
        RankExit(rank=n, pid=100 + n, code=code, killed=n in killed, lost=n in lost) for n, code in enumerate(codes)
    ]


def test_classify_follows_the_table() -> None:
    table = {
        0: Outcome.DONE,
        2: Outcome.USAGE,
        70: Outcome.NUMERICAL,
        74: Outcome.DAMAGED,
        75: Outcome.AGAIN,
        78: Outcome.CONFIGURATION,
    }
    for code in range(-64, 256):
        assert classify(code) is table.get(code, Outcome.CRASH), code


def test_verdicts_are_the_failures_that_are_not_crashes() -> None:
    assert {outcome for outcome in Outcome if outcome.is_verdict} == {
        Outcome.USAGE,
        Outcome.NUMERICAL,
        Outcome.DAMAGED,
        Outcome.CONFIGURATION,
    }
    assert {outcome for outcome in Outcome if not outcome.is_failure} == {Outcome.DONE, Outcome.AGAIN}


def test_words_and_shell_codes() -> None:
    assert describe(-9) == "killed by SIGKILL"
    assert describe(78) == "exit code 78 (the configuration is wrong)"
    assert describe(1) == "exit code 1 (crashed)"
    assert signal_name(1) is None
    assert signal_name(-(signal.SIGRTMIN + 3)) == f"signal {signal.SIGRTMIN + 3}"
    assert [shell_code(code) for code in (0, 78, -9, -15)] == [0, 78, 137, 143]


@pytest.mark.parametrize(
    ("codes", "killed", "cause"),
    [
        ((0, 0), (), 0),
        ((-9, 1), (), 0),
        ((1, -9), (), 0),  # the second is not the launcher's doing, but it came later
        ((1, 78), (), 1),  # a verdict explains the crash of a peer
        ((-9, 78), (), 0),  # but not a kill
        ((1, -9), (1,), 0),  # killed by the launcher
        ((75, -9), (1,), 1),  # one saved, the other had to be killed: not saved
        ((0, 75), (), 1),
        ((75, 0), (), 0),
        ((75, 1), (), 1),
        ((-9, -9), (0, 1), 0),
        ((2, 1), (), 0),
    ],
)
def test_first_cause(codes: tuple[int, ...], killed: tuple[int, ...], cause: int) -> None:
    assert first_cause(ends(*codes, killed=killed)).rank == cause


@pytest.mark.parametrize(
    ("codes", "cause"),
    [
        ((1, -9), 1),  # one hears of it last, and it was the first
        ((1, -9, 78), 2),
        ((-11, -9), 0),
        ((75, -9), 1),
    ],
)
def test_a_rank_that_nobody_saw_end_explains_the_crash_of_a_peer(codes: tuple[int, ...], cause: int) -> None:
    assert first_cause(ends(*codes, lost=(1,))).rank == cause


def test_ends_seen_together_are_ordered_by_likelihood() -> None:
    assert [end.code for end in order_of_death(ends(0, 1, 75, 78, -9))] == [-9, 78, 1, 0, 75]
    assert [end.rank for end in order_of_death(ends(1, 1, 1))] == [0, 1, 2]
