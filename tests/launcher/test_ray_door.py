"""How many ranks an attempt on Ray takes, from the room that there is; that of a real cluster is met in tests/e2e."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher import ray_door
from launcher.ray_gang import RayRoom
from tests.support.processes import ROOT


@given(st.sets(st.integers(1, 40), min_size=1), st.integers(0, 50))
def test_the_largest_world_that_there_is_room_for(worlds: set[int], slots: int) -> None:
    fitting = [world for world in worlds if world <= slots]
    found = ray_door._largest(RayRoom("host:1", sorted(worlds)), slots)
    assert found == (max(fitting) if fitting else None)


@pytest.mark.parametrize(
    ("free", "cpus", "gpus", "slots"),
    [
        ({"a": {"CPU": 8.0}, "b": {"CPU": 3.0}}, 2.0, 0.0, 5),  # what is left over on two nodes makes no rank
        ({"a": {"CPU": 8.0, "GPU": 2.0}, "b": {"CPU": 1.0, "GPU": 8.0}}, 1.0, 1.0, 3),  # the scarcer one counts
        ({"a": {"CPU": 8.0}}, 1.0, 1.0, 0),
        ({"a": {"CPU": 8.0, "GPU": 2.0}}, 1.0, 0.5, 4),
        ({"a": {"CPU": 0.3}}, 0.1, 0.0, 3),  # 0.3 / 0.1 is a little less than 3
        ({"a": {"CPU": 1.0}, "draining": {"CPU": 8.0}, "dead": {"CPU": 8.0}, "unknown": {"CPU": 8.0}}, 1.0, 0.0, 1),
        ({"a": {}}, 1.0, 0.0, 0),
    ],
)
def test_ranks_that_could_be_started_now(
    free: dict[str, dict[str, float]], cpus: float, gpus: float, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_for_ray(free, [], monkeypatch)
    assert ray_door._slots(RayRoom("host:1", [1], cpus=cpus, gpus=gpus)) == slots


def test_a_node_that_does_not_answer_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray still holds it for alive; and so it counts, until it is asked."""
    with socket.create_server(("127.0.0.1", 0)) as there, socket.create_server(("127.0.0.1", 0)) as gone:
        ports = [there.getsockname()[1], gone.getsockname()[1]]
        gone.close()
        answer_for_ray({"a": {"CPU": 3.0}, "b": {"CPU": 2.0}}, ports, monkeypatch)
        assert ray_door._slots(RayRoom("host:1", [1])) == 5
        assert ray_door._slots(RayRoom("host:1", [1]), asked=True) == 3
        assert ray_door._find_room(RayRoom("host:1", [3, 5], start_seconds=0.1)) == 3


def answer_for_ray(free: dict[str, dict[str, float]], ports: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of Ray a module with its answers: by node, what of it is free."""
    modules = {name: ModuleType(name) for name in ("ray", "ray._private", "ray._private.state")}
    for name, made in modules.items():
        monkeypatch.setitem(sys.modules, name, made)
    nodes: list[dict[str, Any]] = [{"NodeID": name, "Alive": name != "dead"} for name in ("a", "b", "draining", "dead")]
    for node, port in zip(nodes, ports, strict=False):
        node |= {"NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port}
    monkeypatch.setattr(modules["ray"], "nodes", lambda: nodes, raising=False)
    state = modules["ray._private.state"]
    monkeypatch.setattr(state, "available_resources_per_node", lambda: free, raising=False)
    monkeypatch.setattr(ray_door, "_draining", lambda: {"draining": 0})


@pytest.mark.parametrize(
    ("slots", "world"),
    [
        ([4], 4),  # all of it: at once
        ([0, 0, 4], 4),  # it comes
        ([3], 2),  # less: after a moment, the largest legal number
        ([2, 4], 4),  # more comes in that moment
        ([1], None),  # never enough
    ],
)
def test_an_attempt_takes_what_there_is(slots: list[int], world: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`slots` is the room at each look; the last one stays."""
    looks = iter(slots)
    last = slots[-1]
    monkeypatch.setattr(ray_door, "_slots", lambda room, asked: next(looks, last))
    monkeypatch.setattr(ray_door, "SETTLE_SECONDS", 0.5)
    assert ray_door._find_room(RayRoom("host:1", [2, 4], start_seconds=1.0)) == world


def test_room_that_came_in_time_may_settle_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_door, "_slots", lambda room, asked: 3)
    monkeypatch.setattr(ray_door, "SETTLE_SECONDS", 0.5)
    assert ray_door._find_room(RayRoom("host:1", [2, 4], start_seconds=0.1)) == 2


def told(
    free: list[int],
    draining: list[set[str]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    ours: Sequence[list[str]] = (["a", "b"],),
) -> list[dict[str, str]]:
    """What is said of two ranks under way, by the free room, the leaving nodes, and the nodes of the workers that
    live, at each look; then all is over."""
    over = threading.Event()
    rooms, looks, workers = iter(free), itertools.count(), list[str]()

    def look() -> dict[str, int]:
        """The first question of each look."""
        number = next(looks)
        workers[:] = ours[min(number, len(ours) - 1)]
        if number + 1 >= len(free):
            over.set()
        return dict.fromkeys(draining[min(number, len(draining) - 1)], 0)

    monkeypatch.setattr(ray_door, "_draining", look)
    monkeypatch.setattr(ray_door, "_our_nodes", lambda: workers)
    monkeypatch.setattr(ray_door, "_slots", lambda room: next(rooms))
    monkeypatch.setattr(ray_door, "REPORT_SECONDS", 0.01)
    ray_door._watch_room(RayRoom("host:1", [2, 4]), 2, over)
    return [json.loads(line) for line in capfd.readouterr().out.splitlines()]


def test_more_room_is_told_when_it_has_lasted(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_door, "STEADY_SECONDS", 0.05)
    said = told([1, 2, *[2] * 100], [set()], monkeypatch, capfd)
    assert said == [{"kind": "resize", "reason": "there is room for 4 ranks instead of 2"}]


def test_room_that_comes_and_goes_is_not_told(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_door, "STEADY_SECONDS", 3600.0)
    assert told([2, 0, 2, 1, 2], [set()], monkeypatch, capfd) == []


def test_what_workers_that_are_still_to_come_will_take_is_not_free(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """On a crowded machine they are late; two of them on one node are two."""
    monkeypatch.setattr(ray_door, "STEADY_SECONDS", 0.0)
    late = [[], ["a"], ["a"], []]
    assert told([2] * 4, [set()], monkeypatch, capfd, late) == []
    said = told([2] * 4, [set()], monkeypatch, capfd, [*late[:2], ["a", "a"]])
    assert said == [{"kind": "resize", "reason": "there is room for 4 ranks instead of 2"}]


def test_a_node_that_leaves_before_all_workers_are_there_is_told(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    said = told([0] * 3, [{"a"}], monkeypatch, capfd, [[], ["a"]])
    assert said == [{"kind": "resize", "reason": "1 Ray node(s) are about to leave"}]


def test_a_node_that_is_about_to_leave_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Those that hold no rank of ours are no news."""
    said = told([0] * 20, [set(), {"other"}, {"other"}, {"other", "a"}], monkeypatch, capfd)
    assert said == [{"kind": "resize", "reason": "1 Ray node(s) are about to leave"}]
    assert told([0] * 20, [{"other"}], monkeypatch, capfd) == []


NO_DASHBOARD = """
from launcher.ray_door import JobsClient
try:
    JobsClient("http://127.0.0.1:9")
except ConnectionError:
    print("refused")
"""


def test_a_dashboard_that_is_not_there() -> None:
    """In a process of its own: Ray reads how to authenticate once a process, and other tests need another answer."""
    done = subprocess.run([sys.executable, "-c", NO_DASHBOARD], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout == "refused\n", done.stderr


def test_nodes_that_have_just_joined_are_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """However short the time to start: what they have free is not known at the first looks."""
    looks = iter([0, 0, 4])
    monkeypatch.setattr(ray_door, "_slots", lambda room, asked: next(looks))
    assert ray_door._find_room(RayRoom("host:1", [2, 4], start_seconds=0.01)) == 4
