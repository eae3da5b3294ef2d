"""What can go wrong with data, and the exit code that each mistake ends a command with.

* DataError
  + DataConfigurationError   78  the data section, or what it points to, cannot work
  + DamagedDataError         74  bytes differ from what the manifest vouches for
"""

from __future__ import annotations


class DataError(Exception):
    """Base of all errors that data_pipeline raises for its users.

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


class DataConfigurationError(DataError):
    """The data section, or the files that it names, cannot work; retrying will not help."""

    exit_code = 78


class DamagedDataError(DataError):
    """A file's bytes are not those that the manifest vouches for."""

    exit_code = 74
