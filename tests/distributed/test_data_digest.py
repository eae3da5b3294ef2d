"""`data_digest` is taken from what the model was given: equal for any layout, and changed by any change of it.

The reference digests come from the order function alone: the rows of each step, hashed one by one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xxhash

from data_pipeline.dataset import Dataset
from data_pipeline.stream import Stream
from solomonov.runfolder import RunFolder
from tests.support.ranks import run_ranks
from tests.support.tiny_run import lines_of, make_run, train_run, train_run_with

pytestmark = pytest.mark.dist(world=2)


def expected_digests(run: RunFolder, steps: int, batch_rows: int = 8) -> list[str]:
    """Step by step from (manifest, seed, i): xxh3-64 of each row's bytes, summed modulo 2^64."""
    config = run.config()
    digests = []
    with Dataset.open(run.data_folder()) as dataset:
        weights = {source.name: source.weight for source in config.data.sources}
        stream = Stream(dataset, sequence_tokens=32, packing=config.data.packing, seed=config.run.seed, weights=weights)
        for step in range(steps):
            total = 0
            for row in range(step * batch_rows, (step + 1) * batch_rows):
                rows = stream.rows([row])
                parts = [np.int64(row).tobytes()]
                parts += [np.ascontiguousarray(a[0], "<i4").tobytes() for a in (rows.input_ids, rows.labels)]
                parts += [np.ascontiguousarray(rows.document_ids[0], "<i4").tobytes()]
                total += xxhash.xxh3_64_intdigest(b"".join(parts))
            digests.append(f"{total % 2**64:016x}")
    return digests


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (1, ()),
        (2, ()),
        (2, ("parallel.zero_stage=3", "training.micro_batch_sequences=1")),
        (4, ("training.micro_batch_sequences=1", "data.prefetch_steps=0")),
    ],
    ids=["one-rank", "two-ranks", "two-ranks-zero3", "four-ranks"],
)
def test_equals_the_order_function_for_any_layout(world: int, overrides: tuple[str, ...], tmp_path: Path) -> None:
    run = make_run(tmp_path, ranks=world, overrides=("training.total_steps=8", *overrides))
    assert set(run_ranks(train_run, world, run.path, timeout=120)) == {0}
    assert [line["data_digest"] for line in lines_of(run)] == expected_digests(run, 8)


@pytest.mark.parametrize(("fault", "changed"), [("token", {3}), ("swap", {3, 5})])
def test_a_change_after_the_loader_changes_it(fault: str, changed: set[int], tmp_path: Path) -> None:
    """One token altered, or rows of two steps exchanged, between the loader and the model."""
    run = make_run(tmp_path, ranks=1, overrides=("training.total_steps=8",))
    assert run_ranks(train_run_with, 1, run.path, fault, timeout=120) == [0]
    expected = expected_digests(run, 8)
    found = [line["data_digest"] for line in lines_of(run)]
    assert {step for step in range(8) if found[step] != expected[step]} == changed
