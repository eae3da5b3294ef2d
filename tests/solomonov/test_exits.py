"""Exit codes against the table in the command's help, which is what a script's author reads."""

from __future__ import annotations

import re

from solomonov import exits
from solomonov.cli import EXIT_CODES


def codes() -> dict[str, int]:
    return {name: value for name, value in vars(exits).items() if name.isupper()}


def test_values_are_those_that_scripts_rely_on() -> None:
    assert codes() == {
        "DONE": 0,
        "DIFFERS": 1,
        "USAGE": 2,
        "NUMERICAL": 70,
        "DAMAGED": 74,
        "AGAIN": 75,
        "CONFIGURATION": 78,
        "INTERRUPTED": 130,
    }


def test_the_help_names_each_of_them() -> None:
    named = [int(number) for number in re.findall(r"\b(\d+) [a-z]", EXIT_CODES)]
    assert sorted(named) == sorted(codes().values())
