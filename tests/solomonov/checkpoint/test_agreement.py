"""One rank's outcome, told to all: here for the process that is alone; `test_checkpointer.py` has real ranks."""

from __future__ import annotations

import errno
from typing import TypeVar

import pytest

from solomonov.checkpoint.agreement import SingleProcess, SystemFailure, on_first, raise_failures, together
from solomonov.errors import ConfigurationError

T = TypeVar("T")


class Counting(SingleProcess):
    """Counts the collectives: a rank that raises must have taken part before."""

    gathered = 0

    def all_gather_object(self, value: T) -> list[T]:
        self.gathered += 1
        return super().all_gather_object(value)


def test_values_and_failures() -> None:
    def full() -> int:
        raise OSError(errno.ENOSPC, "No space", "/x")

    assert together(SingleProcess(), lambda: 5) == ([5], [])
    values, failures = together(SingleProcess(), full)
    assert (values, failures) == ([], [SystemFailure(0, errno.ENOSPC, "No space", "/x")])
    assert failures[0].cause == "ENOSPC"
    assert on_first(SingleProcess(), lambda: 5) == (5, [])
    assert on_first(SingleProcess(), full) == (None, failures)
    raise_failures([])
    with pytest.raises(OSError, match="on rank 0"):
        raise_failures(failures)


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), AssertionError("x")], ids=repr)
def test_what_is_unforeseen_is_told_and_then_raised(error: BaseException) -> None:
    def work() -> None:
        raise error

    collective = Counting()
    with pytest.raises(type(error)):
        together(collective, work)
    assert collective.gathered == 1


def test_user_errors_keep_their_class_and_text() -> None:
    def work() -> None:
        raise ConfigurationError("a", got="b", rule="c", remedy="d")

    with pytest.raises(ConfigurationError, match="rule:   c"):
        together(SingleProcess(), work)


def test_an_error_that_the_caller_is_handling_is_not_this_works() -> None:
    try:
        raise ValueError("outer")
    except ValueError:
        assert together(SingleProcess(), lambda: 5) == ([5], [])
