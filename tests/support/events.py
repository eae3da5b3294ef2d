"""TensorBoard event files read back with TensorBoard's own reader."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_events(folder: Path) -> EventAccumulator:
    """All event files of a folder, nothing sampled away."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def read_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value, as TensorBoard shows it; a step that stands twice is an error."""
    events = read_events(folder)
    found: dict[str, dict[int, float]] = {}
    for tag in events.Tags()["scalars"]:
        points: dict[int, float] = {}
        for point in events.Scalars(tag):
            assert point.step not in points, f"step {point.step} of {tag} stands twice"
            points[point.step] = point.value
        found[tag] = points
    return found
