"""Ranks that come to the same end together, whatever happens on one of them."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from solomonov.errors import SolomonovError

T = TypeVar("T")


class Collective(Protocol):
    """What the ranks need to agree: any process group of the control plane."""

    @property
    def rank(self) -> int:
        """This process's number."""
        ...

    @property
    def size(self) -> int:
        """How many processes there are."""
        ...

    def all_gather_object(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks, on every rank."""
        ...

    def broadcast_object(self, value: T, src: int = 0) -> T:
        """Rank `src`'s value, on every rank."""
        ...

    def barrier(self) -> None:
        """Wait for every rank."""
        ...


class SingleProcess:
    """The collective of a process that is alone."""

    rank = 0
    size = 1

    def all_gather_object(self, value: T) -> list[T]:
        """Its own value."""
        return [value]

    def broadcast_object(self, value: T, src: int = 0) -> T:
        """Its own value."""
        return value

    def barrier(self) -> None:
        """Nobody to wait for."""


@dataclass(frozen=True)
class SystemFailure:
    """An OSError of one rank, told to all."""

    rank: int
    errno: int
    message: str
    path: str

    @property
    def cause(self) -> str:
        """The error's symbol, such as ENOSPC."""
        return errno.errorcode.get(self.errno, str(self.errno))


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """What came of one rank's work: one of the fields."""

    value: T | None = None
    failure: SystemFailure | None = None
    user_error: tuple[type[SolomonovError], dict[str, str]] | None = None
    raised: str | None = None


def describe(error_type: type[BaseException] | None, error: BaseException | None) -> str:
    """One line about an exception that is on its way."""
    return f"{error_type.__name__ if error_type else 'nothing known'}: {error}"


def together(collective: Collective, work: Callable[[], T]) -> tuple[list[T], list[SystemFailure]]:
    """Run `work` on this rank and tell all ranks what came of it. `work` must not call collectives.

    Returns:
        Every rank's value in the order of ranks, and the OSErrors; the same on every rank. Ranks with an
        OSError have no value in the list.

    Raises:
        SolomonovError: the one of the lowest rank that had one, on every rank.
        RuntimeError: another rank raised anything else; that rank raises its own error.
    """
    outcome: _Outcome[T] | None = None
    try:
        try:
            outcome = _Outcome(value=work())
        except OSError as error:
            number, path = error.errno or errno.EIO, str(error.filename or "")
            failure = SystemFailure(collective.rank, number, error.strerror or str(error), path)
            outcome = _Outcome(failure=failure)
        except SolomonovError as error:
            fields = {"what": error.what, "got": error.got, "rule": error.rule, "remedy": error.remedy}
            outcome = _Outcome(user_error=(type(error), fields))
    finally:
        # Also when something unforeseen passes through here: nobody waits for a rank that has given up.
        if outcome is None:
            outcome = _Outcome(raised=describe(*sys.exc_info()[:2]))
        outcomes = collective.all_gather_object(outcome)
    for rank, other in enumerate(outcomes):
        if other.raised is not None:
            raise RuntimeError(f"rank {rank} stopped while all worked on a checkpoint: {other.raised}")
    for other in outcomes:
        if other.user_error is not None:
            error_type, fields = other.user_error
            raise error_type(**fields)
    failures = [other.failure for other in outcomes if other.failure is not None]
    values: list[Any] = [other.value for other in outcomes if other.failure is None]
    return values, failures


def on_first(collective: Collective, work: Callable[[], T]) -> tuple[T | None, list[SystemFailure]]:
    """Run `work` on rank 0 alone; its value, or None and its failure, on every rank."""
    values, failures = together(collective, lambda: work() if collective.rank == 0 else None)
    return (None if failures else values[0]), failures


def raise_failures(failures: list[SystemFailure]) -> None:
    """Raise the first failure as the OSError that it was, naming its rank."""
    for failure in failures:
        raise OSError(failure.errno, f"{failure.message} (on rank {failure.rank})", failure.path)
