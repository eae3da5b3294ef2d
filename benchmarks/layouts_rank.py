"""What a rank runs to measure layouts: `python -m benchmarks.layouts_rank FOLDER`, started by `benchmarks.layouts`.

It needs the torchrun variables but no address: ranks meet through a file in FOLDER. All rows of one number of ranks run
in the same processes, one after the other and in turns, so that all see the same machine.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch.nn.parallel import DistributedDataParallel

from solomonov.activations import Allocated
from solomonov.distributed import Control, RankInfo, meet, start_process_group, stop_process_group
from solomonov.engine import Engine
from solomonov.equivalence import Case, Trial, layout_problem
from solomonov.equivalence_rank import CPU, rows_of, spec_of
from solomonov.model.config import Recompute
from solomonov.model.transformer import Transformer
from solomonov.optim import make_optimizer
from solomonov.parallel import Offload

TASK: Final = "task.json"
RESULT: Final = "result.json"


class Row(Case):
    """What is measured: a layout of the engine, or the loop without it."""

    plain: bool = False
    """PyTorch alone; of the layout only ranks, accumulation and recomputation count."""
    offload: Offload = "none"
    """As in `parallel.offload`."""

    @property
    def title(self) -> str:
        """In words, without the number of ranks."""
        words = f"ZeRO {self.zero_stage}"
        if self.plain:
            words = "plain loop" if self.ranks == 1 else "plain loop, DDP"
        elif self.pipeline > 1:
            copies = f" x data {self.data_parallel}" if self.data_parallel > 1 else ""
            words = f"pipeline {self.pipeline}{copies}, {words}"
        words += f", offload {self.offload}" * (self.offload != "none")
        return words + f", recompute {self.recompute}" * (self.recompute != "none")


class Trainer(Protocol):
    """Something that takes steps on the trial's rows."""

    def step(self, number: int) -> float:
        """One update; this rank's sum of cross-entropy, nats."""


class PlainLoop:
    """What one would write without DeepSpeed and without the engine: forward, backward, clip, AdamW, and
    DistributedDataParallel over several ranks."""

    def __init__(self, trial: Trial, row: Row, control: Control) -> None:
        self._trial, self._row, self._rank = trial, row, control.rank
        again = Recompute(row.recompute, row.every)
        self._model = Transformer(trial.model, trial.vocab_size, seed=trial.seed, recompute=again)
        self._optimizer = make_optimizer(self._model.named_parameters(), trial.optimizer, trial.model, fused=False)
        self._run: torch.nn.Module = DistributedDataParallel(self._model) if row.ranks > 1 else self._model

    def step(self, number: int) -> float:
        """See `Trainer`."""
        trial, row = self._trial, self._row
        valid = rows_of(trial, number, range(trial.rows)).valid_tokens
        mine = range(self._rank, trial.rows, row.ranks)
        micro_rows, total = len(mine) // row.accumulation, 0.0
        for begin in range(0, len(mine), micro_rows):
            batch = rows_of(trial, number, mine[begin : begin + micro_rows])
            last = begin + micro_rows == len(mine)
            with nullcontext() if last or row.ranks == 1 else self._run.no_sync():  # type: ignore[operator]
                loss = self._run(batch.input_ids, batch.document_ids, batch.labels)
                (loss * (row.ranks / valid)).backward()  # DDP averages
            total += float(loss)
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), trial.gradient_clipping)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total


class EngineLoop:
    """The engine in a layout, as `solomonov.train` uses it."""

    def __init__(self, trial: Trial, row: Row, control: Control) -> None:
        self._trial = trial
        self._engine = Engine(replace(spec_of(trial, row), offload=row.offload), CPU)
        layouts = control.all_gather_object(self._engine.layout)
        problem = layout_problem(row, trial, layouts)
        offloads = {layout["offload"] for layout in layouts}
        if problem is None and offloads != {row.offload}:
            problem = f"offload is {offloads}, not {row.offload}"
        if problem is not None:
            raise RuntimeError(f"{row} did not run: {problem}")
        self.layout: dict[str, Any] = layouts[0]

    def step(self, number: int) -> float:
        """See `Trainer`."""
        trial, engine = self._trial, self._engine
        plan = engine.spec.plan
        valid = rows_of(trial, number, range(trial.rows)).valid_tokens
        mine = range(engine.data_rank, trial.rows, plan.data_parallel)
        cuts = range(0, len(mine), plan.micro_rows) if engine.needs_rows else ()
        batches = [rows_of(trial, number, mine[cut : cut + plan.micro_rows]) for cut in cuts]
        loss = engine.forward_backward(batches, valid, trial.optimizer.lr, update=number)
        engine.update()
        return float(loss)


def make(trial: Trial, row: Row, control: Control) -> PlainLoop | EngineLoop:
    """What takes the steps of a row."""
    return PlainLoop(trial, row, control) if row.plain else EngineLoop(trial, row, control)


def measure_round(trial: Trial, row: Row, control: Control) -> dict[str, Any]:
    """Train from the start: one step that is not timed, then the others.

    Returns:
        median seconds of a step, from when all ranks begin until all are done; mean losses (nats); the layout.
    """
    loop = make(trial, row, control)
    seconds, losses = [], []
    for number in range(trial.steps):
        control.barrier()
        begun = time.perf_counter()
        loss = loop.step(number)
        control.barrier()
        seconds.append(time.perf_counter() - begun)
        valid = rows_of(trial, number, range(trial.rows)).valid_tokens
        losses.append(control.sum_floats([loss])[0] / valid)
    layout = loop.layout if isinstance(loop, EngineLoop) else {"optimizer": "AdamW", "pipeline": 1, "zero_stage": None}
    kept = {key: layout[key] for key in ("optimizer", "zero_stage", "pipeline")}
    return {"seconds": statistics.median(seconds[1:]), "losses": losses, "ran": kept}


def measure_memory(trial: Trial, row: Row, control: Control) -> int:
    """Most bytes of tensors that a rank has at once in its second step, of the rank with the most."""
    with Allocated() as allocated:
        loop = make(trial, row, control)
        loop.step(0)
        allocated.peak = allocated.now
        loop.step(1)
    return max(int(peak) for peak in control.all_gather_object(allocated.peak))


def main(arguments: Sequence[str]) -> int:
    """Run this rank to its end."""
    folder = Path(arguments[0])
    task = json.loads((folder / TASK).read_text(encoding="utf-8"))
    trial = Trial.model_validate_json(json.dumps(task["trial"]))
    rows = [Row.model_validate(fields) for fields in task["rows"]]
    info = RankInfo.from_environment()
    start_process_group(info, CPU, meet(info, f"file://{folder / 'meeting'}"))
    control = Control()
    rounds: list[list[dict[str, Any]]] = [[] for _ in rows]
    for number in range(task["rounds"]):
        order = range(len(rows)) if number % 2 == 0 else reversed(range(len(rows)))
        for at in order:
            rounds[at].append(_and_forget(lambda row=rows[at]: measure_round(trial, row, control)))  # type: ignore[misc]
            if control.rank == 0:
                print(f"round {number + 1}: {rows[at].title}: {rounds[at][-1]['seconds']:.4f} s", flush=True)
    peaks = [_and_forget(lambda row=row: measure_memory(trial, row, control)) for row in rows]  # type: ignore[misc]
    cpu = control.sum_floats([time.process_time()])[0]
    if control.rank == 0:
        result = {"rounds": rounds, "peaks": peaks, "cpu_seconds": cpu}
        (folder / RESULT).write_text(json.dumps(result), encoding="utf-8")
    stop_process_group()
    return 0


def _and_forget(measured: Callable[[], Any]) -> Any:
    """What it gives, once its tensors are gone: an engine is a circle of references."""
    value = measured()
    gc.collect()
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
