"""One prepared folder and one Ray for all end-to-end tests; each test works on its own copy of the folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ray_cluster import RayCluster
from tests.support.user import User


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> User:
    """Text, configuration and the prepared data set; not to be changed."""
    user = User.begin(tmp_path_factory.mktemp("prepared") / "work")
    user.must("prepare", "own.yaml")
    return user


@pytest.fixture
def user(prepared: User, tmp_path: Path) -> User:
    """A copy of the prepared folder."""
    return prepared.copy(tmp_path / "work")


@pytest.fixture(scope="session")
def undisturbed(prepared: User, tmp_path_factory: pytest.TempPathFactory) -> User:
    """A run of two ranks that nothing disturbed; not to be changed."""
    user = prepared.copy(tmp_path_factory.mktemp("undisturbed") / "work")
    user.must("train", "own.yaml")
    return user


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """A Ray of two nodes with two CPUs each, for tests that do it no harm."""
    with RayCluster() as cluster:  # whose workers are watched if the first test that asks for it is
        yield cluster
