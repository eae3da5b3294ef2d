"""What a dump of a rank's stacks says."""

from __future__ import annotations


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
