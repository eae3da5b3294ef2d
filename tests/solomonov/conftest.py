"""One prepared folder and one run with checkpoints for all tests of the package; a test that writes takes a copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from solomonov.runfolder import RunFolder
from tests.support.runs import begun_user, prepared_user
from tests.support.user import User


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> User:
    """Text, configuration and the prepared data set; not to be changed."""
    return prepared_user(tmp_path_factory.mktemp("prepared") / "work")


@pytest.fixture(scope="session")
def trained(prepared: User, tmp_path_factory: pytest.TempPathFactory) -> tuple[User, RunFolder]:
    """A run with checkpoints of steps 3 and 6; not to be changed."""
    return begun_user(prepared, tmp_path_factory.mktemp("trained") / "work")


@pytest.fixture
def user(prepared: User, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> User:
    """A copy of the prepared folder, which is the working folder."""
    user = prepared.copy(tmp_path / "work")
    monkeypatch.chdir(user.folder)
    return user


@pytest.fixture
def run(prepared: User, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run with checkpoints of steps 3 and 6, in a copy of the prepared folder, which is the working folder."""
    user, run = begun_user(prepared, tmp_path / "begun")
    monkeypatch.chdir(user.folder)
    return run
