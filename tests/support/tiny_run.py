"""A whole run on a tiny synthetic data set, trained by the real loop inside the ranks of the pool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from solomonov.config import parse_config
from solomonov.distributed import Control
from solomonov.heartbeat import Heartbeat
from solomonov.runfolder import RunFolder
from solomonov.signals import StopRequest
from solomonov.start import prepare_run
from tests.support.datasets import make_documents, write_dataset
from tests.support.tiny import CPU

CONFIG = """\
run: {{name: tiny, folder: {folder}/runs, seed: 11}}
model: {{layers: 2, d_model: 32, heads: 4, kv_heads: 2, d_ff: 64}}
tokenizer: {{vocab_size: 512}}
data:
  folder: {folder}/dataset
  sources: [{{name: one, path: x}}, {{name: two, path: x, weight: 0.5}}]
  sequence_tokens: 32
training: {{total_steps: 20, global_batch_tokens: 256, micro_batch_sequences: 2}}
optimizer: {{lr: 0.003}}
schedule: {{warmup_steps: 4}}
checkpoint: {{every_steps: 20}}
evaluation: {{every_steps: 10, rows: 6}}
metrics: {{tensorboard: false}}
"""


def make_run(folder: Path, *, ranks: int, overrides: tuple[str, ...] = (), held_out: int = 6) -> RunFolder:
    """Write the data set, of which so many documents are held out, and the run's folder; nothing is trained yet."""
    documents = {"one": make_documents(1, 120, 30.0), "two": make_documents(2, 80, 60.0)}
    kept = {"one": make_documents(3, held_out, 30.0)} if held_out else {}
    write_dataset(folder / "dataset", documents, sequence_tokens=32, packing="best_fit", held_out=kept, vocab_size=512)
    loaded = parse_config(CONFIG.format(folder=folder), overrides, where="tiny")
    prepared = prepare_run(loaded, ranks_per_node=ranks, launch={})
    prepared.write()
    prepared.run.journal.write("attempt_started", attempt=1)
    return prepared.run


def train_run(path: Path) -> int:
    """Inside a rank: the real loop, to its end."""
    from solomonov.train import train

    return train(RunFolder(path), Control(), CPU, StopRequest(), Heartbeat(None))


def train_run_with(path: Path, fault: str) -> int:
    """Inside a rank: the real loop, with one fault between the loader and the model.

    `token` changes one input id of step 3 after the loader; `swap` exchanges a row of step 3 with one of step 5.
    """
    from data_pipeline.loader import Loader
    from data_pipeline.rows import RowBatch

    original = Loader.__next__
    kept: dict[int, RowBatch] = {}

    def faulty(loader: Any) -> list[RowBatch]:
        step = loader.next_step
        batches = original(loader)
        if fault == "token" and step == 3:
            ids = np.array(batches[0].input_ids)
            ids[0, 0] ^= 1
            batches[0] = RowBatch(batches[0].row_ids, ids, batches[0].labels, batches[0].document_ids)
        if fault == "swap" and step in (3, 5):
            other = loader._build(8 - step)[0]
            kept[step] = batches[0]
            batches[0] = _first_row_of(other, batches[0])
        return batches

    Loader.__next__ = faulty  # type: ignore[method-assign]
    try:
        return train_run(path)
    finally:
        Loader.__next__ = original  # type: ignore[method-assign]


def _first_row_of(donor: Any, batch: Any) -> Any:
    """The batch with its first row taken from another."""
    fields = []
    for name in ("row_ids", "input_ids", "labels", "document_ids"):
        array = np.array(getattr(batch, name))
        array[0] = getattr(donor, name)[0]
        fields.append(array)
    return type(batch)(*fields)


def lines_of(run: RunFolder) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]
