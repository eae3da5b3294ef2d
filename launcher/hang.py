"""Tells a gang that hangs from one that works: by the time that its hindmost rank stays in one section.

Ranks wait for each other in collectives, so all of them stand still when one does. The one to judge is the hindmost:
the lowest step, there the earliest section, there the oldest sign of life. The others wait for it, and that says
nothing about them. Where several are in that section, the oldest sign of life is chance: whoever is not in a
collective by its stack (`stacks.culprit`) is the one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

WINDOW = 256
"""Stays in a section that are remembered."""
KNOWN_STAYS = 3
"""From so many on, the 99th percentile says something."""
FACTOR = 3.0
GAPS = 1000
"""So many gaps are remembered: none of those that a stay of ours may hold is forgotten."""
GAP_SECONDS = 2.0
"""A watcher that did not look for so long was held up itself, and what it watches most likely with it: a job that was
suspended, a virtual machine that stood still, a crowded machine. Looks come four times a second."""


@dataclass(frozen=True)
class HangLimits:
    """How long a rank may stay in one section.

    Raises:
        ValueError: a time that is not a positive number of seconds.
    """

    minimum_seconds: float = 10.0
    """Never less than this."""
    start_seconds: float = 600.0
    """For a section of which too little is known: imports, the first compilation, the first save."""
    allowances: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """Seconds more for a section that may wait for something else by design."""
    every_step: tuple[str, ...] = ()
    """Sections that each step has: where steps are quicker than looks, a step that was done tells of all of them."""

    def __post_init__(self) -> None:
        for seconds in (self.minimum_seconds, self.start_seconds, *self.allowances.values()):
            if not (math.isfinite(seconds) and seconds > 0.0):
                raise ValueError(f"a limit is a positive number of seconds, not {seconds}")


@dataclass(frozen=True)
class Beat:
    """Where a rank is, and since when."""

    step: int
    section_id: int
    """The order of the sections within a step."""
    section: str
    since: float
    """When it entered the section, by `time.monotonic` of the watching process (seconds)."""


@dataclass(frozen=True)
class Hang:
    """A rank that has stayed in a section for too long."""

    rank: int
    step: int
    section: str
    seconds: float
    limit_seconds: float
    beside: tuple[int, ...] = ()
    """Other ranks in the same section of the same step: stacks tell for which one the others wait."""

    def describe(self) -> str:
        """One clause for people."""
        return (
            f"rank {self.rank} did not move for {self.seconds:.1f} s at step {self.step}, section {self.section} "
            f"(limit {self.limit_seconds:.1f} s)"
        )


class GangWatch:
    """Learns how long sections take, and says when the hindmost rank has outstayed its limit.

    Args:
        limits: the limits.
        gap_seconds: between two looks; after a longer one, in which we or the machine stood still, all time before
            counts for nothing, until a stay has lasted twice its limit without the gaps.
    """

    def __init__(self, limits: HangLimits, gap_seconds: float = GAP_SECONDS) -> None:
        self._limits, self._gap_seconds = limits, gap_seconds
        self._since: float | None = None
        """The first look."""
        self._looked: float | None = None
        self._gaps: deque[tuple[float, float]] = deque(maxlen=GAPS)
        """Looks between which too long a time lay."""
        self._last: dict[int, Beat] = {}
        self._stays: dict[str, deque[float]] = {}
        self._been_in: set[tuple[int, str]] = set()

    def look(self, beats: Mapping[int, Beat], now: float) -> Hang | None:
        """Take note of where the living ranks are.

        Args:
            beats: by rank; a rank of which nothing was heard yet is left out.
            now: `time.monotonic()`.

        Returns:
            The hindmost rank, if it hangs; rank 0, if none has ever given a sign of life.
        """
        self._since = now if self._since is None else self._since
        if self._looked is not None and now - self._looked > self._gap_seconds:
            self._gaps.append((self._looked, now))
        self._looked = now
        for rank, beat in beats.items():
            before = self._last.get(rank)
            if before is not None and before != beat:
                self._left(rank, before, beat.since - before.since)
                # A whole step lies between; from a start (step 0) it is imports and compilation instead.
                if before.step >= 1 and beat.step - before.step >= 2:
                    for section in self._limits.every_step:
                        self._know(section, beat.since - before.since)
            self._last[rank] = beat
        if not beats:
            waited = self._blamed(self._since, now, self._limits.start_seconds)
            if self._last or waited <= self._limits.start_seconds:
                return None
            return Hang(0, 0, "before its start", waited, self._limits.start_seconds)
        rank, beat = min(beats.items(), key=lambda item: (item[1].step, item[1].section_id, item[1].since))
        limit = self.limit(beat.section)
        seconds = self._blamed(beat.since, now, limit)
        if seconds <= limit:
            return None
        place = (beat.step, beat.section_id)
        beside = tuple(other for other, at in beats.items() if other != rank and (at.step, at.section_id) == place)
        return Hang(rank, beat.step, beat.section, seconds, limit, beside)

    def _blamed(self, since: float, now: float, limit: float) -> float:
        """Seconds of a stay that count: those after the last gap, or all but the gaps where these are many."""
        seen = now - since - sum(max(0.0, end - max(begin, since)) for begin, end in self._gaps)
        after = now - max(since, self._gaps[-1][1]) if self._gaps else now - since
        return seen if seen > 2 * limit else after

    def limit(self, section: str) -> float:
        """Seconds that a rank may stay in a section, by what is known now."""
        stays = sorted(self._stays.get(section, ()))
        if len(stays) < KNOWN_STAYS:
            seconds = max(self._limits.minimum_seconds, self._limits.start_seconds)
        else:
            seconds = max(self._limits.minimum_seconds, FACTOR * stays[math.ceil(0.99 * len(stays)) - 1])
        return seconds + self._limits.allowances.get(section, 0.0)

    def _left(self, rank: int, beat: Beat, seconds: float) -> None:
        """A stay is over. The first one of each rank is not typical (caches, compilation): it is not counted."""
        if (rank, beat.section) in self._been_in:
            self._know(beat.section, seconds)
        self._been_in.add((rank, beat.section))

    def _know(self, section: str, seconds: float) -> None:
        self._stays.setdefault(section, deque(maxlen=WINDOW)).append(seconds)
