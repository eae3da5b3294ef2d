"""What an exit code means, and which of several ranks' ends was the cause of the others.

The whole contract of a rank with the world: 0 done; 2 usage; 70 numerical failure; 74 data or checkpoint
damaged beyond repair; 75 saved, run me again; 78 the configuration is wrong; anything else is a crash. A
negative code is a signal, as in `subprocess`.
"""

from __future__ import annotations

import enum
import signal
from collections.abc import Sequence
from dataclasses import dataclass


class ExitCode(enum.IntEnum):
    """The exit codes that carry a meaning."""

    DONE = 0
    USAGE = 2
    NUMERICAL = 70
    DAMAGED = 74
    AGAIN = 75
    CONFIGURATION = 78
    INTERRUPTED = 130
    """Only the launcher leaves with this one: told twice to stop, it killed the ranks."""


class Outcome(enum.Enum):
    """How a process ended; the value says it in words."""

    DONE = "done"
    USAGE = "called wrongly"
    NUMERICAL = "numerical failure"
    DAMAGED = "data or checkpoint damaged beyond repair"
    AGAIN = "saved, wants to run again"
    CONFIGURATION = "the configuration is wrong"
    CRASH = "crashed"

    @property
    def is_failure(self) -> bool:
        """Neither done nor left on purpose to run again."""
        return self not in (Outcome.DONE, Outcome.AGAIN)

    @property
    def is_verdict(self) -> bool:
        """A failure that another try would only repeat."""
        return self.is_failure and self is not Outcome.CRASH


_MEANINGS: dict[int, Outcome] = {
    ExitCode.DONE: Outcome.DONE,
    ExitCode.USAGE: Outcome.USAGE,
    ExitCode.NUMERICAL: Outcome.NUMERICAL,
    ExitCode.DAMAGED: Outcome.DAMAGED,
    ExitCode.AGAIN: Outcome.AGAIN,
    ExitCode.CONFIGURATION: Outcome.CONFIGURATION,
}


def classify(code: int) -> Outcome:
    """The meaning of an exit code; negative codes (signals) and unknown ones are crashes."""
    return _MEANINGS.get(code, Outcome.CRASH)


def signal_name(code: int) -> str | None:
    """`SIGKILL` for -9; None for a code that is not a signal."""
    if code >= 0:
        return None
    try:
        return signal.Signals(-code).name
    except ValueError:  # real-time signals have no name
        return f"signal {-code}"


def describe(code: int) -> str:
    """An exit code in words: `killed by SIGKILL`, `exit code 78 (the configuration is wrong)`."""
    name = signal_name(code)
    return f"killed by {name}" if name else f"exit code {code} ({classify(code).value})"


def shell_code(code: int) -> int:
    """The code as a shell reports it, 0 to 255: 128 + n for signal n."""
    return 128 - code if code < 0 else code


@dataclass(frozen=True)
class RankExit:
    """The end of one rank, with the last that was heard of it."""

    rank: int
    pid: int
    code: int
    """Exit code; -n: died of signal n."""
    killed: bool = False
    """The launcher sent SIGKILL before the rank ended: its code says nothing about the rank."""
    lost: bool = False
    """Nobody saw it end: its machine, or the process that watched it there, is gone. When is not known."""
    seconds: float = 0.0
    """From the start of the process to its end."""
    step: int | None = None
    """Step of the last heartbeat; None if there was none."""
    section: str | None = None
    """What the rank was doing at its last heartbeat."""
    heartbeat_age_seconds: float | None = None
    """Age of the last heartbeat when the end was seen."""
    host: str | None = None
    """Name of the machine it ran on; None: this one."""

    @property
    def outcome(self) -> Outcome:
        """Meaning of the code."""
        return classify(self.code)


def order_of_death(together: Sequence[RankExit]) -> list[RankExit]:
    """Ends that were seen at one look, the likelier cause first.

    A killed or faulting rank takes its peers with it; peers of a broken collective leave with ordinary codes.
    """

    def key(end: RankExit) -> tuple[int, int]:
        if not end.outcome.is_failure:
            return (3, end.rank)
        return (0 if end.code < 0 else 1 if end.outcome.is_verdict else 2, end.rank)

    return sorted(together, key=key)


def first_cause(ends: Sequence[RankExit]) -> RankExit:
    """The end that explains an attempt, from all ends in order of death.

    The first failure is the cause, with one exception: a rank that knows the reason (70, 74, 78, 2) may take
    longer to leave than a peer that merely lost its connection and raised, so such a verdict outranks an
    earlier ordinary crash code, though not an earlier signal. So does the end of a rank that was lost, of which
    one hears last. Ranks that the launcher killed count only where no rank failed by itself. 75 stands for the
    attempt if every rank left with 75 or 0.
    """
    assert ends, "an attempt has at least one rank"
    failures = [end for end in ends if end.outcome.is_failure and not end.killed]
    if failures:
        if failures[0].code > 0:
            for known in ([end for end in failures if end.outcome.is_verdict], [end for end in failures if end.lost]):
                if known:
                    return known[0]
        return failures[0]
    for wanted in (Outcome.CRASH, Outcome.AGAIN):
        for end in ends:
            if end.outcome is wanted:
                return end
    return ends[0]
