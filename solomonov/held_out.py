"""The loss on held-out rows while training, by the engine's own forward pass, on all ranks together."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice

from data_pipeline.stream import HeldOutRows
from solomonov.batch import TokenBatch, to_tensors
from solomonov.distributed import Control
from solomonov.engine import Engine


def held_out_loss(
    engine: Engine,
    control: Control,
    held_out: HeldOutRows,
    rows: int,
    before: Callable[[TokenBatch], None] | None = None,
) -> float:
    """Mean cross-entropy (nats a token) on so many rows, spread evenly over all of them, the same ones every time.

    Args:
        before: called on each rank with each of its micro-batches, just before the forward pass.
    """
    plan = engine.spec.plan
    chosen = [index * len(held_out) // rows for index in range(rows)]
    mine = chosen[engine.data_rank :: plan.data_parallel]
    forwards = math.ceil(math.ceil(rows / plan.data_parallel) / plan.micro_rows)
    total, tokens = 0.0, 0
    indices = iter(mine)
    for _ in range(forwards):  # the same number on every rank: with ZeRO 3 each forward is a collective
        part = list(islice(indices, plan.micro_rows))
        batch = to_tensors(held_out.rows(part), engine.device) if part else engine.empty_batch()
        if before is not None:
            before(batch)
        total += engine.evaluate(batch)
        tokens += batch.valid_tokens * engine.counts_rows
    tokens = control.sum_integers([tokens])[0]
    return control.sum_floats([total])[0] / max(1, tokens)
