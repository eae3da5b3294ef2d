"""A part of the suite in a second pytest, at the same time: half of the tests compute, the other half mostly waits."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import pytest

from tests.support.processes import die_with_parent

OPTIONS = ("--beside", "--coverage-floors")
"""Of ours that the second pytest is not given."""


class Beside:
    """A second pytest that runs the tests of one marker, with the arguments of this one.

    Args:
        marker: whose tests it runs.
        arguments: of this pytest, as it was called.
        rootdir: where it was called.
    """

    def __init__(self, marker: str, arguments: list[str], rootdir: str) -> None:
        self.marker = marker
        kept = [
            f"{word}-beside" if word.startswith("--basetemp=") else word  # each pytest empties its own
            for word in arguments
            if not word.startswith(OPTIONS)
        ]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `wait`
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *kept, "-m", marker],
            cwd=rootdir,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )
        self.output = ""
        """What it printed; empty until it has ended."""

    def wait(self) -> bool:
        """Wait for its end; returns whether all was well: tests that passed, or none of that marker."""
        code = self._process.wait()
        self._log.seek(0)
        self.output = self._log.read().decode("utf-8", errors="replace")
        self._log.close()
        return code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
