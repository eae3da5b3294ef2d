"""Joining a Ray cluster, and Rays that do not let us."""

from __future__ import annotations

import socket

import pytest

from data_pipeline.cluster import ClusterLost, join

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError("no such socket"), "no such socket"),
        (KeyError("an error that nobody foresaw"), "Ray gave up with an error"),
    ],
)
def test_a_ray_that_gives_up_is_not_joined(error: Exception, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the first call after it would start a Ray of its own on this machine."""
    ray = pytest.importorskip("ray")

    def refuse(**_: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", refuse)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(ClusterLost, match=told):
            join(address, "ours")
    assert not ray.is_initialized()


def test_where_nobody_listens_nothing_is_joined() -> None:
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
    with pytest.raises(ClusterLost, match="refused"):
        join(address, "ours")
