"""What a dump of a rank's stacks says."""

from __future__ import annotations

from collections.abc import Mapping

COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/")
"""Whose innermost call is in one of these waits for its peers."""


def innermost_call(dump: str) -> str | None:
    """Where the main thread was, from a dump of Python's `faulthandler`: `function (file:line)`; None without one."""
    lines = dump.splitlines()
    headers = [number for number, line in enumerate(lines) if line.rstrip().endswith("(most recent call first):")]
    if not headers:
        return None
    current = [number for number in headers if lines[number].startswith("Current thread")]
    after = (current or headers)[-1] + 1
    if after >= len(lines):
        return None
    place, _, function = lines[after].strip().rpartition(" in ")
    file, _, line = place.removeprefix('File "').rpartition('", line ')
    return f"{function} ({file}:{line})" if file and function and line.isdigit() else None


def culprit(calls: Mapping[int, str | None]) -> int:
    """Which of the ranks that stand in one section the others wait for.

    Args:
        calls: the innermost call of each; None of one that gave no stack, as it is frozen. The first one is the one to
            blame where the calls do not tell.

    Returns:
        the first rank that is in no collective where another one is in one, or the first of all.
    """
    waits = {rank: call is not None and any(name in call for name in COLLECTIVES) for rank, call in calls.items()}
    first = next(iter(calls))
    return next((rank for rank, waiting in waits.items() if not waiting), first) if any(waits.values()) else first
