"""What can go wrong while starting and watching processes, and the exit code of each mistake.

* LauncherError
  + LaunchConfigurationError   78  the launch section cannot work on this machine
  + SlurmError                 78  Slurm refuses a request, or does not answer
  + RayError                   78  a Ray cluster refuses a request, or does not answer
"""

from __future__ import annotations


class LauncherError(Exception):
    """Base of all errors that launcher raises for its users.

    Args:
        what: one sentence that says what is wrong.
        got: what was found.
        rule: what would have been right.
        remedy: what the reader can do now.
    """

    exit_code = 1

    def __init__(self, what: str, *, got: str, rule: str, remedy: str) -> None:
        super().__init__(f"{what}\n  got:    {got}\n  rule:   {rule}\n  remedy: {remedy}")
        self.what, self.got, self.rule, self.remedy = what, got, rule, remedy


class LaunchConfigurationError(LauncherError):
    """The launch section cannot work on this machine; retrying will not help."""

    exit_code = 78


class SlurmError(LauncherError):
    """Slurm refuses a request, or does not answer; what it says stands in the message."""

    exit_code = 78


class RayError(LauncherError):
    """A Ray cluster refuses a request, or does not answer; what it says stands in the message."""

    exit_code = 78
