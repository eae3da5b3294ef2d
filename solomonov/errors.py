"""What can go wrong in training, and the exit code that each mistake ends a command with.

* SolomonovError
  + ConfigurationError        78  the configuration, or a folder it names, cannot work
  + NumericalError            70  the numbers are no longer finite
  + DamagedCheckpointError    74  a checkpoint's bytes are not those that its manifest vouches for
"""

from __future__ import annotations


class SolomonovError(Exception):
    """Base of all errors that solomonov raises for its users.

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


class ConfigurationError(SolomonovError):
    """The configuration, or a folder that it names, cannot work; retrying will not help."""

    exit_code = 78


class NumericalError(SolomonovError):
    """Loss or gradients stopped being finite, more often than the configuration allows."""

    exit_code = 70


class DamagedCheckpointError(SolomonovError):
    """A checkpoint's bytes are not those that its manifest vouches for."""

    exit_code = 74
