"""Event files read back with TensorBoard's own reader: tags, steps, values; a resume; a disk that is really full."""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from solomonov.tensorboard import DIAGNOSTICS_LAYOUT, LAYOUT, QUEUE_LENGTH, TensorBoardLog
from tests.solomonov.checkpoint.common import small_disk
from tests.support.events import read_events, read_scalars

LAYOUT_TAG = "custom_scalars__config__"


def value(step: int) -> float:
    """Exact in float32, which is what an event file holds."""
    return 8.0 - step / 64


def write(folder: Path, first: int, last: int, *, add: float = 0.0) -> None:
    """One attempt that begins at `first`."""
    log = TensorBoardLog(folder, purge_step=first, on_failure=pytest.fail)
    for step in range(first, last + 1):
        log.scalars(step, {"train/loss": value(step) + add, "train/lr": 0.5})
    log.close()


def test_points_and_texts_come_back(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path / "tb", purge_step=1, on_failure=pytest.fail)
    log.text(0, "run/configuration", "| key | value |")
    for step in (1, 2, 5):
        log.scalars(step, {"train/loss": value(step), "eval/loss": -value(step)})
    log.close()
    assert read_scalars(tmp_path / "tb") == {
        "train/loss": {1: value(1), 2: value(2), 5: value(5)},
        "eval/loss": {1: -value(1), 2: -value(2), 5: -value(5)},
    }
    events = read_events(tmp_path / "tb")
    assert set(events.Tags()["tensors"]) == {"run/configuration/text_summary", LAYOUT_TAG}
    [text] = events.Tensors("run/configuration/text_summary")
    assert text.step == 0
    assert text.tensor_proto.string_val[0] == b"| key | value |"


@pytest.mark.parametrize("expected", [LAYOUT, LAYOUT | DIAGNOSTICS_LAYOUT])
def test_the_layout_page_names_the_tags(expected: dict[str, dict[str, list[Any]]], tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path, purge_step=1, on_failure=pytest.fail, layout=expected)
    log.scalars(1, {"train/loss": value(1)})
    log.close()
    from tensorboard.plugins.custom_scalar import layout_pb2

    [config] = read_events(tmp_path).Tensors(LAYOUT_TAG)
    page = layout_pb2.Layout.FromString(config.tensor_proto.string_val[0])
    found = {
        category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
        for category in page.category
    }
    assert found == {title: {chart: tags for chart, (_, tags) in charts.items()} for title, charts in expected.items()}


def test_a_picture_is_drawn_by_the_writing_thread(tmp_path: Path) -> None:
    threads: list[threading.Thread] = []
    pixels = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)

    def draw() -> NDArray[np.uint8]:
        threads.append(threading.current_thread())
        return pixels

    log = TensorBoardLog(tmp_path, purge_step=1, on_failure=pytest.fail)
    log.scalars(4, {"train/loss": value(4)})
    log.picture(4, "depth/layers", draw)
    log.close()
    [image] = read_events(tmp_path).Images("depth/layers")
    assert (image.step, image.width, image.height) == (4, 7, 5)
    with Image.open(io.BytesIO(image.encoded_image_string)) as decoded:
        assert np.array_equal(np.asarray(decoded), pixels)
    assert threads
    assert all(thread.name == "tensorboard" for thread in threads)
    assert read_scalars(tmp_path) == {"train/loss": {4: value(4)}}


def test_points_are_in_the_file_when_flush_returns(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path, purge_step=1, on_failure=pytest.fail)
    log.flush()
    assert not list(tmp_path.iterdir()), "nothing to say, no file"
    log.scalars(1, {"train/loss": value(1)})
    log.flush(timeout_seconds=60)
    assert read_scalars(tmp_path) == {"train/loss": {1: value(1)}}
    log.close()


def test_a_resume_leaves_one_value_a_step(tmp_path: Path) -> None:
    """Killed at step 9, resumed after step 5: the first values of 6 to 9 are superseded, by a third attempt as well."""
    write(tmp_path, 1, 9, add=100)
    write(tmp_path, 6, 8, add=200)
    write(tmp_path, 7, 12, add=300)
    expected = {step: value(step) + (100 if step < 6 else 200 if step < 7 else 300) for step in range(1, 13)}
    assert read_scalars(tmp_path)["train/loss"] == expected


def test_more_points_than_the_queue_holds_cost_points_not_time(tmp_path: Path) -> None:
    """The writing thread is held in its own call-back, so the queue fills; the caller goes on, and it is told."""
    held, messages = threading.Event(), []
    blocked = tmp_path / "file"
    blocked.touch()

    def on_failure(message: str) -> None:
        messages.append(message)
        assert held.wait(60)

    log = TensorBoardLog(blocked / "below", purge_step=1, on_failure=on_failure)
    total = QUEUE_LENGTH + 100
    for step in range(1, total + 1):
        log.scalars(step, {"train/loss": value(step)})
    blocked.unlink()
    held.set()
    log.close()
    left = read_scalars(blocked / "below")["train/loss"]
    assert len(left) == QUEUE_LENGTH, "as many as may wait"
    assert list(left) == list(range(min(left), min(left) + QUEUE_LENGTH)), "in order, without a hole"
    assert messages[1:] == [f"writing again; {total - len(left)} points were lost"]


@contextlib.contextmanager
def full(folder: Path) -> Iterator[None]:
    filler = folder / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(b"x" * (1 << 20))
    yield
    filler.unlink()


# The writer of TensorBoard has a thread of its own, which ends with the refusal of the disk.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_costs_nothing_and_is_told_once() -> None:
    with small_disk("64k") as disk:
        messages: list[str] = []
        log = TensorBoardLog(disk / "tb", purge_step=1, on_failure=messages.append)
        for step in range(1, 11):
            log.scalars(step, {"train/loss": value(step)})
        log.scalars(10, {"eval/loss": value(10)})
        log.flush(timeout_seconds=60)
        log.scalars(10, {"perf/checkpoint_stall_seconds": 1.0})
        with full(disk):
            for step in range(11, 401):
                log.scalars(step, {"train/loss": value(step)})
                if step % 40 == 0:
                    log.flush(timeout_seconds=60)
            assert len(messages) == 1, messages
            assert "No space left" in messages[0]
            files = list((disk / "tb").iterdir())
            assert sum(path.stat().st_size == 0 for path in files) == 0, "a try that failed leaves no empty file"
        for step in range(401, 411):
            log.scalars(step, {"train/loss": value(step)})
        log.close()
        assert messages[1:] == ["writing again; 0 points were lost"]
        found = read_scalars(disk / "tb")
        assert found["train/loss"] == {step: value(step) for step in range(1, 411)}
        assert found["eval/loss"] == {10: value(10)}, "a point of the step at which the disk filled"
        assert found["perf/checkpoint_stall_seconds"] == {10: 1.0}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_stays_full_is_told_once_and_close_returns() -> None:
    with small_disk("16k") as disk:
        messages: list[str] = []
        with full(disk):
            log = TensorBoardLog(disk / "tb", purge_step=1, on_failure=messages.append)
            for step in range(1, 60):
                log.scalars(step, {"train/loss": value(step)})
                log.flush(timeout_seconds=60)
            log.close()
            assert not log._thread.is_alive()
        assert len(messages) == 1
        assert not read_scalars(disk / "tb")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_folder_that_vanished_is_made_again(tmp_path: Path) -> None:
    """As a user does who deletes the event files of a running training."""
    folder, messages = tmp_path / "tb", []
    log = TensorBoardLog(folder, purge_step=1, on_failure=messages.append)
    log.scalars(1, {"train/loss": value(1)})
    log.flush(timeout_seconds=60)
    for path in folder.iterdir():
        os.unlink(path)
    folder.rmdir()
    folder.touch()  # nothing can be written below a file
    log.scalars(2, {"train/loss": value(2)})
    log.flush(timeout_seconds=60)
    folder.unlink()
    log.scalars(3, {"train/loss": value(3)})
    log.close()
    assert [message.split(":")[0] for message in messages][1:] == ["writing again; 0 points were lost"]
    assert read_scalars(folder)["train/loss"] == {step: value(step) for step in (1, 2, 3)}


def test_the_reader_of_these_tests_refuses_two_values_of_one_step(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("train/loss", 1.0, 3)
        writer.add_scalar("train/loss", 2.0, 3)
    assert isinstance(read_events(tmp_path), EventAccumulator)
    with pytest.raises(AssertionError, match="step 3 of train/loss stands twice"):
        read_scalars(tmp_path)
