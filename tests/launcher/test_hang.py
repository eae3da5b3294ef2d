"""The watch over a gang, against a naive reading of its rule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.hang import FACTOR, KNOWN_STAYS, WINDOW, Beat, GangWatch, Hang, HangLimits

SECTIONS = ("data", "forward", "backward")


def watching(limits: HangLimits) -> GangWatch:
    """One that is never held up itself, however seldom it looks."""
    return GangWatch(limits, gap_seconds=math.inf)


def at(step: int, section: str = "forward", since: float = 0.0) -> Beat:
    return Beat(step, SECTIONS.index(section), section, since)


class Life:
    """One rank under a watch, whose stays in a section are followed by short ones in another."""

    def __init__(self, watch: GangWatch, rank: int = 0) -> None:
        self.watch, self.rank, self.now, self.step = watch, rank, 0.0, 0

    def stay(self, *stays: float, section: str = "forward") -> None:
        for seconds in stays:
            for name, time in ((section, seconds), ("backward", 0.125)):
                assert self.watch.look({self.rank: at(self.step, name, self.now)}, self.now) is None
                self.now, self.step = self.now + time, self.step + 1
        self.watch.look({self.rank: at(self.step, "backward", self.now)}, self.now)


# --- the rule ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"minimum_seconds": 0.0},
        {"start_seconds": -1.0},
        {"minimum_seconds": float("nan")},
        {"start_seconds": float("inf")},
        {"allowances": {"data": 0.0}},
    ],
)
def test_a_limit_that_is_no_time_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="positive number of seconds"):
        HangLimits(**wrong)


def test_a_gang_of_which_nothing_was_heard_does_not_hang() -> None:
    assert watching(HangLimits()).look({}, 1e9) is None


def test_the_start_has_a_limit_of_its_own() -> None:
    watch = watching(HangLimits(minimum_seconds=10.0, start_seconds=600.0))
    assert watch.look({0: at(1)}, 600.0) is None
    assert watch.look({0: at(1)}, 600.5) == Hang(0, 1, "forward", 600.5, 600.0)
    assert watching(HangLimits(minimum_seconds=700.0, start_seconds=600.0)).limit("forward") == 700.0


def test_nobody_is_blamed_for_the_time_in_which_the_watcher_stood_still() -> None:
    """A job that was suspended, or a virtual machine: the clock went on, and nothing else did."""
    watch = GangWatch(HangLimits(minimum_seconds=10.0, start_seconds=10.0))
    for quarter in (*range(40), *range(4000, 4041)):
        assert watch.look({0: at(1)}, quarter / 4) is None, "10 s from the first look after it"
    assert watch.look({0: at(1)}, 1010.25) == Hang(0, 1, "forward", 10.25, 10.0)


def test_a_watcher_that_is_held_up_again_and_again_finds_a_hang_all_the_same() -> None:
    """Looks of which every eighth comes late by 3 s: without the gaps, twice the limit is over after 20 s."""
    watch = GangWatch(HangLimits(minimum_seconds=10.0, start_seconds=10.0))
    now, seen = 0.0, 0.0
    for number in range(1, 200):
        hang = watch.look({0: at(1)}, now)
        assert (hang is not None) is (seen > 20.0)
        if hang is not None:
            assert (hang.seconds, hang.limit_seconds) == (seen, 10.0)
            return
        late = number % 8 == 0
        now, seen = now + (3.0 if late else 0.25), seen + (0.0 if late else 0.25)
    raise AssertionError("never found")


def test_a_gang_that_never_begins_is_not_blamed_for_it_either() -> None:
    watch = GangWatch(HangLimits(minimum_seconds=10.0, start_seconds=10.0))
    assert not any(watch.look({}, now) for now in (0.0, 1.0, *(500.0 + second for second in range(11))))
    assert watch.look({}, 511.0) == Hang(0, 0, "before its start", 11.0, 10.0)


@pytest.mark.parametrize(
    ("beats", "hindmost", "beside"),
    [
        ({0: at(5, "data", 9.0), 1: at(4, "backward", 8.0)}, 1, []),  # the lowest step
        ({0: at(5, "backward", 1.0), 1: at(5, "data", 8.0)}, 1, []),  # there the earliest section
        ({0: at(5, "data", 3.0), 1: at(5, "data", 2.0), 2: at(5, "data", 2.5)}, 1, [0, 2]),  # the oldest sign of life
        ({0: at(5, "data", 3.0), 3: at(4, "forward", 2.0), 2: at(4, "forward", 7.0)}, 3, [2]),
    ],
)
def test_the_hindmost_rank_is_the_one_to_judge(beats: dict[int, Beat], hindmost: int, beside: list[int]) -> None:
    watch = watching(HangLimits(minimum_seconds=1.0, start_seconds=100.0))
    hang = watch.look(beats, 1000.0)
    assert hang is not None
    assert (hang.rank, hang.seconds) == (hindmost, 1000.0 - beats[hindmost].since)
    assert list(hang.beside) == beside


def test_those_who_wait_for_the_hindmost_do_not_hang() -> None:
    """They outstay every limit, and it does not: a slow rank is no hang."""
    watch = watching(HangLimits(minimum_seconds=1.0, start_seconds=100.0))
    assert watch.look({0: at(5, "backward", 0.0), 1: at(5, "data", 950.0)}, 1000.0) is None


def test_a_known_section_may_take_thrice_its_usual_time() -> None:
    watch = watching(HangLimits(minimum_seconds=2.0, start_seconds=600.0))
    life = Life(watch)
    life.stay(100.0, 4.0, 5.0)
    assert watch.limit("forward") == 600.0, "the first stay is not counted, and two say little"
    life.stay(4.0)
    assert watch.limit("forward") == FACTOR * 5.0
    assert watch.limit("data") == 600.0, "of this one nothing is known"
    assert watch.limit("backward") == 2.0, "never less than the minimum"


def test_the_first_stay_of_every_rank_is_not_counted() -> None:
    watch = watching(HangLimits(minimum_seconds=1.0))
    lives = [Life(watch, rank) for rank in range(KNOWN_STAYS)]
    for life in lives:
        life.stay(100.0)
    assert watch.limit("forward") == 600.0
    for life in lives:
        life.stay(7.0)
    assert watch.limit("forward") == FACTOR * 7.0


def test_one_outlier_in_a_hundred_is_forgiven_and_old_stays_are_forgotten() -> None:
    watch = watching(HangLimits(minimum_seconds=1.0))
    life = Life(watch)
    life.stay(1.0, *[2.0] * 99, 50.0)
    assert watch.limit("forward") == FACTOR * 2.0
    life.stay(50.0)
    assert watch.limit("forward") == FACTOR * 50.0, "two in a hundred are no outliers"
    life.stay(*[3.0] * (WINDOW - 3))
    assert watch.limit("forward") == FACTOR * 3.0, "two in 256 are"
    life.stay(*[60.0] * WINDOW, *[3.0] * (WINDOW - 3))
    assert watch.limit("forward") == FACTOR * 60.0
    life.stay(3.0)
    assert watch.limit("forward") == FACTOR * 3.0


def test_an_allowance_is_added_to_its_section_alone() -> None:
    watch = watching(HangLimits(minimum_seconds=1.0, start_seconds=9.0, allowances={"data": 60.0}))
    assert (watch.limit("data"), watch.limit("forward")) == (69.0, 9.0)
    Life(watch).stay(*[1.0] * 5, section="data")
    assert watch.limit("data") == FACTOR * 1.0 + 60.0


def test_a_sign_of_life_within_the_same_section_starts_its_time_anew() -> None:
    watch = watching(HangLimits(minimum_seconds=1.0, start_seconds=10.0))
    for now in (0.0, 9.0):
        assert watch.look({0: at(3, "data", now)}, now + 9.0) is None
    assert watch.look({0: at(3, "data", 9.0)}, 19.5) == Hang(0, 3, "data", 10.5, 10.0)


def test_a_hang_is_described_in_one_clause() -> None:
    assert Hang(3, 41, "backward", 31.26, 30.0).describe() == (
        "rank 3 did not move for 31.3 s at step 41, section backward (limit 30.0 s)"
    )


def test_steps_that_are_quicker_than_a_look_are_known_all_the_same() -> None:
    """Seen in one section only, at every other step: the sections that each step has are known after three of these."""
    limits = HangLimits(minimum_seconds=5.0, start_seconds=600.0, every_step=("data", "update"))
    watch = watching(limits)
    for look in range(4):
        assert watch.limit("update") == 600.0
        assert watch.look({0: Beat(2 * look + 1, 1, "data", 2.5 * look)}, 2.5 * look) is None
    assert watch.limit("update") == pytest.approx(7.5)
    assert watch.limit("save") == 600.0, "it is not in every step"
    stopped = Beat(8, 3, "update", 8.0)
    assert watch.look({0: stopped}, 15.4) is None
    hang = watch.look({0: stopped}, 15.6)
    assert hang is not None
    assert (hang.rank, hang.section, hang.limit_seconds) == (0, "update", pytest.approx(7.5))


def test_a_start_is_no_step() -> None:
    watch = watching(HangLimits(minimum_seconds=5.0, every_step=("update",)))
    for start in range(3):
        watch.look({start: Beat(0, 0, "start", 0.0)}, 0.0)
        watch.look({start: Beat(3, 1, "data", 103.0)}, 103.0)
    assert watch.limit("update") == 600.0, "nothing is known of a step"
    for step in (5, 7, 9):
        watch.look({0: Beat(step, 1, "data", 100.0 + step)}, 100.0 + step)
    assert watch.limit("update") == pytest.approx(6.0), "three times two steps of a second"


def test_one_step_between_two_looks_is_not_a_whole_one() -> None:
    watch = watching(HangLimits(every_step=("update",)))
    for step in range(9):
        watch.look({0: Beat(step, 1, "data", float(step))}, float(step))
    assert watch.limit("update") == 600.0


def test_a_gang_that_never_starts_is_given_up_after_the_limit_of_a_start() -> None:
    """As where a scheduler finds no place for it. A gang that has begun, and ends, is none."""
    watch = watching(HangLimits(start_seconds=100.0))
    assert watch.look({}, 5.0) is None
    assert watch.look({}, 105.0) is None
    hang = watch.look({}, 105.5)
    assert hang is not None
    assert (hang.rank, hang.seconds, hang.limit_seconds) == (0, 100.5, 100.0)
    begun = watching(HangLimits(start_seconds=100.0))
    assert begun.look({0: Beat(1, 1, "data", 1.0)}, 1.0) is None
    assert begun.look({}, 500.0) is None


# --- the rule, naively ---------------------------------------------------------------------------------------

Look = tuple[Mapping[int, Beat], float]


@dataclass
class Naive:
    """The rule of the docstrings, worked out anew from all that was seen whenever it is asked."""

    limits: HangLimits
    looks: list[Look] = field(default_factory=list)

    def look(self, beats: Mapping[int, Beat], now: float) -> Hang | None:
        self.looks.append((dict(beats), now))
        if not beats:
            return None
        lowest = min(beat.step for beat in beats.values())
        there = {rank: beat for rank, beat in beats.items() if beat.step == lowest}
        earliest = min(beat.section_id for beat in there.values())
        there = {rank: beat for rank, beat in there.items() if beat.section_id == earliest}
        oldest = min(beat.since for beat in there.values())
        rank = next(rank for rank, beat in there.items() if beat.since == oldest)
        limit, seconds = self.limit(beats[rank].section), now - oldest
        beside = tuple(other for other in there if other != rank)
        return Hang(rank, lowest, beats[rank].section, seconds, limit, beside) if seconds > limit else None

    def limit(self, section: str) -> float:
        stays = self.stays(section)
        seconds = self.limits.minimum_seconds
        if len(stays) < 3:
            seconds = max(seconds, self.limits.start_seconds)
        else:  # the least of them that 99 of 100 do not exceed
            usual = min(s for s in stays if 100 * sum(other <= s for other in stays) >= 99 * len(stays))
            seconds = max(seconds, 3.0 * usual)
        return seconds + self.limits.allowances.get(section, 0.0)

    def stays(self, section: str) -> list[float]:
        counted = []
        for rank in {rank for beats, _ in self.looks for rank in beats}:
            seen = [beats[rank] for beats, _ in self.looks if rank in beats]
            moves = [(a, b) for a, b in pairwise(seen) if a != b and a.section == section]
            counted += [b.since - a.since for a, b in moves[1:]]
        return counted


@st.composite
def lives(draw: st.DrawFn) -> list[Look]:
    """What is seen of a gang: each rank stands still, or moves on by some sections, or is not heard of."""
    ranks = draw(st.integers(1, 4))
    places = dict.fromkeys(range(ranks), 0)
    since = dict.fromkeys(range(ranks), 0.0)
    now, looks = 0.0, []
    for _ in range(draw(st.integers(1, 40))):
        beats = {}
        before, now = now, now + draw(st.sampled_from([0.25, 1.0, 4.0, 30.0]))
        for rank in range(ranks):
            what = draw(st.integers(-1, 4))
            if what > 0:
                places[rank] += what
                since[rank] = draw(st.sampled_from([before, (before + now) / 2, now]))
            if what >= 0:
                step, number = divmod(places[rank], len(SECTIONS))
                beats[rank] = Beat(step, number, SECTIONS[number], since[rank])
        looks.append((beats, now))
    return looks


@given(
    lives(),
    st.sampled_from([0.5, 3.0, 20.0]),
    st.sampled_from([1.0, 10.0, 100.0]),
    st.dictionaries(st.sampled_from(SECTIONS), st.sampled_from([0.5, 8.0])),
)
def test_every_look_says_what_the_naive_rule_says(
    looks: list[Look], minimum: float, start: float, allowances: dict[str, float]
) -> None:
    limits = HangLimits(minimum, start, allowances)
    watch, naive = watching(limits), Naive(limits)
    for beats, now in looks:
        assert watch.look(beats, now) == naive.look(beats, now)
    assert {name: watch.limit(name) for name in SECTIONS} == {name: naive.limit(name) for name in SECTIONS}
