"""One configuration, several runs: every combination of some values, each a run with a number in its name."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from solomonov.errors import ConfigurationError

MAX_RUNS = 1000
"""Slurm's own limit for an array, unless its administrator chose another (MaxArraySize 1001)."""


def combinations(sweeps: Sequence[str]) -> list[list[str]]:
    """The overrides of each run, the last key varying fastest.

    Args:
        sweeps: `KEY=VALUE,VALUE,...` each; a value is written as in an override, and holds no comma.

    Raises:
        ConfigurationError: no key, no values, a key twice, one that all runs share, or too many runs.
    """
    keys, choices = [], []
    for text in sweeps:
        key, equals, listed = text.partition("=")
        values = listed.split(",")
        fixed = key in ("run.name", "run.folder") or key.startswith("launch.")
        if not (key and equals and all(values)) or key in keys or fixed:
            raise ConfigurationError(
                "this is no sweep",
                got=f"--sweep {text}",
                rule="KEY=VALUE,VALUE,...; each key once; all share launch and run.folder; run.name gets a number",
                remedy="for instance --sweep optimizer.lr=0.001,0.0003 --sweep run.seed=1,2",
            )
        keys.append(key)
        choices.append([f"{key}={value}" for value in values])
    found = [list(words) for words in itertools.product(*choices)]
    if len(found) > MAX_RUNS:
        raise ConfigurationError(
            "a sweep of too many runs",
            got=f"{len(found)} combinations",
            rule=f"at most {MAX_RUNS}",
            remedy="sweep fewer keys or values at a time",
        )
    return found
