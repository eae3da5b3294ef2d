"""What a rank runs to prove layouts equal: `python -m solomonov.equivalence_rank FOLDER LIST`.

It needs the torchrun variables. FOLDER holds `trial.json`; LIST is a file in it that names cases by number. All ranks
run them one after the other in one process group, since imports cost more than a case; rank 0 writes each outcome.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from solomonov.batch import TokenBatch
from solomonov.distributed import (
    Control,
    RankInfo,
    groups_end_within,
    meet,
    start_process_group,
    stop_process_group,
)
from solomonov.engine import Engine
from solomonov.engine_spec import EngineSpec
from solomonov.equivalence import Case, Outcome, State, Trial
from solomonov.model.config import Recompute
from solomonov.model.cross import Source
from solomonov.partition import EMA, MOMENTUM
from solomonov.plan import BatchPlan

CPU = torch.device("cpu")
TRIAL = "trial.json"
COMPARED = ("master", "exp_avg", MOMENTUM, EMA)
"""Kinds of state that are compared after the last update."""


def main(arguments: Sequence[str], before: Callable[[Case, Engine], None] = lambda case, engine: None) -> int:
    """Run this rank to its end.

    Args:
        arguments: the folder, and the name of the list.
        before: called with each new engine, before its first update.
    """
    folder, name = Path(arguments[0]), arguments[1]
    trial = Trial.model_validate_json((folder / TRIAL).read_text(encoding="utf-8"))
    info = RankInfo.from_environment()
    start_process_group(info, CPU, meet(info))
    control = Control()
    gc.freeze()  # what was imported is not looked through at the end of each case: a tenth of its time
    for number, fields in json.loads((folder / name).read_text(encoding="utf-8")):
        case = Case.model_validate(fields)
        with groups_end_within():
            outcome = run_case(trial, case, control, before)
        if control.rank == 0:
            save_outcome(folder, number, outcome)
    stop_process_group()
    return 0


def run_case(
    trial: Trial, case: Case, control: Control, before: Callable[[Case, Engine], None] = lambda case, engine: None
) -> Outcome:
    """Train the trial in a layout, over all ranks of the process group; the same outcome on every rank.

    In bf16 the outcome has no state: nothing is promised of it.
    """
    engine = Engine(spec_of(trial, case), CPU)
    before(case, engine)
    plan, losses, norms = engine.spec.plan, [], []
    state: dict[tuple[str, str], torch.Tensor] = {}
    for step in range(trial.steps):
        valid = rows_of(trial, step, range(trial.rows)).valid_tokens
        mine = range(engine.data_rank, trial.rows, plan.data_parallel)
        cuts = range(0, len(mine), plan.micro_rows) if engine.needs_rows else ()
        batches = [rows_of(trial, step, mine[cut : cut + plan.micro_rows]) for cut in cuts]
        loss = engine.forward_backward(batches, valid, trial.optimizer.lr, update=step)
        norms.append(engine.update().grad_norm)
        losses.append(control.sum_floats([float(loss)])[0] / valid)
        if step == 0 and case.precision == "fp32":
            state |= _first_gradients(trial, norms[0], whole_state(engine, control))
    if case.precision == "fp32":
        last = whole_state(engine, control)
        state |= {key: tensor for key, tensor in last.items() if key[1] in COMPARED}
    layouts = control.all_gather_object(engine.layout)
    engine.close()
    return Outcome(losses, norms, layouts, state)


def spec_of(trial: Trial, case: Case) -> EngineSpec:
    """What the engine of a layout is built from."""
    micro = trial.rows // (case.data_parallel * case.accumulation)
    plan = BatchPlan(
        trial.sequence_tokens,
        trial.rows,
        micro,
        case.accumulation,
        case.data_parallel,
        trial.steps,
        source_tokens=trial.source_tokens,
    )
    return EngineSpec(
        model=trial.model,
        vocab_size=trial.vocab_size,
        seed=trial.seed,
        plan=plan,
        precision=case.precision,
        zero_stage=case.zero_stage,
        optimizer=trial.optimizer,
        gradient_clipping=trial.gradient_clipping,
        recompute=Recompute(case.recompute, case.every),
        pipeline=case.pipeline,
        sequence=case.sequence,
        offload=case.offload,
        z_loss=trial.z_loss,
        ema_decay=trial.ema_decay,
    )


def rows_of(trial: Trial, step: int, rows: Sequence[int]) -> TokenBatch:
    """Rows of a step, the same wherever they are drawn: two documents each, in two rows of three padding behind them,
    and a number of predicted tokens that differs by row, so that a token weighs the same only where the whole update's
    are counted.

    Sources are padded too. In one row of three the first document has none, in another the second.
    """
    generator = torch.Generator().manual_seed((trial.seed * 1009 + step) % 2**63)
    tokens, row = trial.sequence_tokens, torch.arange(trial.rows)[:, None]
    index = torch.tensor(list(rows))

    def drawn(length: int) -> torch.Tensor:
        return torch.randint(0, trial.vocab_size, (trial.rows, length), generator=generator)

    def documents(length: int, begin: torch.Tensor) -> torch.Tensor:
        position = torch.arange(length)[None, :]
        return (position >= begin).long().masked_fill(position >= length - row % 3, -1)

    ids, labels = drawn(tokens), drawn(tokens)
    of_rows = documents(tokens, row % tokens)
    labels[torch.arange(tokens)[None, :] < (row * 3 + step) % tokens] = -100
    labels[of_rows == -1] = -100
    source = None
    if trial.source_tokens is not None:
        length = trial.source_tokens
        begin = torch.where(row % 3 == 0, length, torch.where(row % 3 == 1, 0, 1 + 2 * row % (length - 1)))
        source = Source(drawn(length)[index], documents(length, begin)[index])
    return TokenBatch(step * trial.rows + index, ids[index], labels[index], of_rows[index], source)


def whole_state(engine: Engine, control: Control) -> State:
    """(name, kind) -> flattened tensor, put together from the ranks' fragments; what no rank has stays NaN."""
    mine = [(f.name, f.kind, f.shape, f.start, f.data.clone()) for f in engine.fragments()]
    whole: dict[tuple[str, str], torch.Tensor] = {}
    for name, kind, shape, start, data in (piece for part in control.all_gather_object(mine) for piece in part):
        tensor = whole.setdefault((name, kind), torch.full((torch.Size(shape).numel(),), torch.nan))
        tensor[start : start + data.numel()] = data
    return whole


def _first_gradients(trial: Trial, norm: float, state: State) -> State:
    """The gradients of the first update before clipping, from the first moments m = (1 - beta) g that they left."""
    limit = trial.gradient_clipping
    unclip = max(1.0, (norm + 1e-6) / limit) if limit else 1.0
    left = {"exp_avg": 1.0 - trial.optimizer.betas[0], MOMENTUM: 1.0 - trial.optimizer.momentum}
    return {(name, "gradient"): m * (unclip / left[kind]) for (name, kind), m in state.items() if kind in left}


def _places(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"case-{number:03d}.safetensors", folder / f"case-{number:03d}.json"


def save_outcome(folder: Path, number: int, outcome: Outcome) -> None:
    """Write an outcome; it is there when its JSON file is."""
    from safetensors.torch import save_file

    tensors, record = _places(folder, number)
    save_file({f"{kind} {name}": tensor for (name, kind), tensor in outcome.state.items()}, tensors)
    fields = {"losses": outcome.losses, "norms": outcome.norms, "layouts": outcome.layouts}
    aside = record.with_suffix(".tmp")
    aside.write_text(json.dumps(fields), encoding="utf-8")
    aside.rename(record)


def load_outcome(folder: Path, number: int) -> Outcome | None:
    """What `save_outcome` wrote; None where the case has none."""
    from safetensors.torch import load_file

    tensors, record = _places(folder, number)
    if not record.exists():
        return None
    fields: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    state = {}
    for key, tensor in load_file(tensors).items():
        kind, _, name = key.partition(" ")
        state[name, kind] = tensor
    return Outcome(fields["losses"], fields["norms"], fields["layouts"], state)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
