"""Each step stands exactly once, whatever is killed, resumed, superseded or refused by a full disk."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from solomonov.metrics import MetricsLog, replay_differences


def line(step: int, **values: object) -> dict[str, object]:
    return {"step": step, "loss": 1.0 / step, "grad_norm": 2.0, "tokens": 7, "data_digest": f"{step:016x}", **values}


def steps(path: Path) -> list[int]:
    return [json.loads(text)["step"] for text in path.read_text().splitlines()]


def write(path: Path, first: int, last: int) -> None:
    log = MetricsLog(path, pytest.fail)
    log.resume(first - 1)
    for step in range(first, last + 1):
        log.append(line(step))
    log.sync()
    log.close()


def test_later_lines_are_superseded_and_returned(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 7)
    log = MetricsLog(path, pytest.fail)
    replay = log.resume(4, lambda step: 3)
    assert steps(path) == [1, 2, 3, 4]
    assert steps(tmp_path / "metrics.superseded.jsonl") == [5, 6, 7]
    assert replay == {step: {**line(step), "attempt": 3} for step in (5, 6, 7)}
    log.append(line(5))
    log.close()
    again = MetricsLog(path, pytest.fail)
    assert sorted(again.resume(2)) == [3, 4, 5, 6, 7], "every step that was ever logged beyond is to be reproduced"
    assert steps(path) == [1, 2]
    again.close()


def test_a_cut_line_is_dropped_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 3)
    with path.open("ab") as file:
        file.write(b'{"step": 4, "lo')
    log = MetricsLog(path, pytest.fail)
    log.resume(3)
    log.append(line(4))
    log.close()
    assert steps(path) == [1, 2, 3, 4]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mount.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mount.stderr}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_loses_no_line(small_disk: Path) -> None:
    failures: list[str] = []
    log = MetricsLog(small_disk / "metrics.jsonl", failures.append)
    log.resume(0)
    filler = small_disk / "filler"
    log.append(line(1))
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(b"x" * (1 << 20))
    for step in range(2, 80):
        log.append(line(step, filler="y" * 100))
    assert len(failures) == 1, "one message for one spell"
    assert len(steps(small_disk / "metrics.jsonl")) < 79
    filler.unlink()
    log.append(line(80))
    log.close()
    assert steps(small_disk / "metrics.jsonl") == list(range(1, 81))


@pytest.mark.parametrize(
    ("change", "same_layout", "words"),
    [
        ({}, True, []),
        ({"seconds": 5.0}, True, []),
        ({"data_digest": "0" * 16}, False, ["data_digest"]),
        ({"tokens": 8}, False, ["tokens"]),
        ({"loss": 0.5 + 1e-7}, True, ["loss"]),
        ({"loss": 0.5 + 1e-7}, False, []),
        ({"loss": 0.5 + 1e-4}, False, ["loss"]),
        ({"grad_norm": None}, False, ["grad_norm"]),
    ],
)
def test_what_a_replay_may_change(change: dict[str, object], same_layout: bool, words: list[str]) -> None:
    found = replay_differences(line(2), {**line(2), **change}, same_layout=same_layout, precision="fp32")
    assert [text.split(":")[0] for text in found] == words
