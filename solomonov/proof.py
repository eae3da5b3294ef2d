"""What a run's records prove: each step against the order function, each replayed step against its first time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.dataset import Dataset
from solomonov.layouts import one_copy
from solomonov.metrics import replay_differences
from solomonov.runfolder import RunFolder
from solomonov.start import make_stream

COLUMNS = 4
"""Replayed steps whose columns are shown."""


@dataclass
class Proof:
    """The verdict on the records of a run."""

    steps: int = 0
    """Steps that stand in metrics.jsonl."""
    rows: int = 0
    """Rows that they trained on."""
    lost: int = 0
    """Rows below the last one that no step has."""
    repeated: int = 0
    """Rows of steps that stand more than once."""
    digests_equal: int = 0
    """Steps whose data_digest is that of the rows that the order function names."""
    replayed: list[int] = field(default_factory=list)
    """Steps that were trained more than once, because of a restart."""
    exact: bool = True
    """All replays were at the same layout, on the CPU: equal to the bit is the rule."""
    differences: list[str] = field(default_factory=list)
    """What a replay did otherwise than its rule allows."""
    kills: list[dict[str, Any]] = field(default_factory=list)
    """Kills on purpose: rank, step, step that was gone on from, and seconds until then."""
    columns: list[dict[str, Any]] = field(default_factory=list)
    """The last replayed steps: step, data_digest, order (the digest of the order function), loss before and after."""

    @property
    def holds(self) -> bool:
        """No row lost or repeated, each digest right, each replay as it must be."""
        return not (self.lost or self.repeated or self.differences) and self.digests_equal == self.steps


def prove_record(run: RunFolder) -> Proof:
    """Reads metrics.jsonl, metrics.superseded.jsonl and journal.jsonl of a run, and its data set, row by row.

    The digests are computed here anew from the shards: row i is a function of (manifest, seed, i), and step s has
    the rows that the configuration's batches give it.
    """
    config = run.config()
    lines = _lines(run.metrics)
    plan = one_copy(config)
    steps = [line["step"] for line in lines]

    def rows_of(numbers: Iterable[int]) -> int:
        return sum(len(plan.batches.rows(step - 1)) for step in numbers)

    proof = Proof(steps=len(lines), rows=rows_of(steps))
    branched = run.journal.last("branched")
    first = branched["step"] if branched else 0  # those up to it are another run's
    proof.lost = rows_of(range(first + 1, max(steps, default=first) + 1)) - rows_of(set(steps))
    proof.repeated = rows_of(steps) - rows_of(set(steps))
    expected: dict[int, str] = {}
    with Dataset.open(run.data_folder()) as dataset:
        stream = make_stream(config, dataset)
        for line in lines:
            rows = stream.rows(plan.batches.rows(line["step"] - 1)).cut(plan.attended_tokens(line["step"] - 1))
            expected[line["step"]] = f"{rows.digest():016x}"
            proof.digests_equal += line["data_digest"] == expected[line["step"]]
    _compare_replays(run, proof, {line["step"]: line for line in lines}, expected)
    proof.kills = _kills(run)
    return proof


def _compare_replays(run: RunFolder, proof: Proof, final: dict[int, dict[str, Any]], expected: dict[int, str]) -> None:
    layouts = [event["layout"] for event in run.journal.events("resumed")]
    deterministic = run.config().run.deterministic
    proof.exact = all(layout == layouts[0] and (layout["device"] == "cpu" or deterministic) for layout in layouts)
    precision = str(layouts[0]["precision"]) if layouts else "fp32"
    for before in _lines(run.metrics.with_suffix(".superseded.jsonl")):
        after = final.get(before["step"])
        if after is None:
            continue
        found = replay_differences(before, after, same_layout=proof.exact, precision=precision)
        proof.differences += [f"step {before['step']}: {text}" for text in found]
        proof.replayed = sorted({*proof.replayed, before["step"]})
        proof.columns.append(
            {
                "step": before["step"],
                "data_digest": after["data_digest"],
                "order": expected[before["step"]],
                "before": before["loss"],
                "after": after["loss"],
            }
        )
    proof.columns = proof.columns[-COLUMNS:]


def _kills(run: RunFolder) -> list[dict[str, Any]]:
    kills = []
    events = list(run.journal.events("kill_injected", "rank_exited", "resumed"))
    killed = {event["pid"] for event in events if event["event"] == "rank_exited" and event["signal"] == "SIGKILL"}
    for number, event in enumerate(events):
        resumed = next((later for later in events[number:] if later["event"] == "resumed"), None)
        if event["event"] == "kill_injected" and event["victim"] in killed and resumed is not None:
            seconds = round(resumed["time"] - event["time"], 1)
            kills.append({"rank": event["rank"], "step": event["step"], "resumed": resumed["step"], "seconds": seconds})
    return kills


def _lines(path: Any) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
