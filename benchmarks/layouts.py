"""What each layout costs: the engine in all of them, against itself with ZeRO 0 and against a plain PyTorch loop.

    python -m benchmarks.layouts [--out FILE] [--quick]

One small decoder, in fp32 on the CPU with one thread a rank, on 1, 2 and 4 ranks of this machine (more ranks than cores
share them). All rows have the same model, rows, micro-batch, AdamW and clipping; the plain loop is forward, backward,
clip_grad_norm_, AdamW, and with several ranks DistributedDataParallel. The rows of one number of ranks run in the same
processes and take turns, forwards in one round and backwards in the next; each time a row trains from the start, a
step that is not timed and then some that are.

seconds    Of a step: median of a round, from when all ranks begin until all are done. Reported are the median over the
           rounds, the least and the largest.
/ plain    Over the plain loop's seconds of the same number of ranks in the same round; median over the rounds. The row
           of ZeRO 0 is DeepSpeed's own overhead, the engine's included. Below 1 the layout is faster.
/ ZeRO 0   The same over the engine with ZeRO 0.
measured   MiB of tensors that a rank had at most in a step, of the rank with the most: counted in a training of its
           own, which is not timed.
foreseen   What the planner says of it; none for a plain loop.

Every row must have had the optimizer, ZeRO stage, stages and parameters of its layout, and the losses of the plain loop
within 1e-5; otherwise there is no result. --quick is for tests: small, one round, figures of no use.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import psutil

from benchmarks.harness import BenchmarkError, busy_seconds, program, provenance, run, spread, table, wait
from benchmarks.layouts_rank import RESULT, TASK, Row
from solomonov.config import OptimizerConfig
from solomonov.equivalence import LEAST_EPS, Trial
from solomonov.equivalence_rank import spec_of
from solomonov.footprint import Training, footprint
from solomonov.metrics import LOSS_BOUND
from solomonov.model.attention_config import AttentionConfig
from solomonov.model.config import ModelConfig
from solomonov.parallel import ParallelConfig

SCHEMA_VERSION: Final = 1
DEADLINE_SECONDS: Final = 1800.0
MIB: Final = 2**20


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    layers: int = 16
    d_model: int = 96
    vocab_size: int = 2048
    sequence_tokens: int = 128
    micro_rows: int = 2
    """The same everywhere, so that accumulation follows from the ranks."""
    steps: int = 3
    """Of which the first is not timed."""
    rounds: int = 5


QUICK: Final = Sizes(layers=4, d_model=32, vocab_size=97, sequence_tokens=16, steps=2, rounds=1)
ROWS: Final = 8


def trial_of(sizes: Sizes) -> Trial:
    """What all rows train."""
    return Trial(
        model=ModelConfig(
            layers=sizes.layers, d_model=sizes.d_model, heads=4, attention=AttentionConfig(preset="rope")
        ),
        vocab_size=sizes.vocab_size,
        sequence_tokens=sizes.sequence_tokens,
        rows=ROWS,
        steps=sizes.steps,
        seed=1,
        optimizer=OptimizerConfig(lr=1e-3, eps=LEAST_EPS),
        gradient_clipping=1.0,
        z_loss=0.0,
        ema_decay=None,
        changed={},
    )


def rows_of_table(sizes: Sizes) -> Iterator[Row]:
    """All rows, by number of ranks; of each number the plain loop first, then ZeRO 0."""

    def row(ranks: int, **fields: Any) -> Row:
        copies = ranks // fields.get("pipeline", 1)
        return Row.model_validate({"ranks": ranks, "accumulation": ROWS // copies // sizes.micro_rows, **fields})

    for ranks in (1, 2):
        yield row(ranks, plain=True)
        for stage in (0, 1, 2, 3):
            yield row(ranks, zero_stage=stage)
        yield row(ranks, zero_stage=1, offload="optimizer")
        yield row(ranks, zero_stage=3, offload="parameters")
        if ranks == 1:
            for mode in ("selective", "full"):
                yield row(ranks, plain=True, recompute=mode)
                yield row(ranks, recompute=mode)
        else:
            yield row(ranks, zero_stage=0, pipeline=2)
            yield row(ranks, zero_stage=1, pipeline=2)
    yield row(4, plain=True)
    yield row(4, zero_stage=0)
    yield row(4, zero_stage=1)
    yield row(4, zero_stage=1, pipeline=2)


def measure(sizes: Sizes, command: str) -> dict[str, Any]:
    """All rows."""
    result: dict[str, Any] = {"benchmark": "layouts", "schema_version": SCHEMA_VERSION, **provenance(command)}
    result["machine"]["deepspeed"] = importlib.metadata.version("deepspeed")
    result["load_average_before"] = [round(load, 2) for load in os.getloadavg()]
    trial = trial_of(sizes)
    result["trained"] = {
        "layers": sizes.layers,
        "d_model": sizes.d_model,
        "vocab_size": sizes.vocab_size,
        "sequence_tokens": sizes.sequence_tokens,
        "rows": ROWS,
        "micro_rows": sizes.micro_rows,
        "precision": "fp32",
        "threads_a_rank": 1,
        "rounds": sizes.rounds,
        "timed_steps_a_round": sizes.steps - 1,
    }
    result["rows"], result["others_cpu_share"] = [], {}
    for ranks, group in groupby(rows_of_table(sizes), key=lambda row: row.ranks):
        rows = list(group)
        print(f"{len(rows)} rows on {ranks} rank{'s' * (ranks > 1)}", file=sys.stderr, flush=True)
        found, share = run_ranks(trial, rows, sizes.rounds)
        result["rows"] += [judged(trial, rows, at, found) for at in range(len(rows))]
        result["others_cpu_share"][str(ranks)] = round(share, 3)
    zero_0 = [row for row in result["rows"] if row["title"] == "ZeRO 0"]
    result["deepspeed_overhead"] = {str(row["ranks"]): row["ratio_to_plain"]["median"] for row in zero_0}
    result["load_average_after"] = [round(load, 2) for load in os.getloadavg()]
    return result


def run_ranks(trial: Trial, rows: Sequence[Row], rounds: int) -> tuple[dict[str, Any], float]:
    """Measure all rows of one number of ranks.

    Returns:
        what rank 0 wrote; and the share of the machine that processes took which are none of ours.

    Raises:
        BenchmarkError: a rank failed, as one does whose layout did not run.
    """
    ranks = rows[0].ranks
    with tempfile.TemporaryDirectory(prefix="sol-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        fields = [row.model_dump(mode="json") for row in rows]
        task = {"trial": trial.model_dump(mode="json"), "rows": fields, "rounds": rounds}
        (folder / TASK).write_text(json.dumps(task), encoding="utf-8")
        begun, busy = time.monotonic(), busy_seconds()
        children = []
        for rank in range(ranks):
            number = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "CUDA_VISIBLE_DEVICES": ""}
            log = folder / f"rank-{rank}.log"
            words = ["-m", "benchmarks.layouts_rank", name]
            children.append((stack.enter_context(program(words, log, {**number, **world})), log))
        for child, log in children:
            wait(child, log, seconds=DEADLINE_SECONDS)
        result: dict[str, Any] = json.loads((folder / RESULT).read_bytes())
        room = (time.monotonic() - begun) * psutil.cpu_count()
        return result, max(0.0, (busy_seconds() - busy - result["cpu_seconds"]) / room)


def judged(trial: Trial, rows: Sequence[Row], at: int, found: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one row, by what all rows of its number of ranks gave.

    Raises:
        BenchmarkError: its losses are not those of the plain loop.
    """
    row, rounds = rows[at], found["rounds"]
    seconds = [[each["seconds"] for each in of_row] for of_row in rounds]

    def ratio(other: int) -> dict[str, Any]:
        return spread([mine / its for mine, its in zip(seconds[at], seconds[other], strict=True)])

    expected = rounds[0][0]["losses"]
    difference = max(abs(a - b) / b for each in rounds[at] for a, b in zip(each["losses"], expected, strict=True))
    if not difference <= LOSS_BOUND["fp32"]:
        raise BenchmarkError(
            f"{row.title} on {row.ranks} ranks: losses differ from the plain loop's by {difference:.1e}"
        )
    return {
        "ranks": row.ranks,
        "title": row.title,
        "accumulation": row.accumulation,
        "ran": rounds[at][0]["ran"],
        "seconds": spread(seconds[at]),
        "ratio_to_plain": ratio(0),
        "ratio_to_zero_0": ratio(1),
        "measured_mib": round(found["peaks"][at] / MIB, 2),
        "foreseen_mib": None if row.plain else round(foreseen(trial, row) / MIB, 2),
        "loss_difference": difference,
    }


def foreseen(trial: Trial, row: Row) -> int:
    """Bytes of the rank that needs the most, as the planner counts them; what is offloaded is in the same memory."""
    spec = spec_of(trial, row)
    fields = {"zero_stage": row.zero_stage, "pipeline": row.pipeline, "offload": row.offload}
    parallel = ParallelConfig.model_validate(fields)
    needed = footprint(trial.model, trial.vocab_size, spec.plan, parallel, Training(row.precision, spec.recompute))
    return needed.total + needed.host


def report(result: Mapping[str, Any]) -> str:
    """The tables."""
    header = ["", "seconds (least-most)", "/ plain", "/ ZeRO 0", "measured MiB", "foreseen MiB"]
    parts = []
    for ranks, group in groupby(result["rows"], key=lambda row: row["ranks"]):
        cells = []
        for row in group:
            took, planned = row["seconds"], row["foreseen_mib"]
            cells.append(
                [
                    row["title"],
                    f"{took['median']:.3f} ({took['min']:.3f}-{took['max']:.3f})",
                    f"{row['ratio_to_plain']['median']:.2f}",
                    f"{row['ratio_to_zero_0']['median']:.2f}",
                    f"{row['measured_mib']:.1f}",
                    "-" if planned is None else f"{planned:.1f}",
                ]
            )
        others = f"{result['others_cpu_share'][str(ranks)]:.0%} of the machine to others"
        parts.append(table(f"{ranks} rank{'s' * (ranks > 1)}, {others}", header, cells))
    overhead = ", ".join(f"{value:.2f} on {ranks}" for ranks, value in result["deepspeed_overhead"].items())
    return "\n".join([*parts, f"DeepSpeed's own overhead (ZeRO 0 / plain loop), by ranks: {overhead}"])


if __name__ == "__main__":
    run("benchmarks.layouts", __doc__, lambda quick, command: measure(QUICK if quick else Sizes(), command), report)
