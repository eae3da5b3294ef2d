"""A tiny model, its rows, and engines of any layout on them: what the distributed and golden tests train.

The functions below run inside the ranks of the pool; what they return goes back to the test.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from solomonov.batch import TokenBatch
from solomonov.checkpoint.checkpointer import Checkpointer
from solomonov.checkpoint.reader import digest
from solomonov.config import OptimizerConfig
from solomonov.distributed import Control
from solomonov.engine import Engine
from solomonov.engine_spec import EngineSpec
from solomonov.equivalence import LEAST_EPS
from solomonov.model.config import ModelConfig, Recompute, RecomputeMode
from solomonov.model.cross import Source
from solomonov.model.residual import ResidualMode
from solomonov.model.stacks import Architecture
from solomonov.parallel import Offload
from solomonov.plan import BatchPlan
from solomonov.topology import RankGrid

VOCAB, SEQUENCE, SOURCE, ROWS = 97, 16, 22, 8
LEARNING_RATE, CLIPPING, SEED = 1e-2, 0.5, 1
EVALUATED_ROWS = 7
"""No whole number of micro-batches: the last one is short, or there is none for a rank."""
CPU = torch.device("cpu")
MUON = OptimizerConfig(kind="muon", lr=LEARNING_RATE, adamw_lr=LEARNING_RATE / 4, momentum=0.9)
SHUFFLED = RankGrid(((1, 2), (0, 3)))
"""Two stages on four ranks, which follow their numbers in one replica and not in the other."""

ATTENTION: dict[str, dict[str, Any]] = {
    "rope": {"preset": "rope"},
    "vanilla": {"preset": "vanilla"},
    "hybrid": {"preset": "hybrid", "window_tokens": 5, "pattern": "LG", "sink": True},
    "alibi": {"preset": "alibi", "window_tokens": 3, "pattern": "LG", "output_gate": "head", "sink": True},
    "learned": {"preset": "rope", "position": "learned", "train_tokens": SOURCE},
}
BIASES = {"bias": True, "norm": "layernorm", "embedding_norm": True, "output_head": "transform"}
"""What a model with learned positions also has."""


@dataclass(frozen=True)
class Layout:
    """What may differ between two runs that must give the same numbers."""

    zero_stage: int = 1
    accumulation: int = 1
    pipeline: int = 1
    sequence: int = 1
    precision: str = "fp32"
    tied: bool = False
    recompute: RecomputeMode = "none"
    every: int = 1
    """Blocks that are recomputed together."""
    compile: bool = False
    muon: bool = False
    top_heavy: bool = False
    """Three layers under a head that costs more than all of them."""
    offload: Offload = "none"
    shuffled: bool = False
    """The four ranks stand in the grid as in SHUFFLED."""
    z_loss: float = 0.0
    """As `tied`, it changes the numbers: layouts are compared at the same one."""
    ema: float | None = None
    """Decay of a moving average of the weights."""
    attention: str = "rope"
    """Which of ATTENTION; it changes the numbers as well."""
    residual: ResidualMode = "prenorm"
    """Likewise; other forms than the plain one also have LayerNorm and GELU."""
    architecture: Architecture = "decoder"
    """Likewise; an encoder_decoder has one layer more in its encoder."""
    switched: bool = False
    """Value residual and stochastic depth, over four layers; it changes the numbers as well."""

    def __str__(self) -> str:
        parts = [self.architecture] * (self.architecture != "decoder")
        parts += [f"zero{self.zero_stage}", f"acc{self.accumulation}", f"pipe{self.pipeline}", self.precision]
        parts += [f"rows-on{self.sequence}"] * (self.sequence > 1)
        parts += ["tied"] * self.tied + [self.recompute] * (self.recompute != "none")
        parts += ["muon"] * self.muon + ["top-heavy"] * self.top_heavy
        parts += [f"offload_{self.offload}"] * (self.offload != "none")
        parts += [f"ema{self.ema:g}"] if self.ema is not None else []
        parts += [self.attention] * (self.attention != "rope") + [self.residual] * (self.residual != "prenorm")
        parts += ["switched"] * self.switched
        parts += [f"every{self.every}"] * (self.every > 1) + [f"z{self.z_loss:g}"] * (self.z_loss > 0)
        return "-".join(parts + ["compiled"] * self.compile + ["shuffled"] * self.shuffled)


@dataclass(frozen=True)
class Outcome:
    """What a rank saw of a run."""

    losses: list[float]
    norms: list[float]
    layout: dict[str, Any]
    state: dict[tuple[str, str], torch.Tensor]
    """(name, kind) -> whole tensor, put together from all ranks' fragments."""


def tiny_model(
    tied: bool = False,
    layers: int = 2,
    attention: str = "rope",
    residual: ResidualMode = "prenorm",
    architecture: Architecture = "decoder",
    *,
    switched: bool = False,
) -> ModelConfig:
    """Two layers with grouped queries: 24,832 parameters untied."""
    shape: dict[str, Any] = {
        "layers": layers,
        "d_model": 32,
        "heads": 4,
        "kv_heads": 2,
        "d_ff": 64,
        "tie_embeddings": tied,
        "architecture": architecture,
        "encoder_layers": layers + 1 if architecture == "encoder_decoder" else None,
    }
    if switched:
        shape |= {"value_residual": True, "stochastic_depth": 0.9}
    if residual != "prenorm":
        shape |= {"residual": residual, "norm": "layernorm", "feed_forward": "gelu"}
    if attention == "learned":
        shape |= BIASES
    return ModelConfig.model_validate({**shape, "attention": ATTENTION[attention]})


def batch(step: int, rows: list[int], *, source: bool = False) -> TokenBatch:
    """Rows of a step: random ids, two documents a row, and a number of predicted tokens that differs by row.

    A source is longer than a row, and is padded; of every third row the second document has none.
    """
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, VOCAB, (ROWS, SEQUENCE), generator=generator)
    labels = torch.randint(0, VOCAB, (ROWS, SEQUENCE), generator=generator)
    for row in range(ROWS):
        labels[row, : (row * 3 + step) % SEQUENCE] = -100
    documents = (torch.arange(SEQUENCE)[None, :] >= torch.arange(ROWS)[:, None]).long()
    index = torch.tensor(rows)
    read = None
    if source:
        of_source = torch.randint(0, VOCAB, (ROWS, SOURCE), generator=generator)
        position, row = torch.arange(SOURCE)[None, :], torch.arange(ROWS)[:, None]
        belongs = ((position >= 2 * row + 1) & (row % 3 > 0)).long()
        belongs[position >= SOURCE - 1 - row] = -1
        read = Source(of_source[index], belongs[index])
    return TokenBatch(step * ROWS + index, ids[index], labels[index], documents[index], read)


def model_of(layout: Layout) -> ModelConfig:
    """The model that a layout's numbers are of."""
    layers = 3 if layout.top_heavy else 4 if layout.switched else 2
    return tiny_model(
        layout.tied, layers, layout.attention, layout.residual, layout.architecture, switched=layout.switched
    )


def optimizer_of(layout: Layout) -> OptimizerConfig:
    """What updates. An encoder_decoder's gradients are small, and those of single learned numbers all but cancel: with
    the usual eps their first updates are what rounding leaves of them (see `equivalence.LEAST_EPS`)."""
    chosen = MUON if layout.muon else OptimizerConfig(lr=LEARNING_RATE)
    is_small = layout.switched or layout.architecture == "encoder_decoder"
    return chosen.model_copy(update={"eps": LEAST_EPS}) if is_small else chosen


def make_spec(layout: Layout, world: int) -> EngineSpec:
    """What an engine in a layout is built from, on so many ranks."""
    data_parallel = world // (layout.pipeline * layout.sequence)
    micro = ROWS // (data_parallel * layout.accumulation)
    source = SOURCE if layout.architecture == "encoder_decoder" else None
    plan = BatchPlan(SEQUENCE, ROWS, micro, layout.accumulation, data_parallel, total_steps=100, source_tokens=source)
    return EngineSpec(
        model=model_of(layout),
        vocab_size=2000 if layout.top_heavy else VOCAB,
        seed=SEED,
        plan=plan,
        precision=layout.precision,
        zero_stage=layout.zero_stage,
        optimizer=optimizer_of(layout),
        gradient_clipping=CLIPPING,
        recompute=Recompute(layout.recompute, layout.every),
        compile=layout.compile,
        pipeline=layout.pipeline,
        sequence=layout.sequence,
        offload=layout.offload,
        z_loss=layout.z_loss,
        ema_decay=layout.ema,
    )


def make_engine(layout: Layout) -> Engine:
    """An engine over all ranks of this pool."""
    return Engine(make_spec(layout, dist.get_world_size()), CPU, SHUFFLED if layout.shuffled else None)


def train(engine: Engine, first: int, last: int) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the steps first .. last-1."""
    plan = engine.spec.plan
    mine = list(range(engine.data_rank, ROWS, plan.data_parallel))
    losses, norms, source = [], [], plan.source_tokens is not None
    for step in range(first, last):
        valid = batch(step, list(range(ROWS))).valid_tokens
        micro = [mine[i : i + plan.micro_rows] for i in range(0, len(mine), plan.micro_rows)]
        mine_now = [batch(step, rows, source=source) for rows in micro] if engine.needs_rows else []
        total = engine.forward_backward(mine_now, valid, LEARNING_RATE, update=step)
        update = engine.update()
        summed = total.double().reshape(1)
        dist.all_reduce(summed)
        losses.append(float(summed) / valid)
        norms.append(update.grad_norm)
    return losses, norms


def whole_state(engine: Engine) -> dict[tuple[str, str], torch.Tensor]:
    """All masters and moments, put together from every rank's fragments; each element exactly once."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, [(f.name, f.kind, f.shape, f.start, f.data) for f in engine.fragments()])
    whole: dict[tuple[str, str], torch.Tensor] = {}
    filled: dict[tuple[str, str], int] = {}
    for name, kind, shape, start, data in (fragment for part in parts for fragment in part):
        tensor = whole.setdefault((name, kind), torch.full((int(torch.Size(shape).numel()),), torch.nan))
        assert bool(tensor[start : start + data.numel()].isnan().all()), f"{kind} of {name} is written twice"
        tensor[start : start + data.numel()] = data
        filled[name, kind] = filled.get((name, kind), 0) + data.numel()
    holes = [key for key, tensor in whole.items() if filled[key] != tensor.numel()]
    assert not holes, f"not all elements were written: {holes}"
    return whole


def run(layout: Layout, steps: int) -> Outcome:
    """Train from the start."""
    engine = make_engine(layout)
    losses, norms = train(engine, 0, steps)
    return Outcome(losses, norms, engine.layout, whole_state(engine))


def run_and_tell_needs(layout: Layout, steps: int) -> tuple[Outcome, bool]:
    """Train from the start; and whether this rank needed rows for it."""
    engine = make_engine(layout)
    losses, norms = train(engine, 0, steps)
    return Outcome(losses, norms, engine.layout, whole_state(engine)), engine.needs_rows


def evaluate(engine: Engine) -> float:
    """Sum of cross-entropy over EVALUATED_ROWS rows of step 3, all ranks together."""
    plan = engine.spec.plan
    mine = list(range(EVALUATED_ROWS))[engine.data_rank :: plan.data_parallel]
    total = 0.0
    for first in range(0, EVALUATED_ROWS, plan.micro_rows * plan.data_parallel):
        part = mine[first // plan.data_parallel :][: plan.micro_rows]
        source = plan.source_tokens is not None
        total += engine.evaluate(batch(3, part, source=source) if part else engine.empty_batch())
    return Control().sum_floats([total])[0]


def evaluate_twice(layout: Layout) -> tuple[float, float]:
    """`evaluate` before and after a training step on the rows."""
    engine = make_engine(layout)
    before = evaluate(engine)
    train(engine, 3, 4)
    return before, evaluate(engine)


def place_in_the_grid(layout: Layout) -> tuple[bool, int]:
    """Whether this rank is of the first stage, and the number of its replica."""
    engine = make_engine(layout)
    return engine.counts_rows, engine.data_rank


def checkpointer(folder: Path, attempt: int = 1) -> Checkpointer:
    """Checkpoints over all ranks of this pool."""
    return Checkpointer(
        folder, Control(), run_id="tiny", attempt=attempt, keep_last=3, on_event=lambda kind, fields: None
    )


def save(engine: Engine, folder: Path, step: int, attempt: int = 1) -> str:
    """Save and return the layout-independent digest of what stands on the disk."""
    info = checkpointer(folder, attempt).save(
        step,
        engine.fragments(),
        expected=engine.shapes(),
        scalars={"optimizer_step": engine.updates_applied()},
        state={"step": step},
        topology=engine.layout,
    )
    assert info is not None, "the checkpoint was refused"
    return digest(info.folder)


def run_and_save(layout: Layout, steps: int, folder: Path) -> tuple[str, Outcome]:
    """Train, save, and train on for two steps: what a resumed run must equal."""
    engine = make_engine(layout)
    train(engine, 0, steps)
    saved = save(engine, folder, steps)
    losses, norms = train(engine, steps, steps + 2)
    return saved, Outcome(losses, norms, engine.layout, whole_state(engine))


def restore_and_run(layout: Layout, folder: Path, aside: Path) -> tuple[str, Outcome]:
    """Restore into a new engine, save again at once under another folder, and train on for two steps."""
    engine = make_engine(layout)
    reader = checkpointer(folder).find()
    assert reader is not None, "no checkpoint was found"
    engine.restore(reader, int(reader.scalars["optimizer_step"]))
    again = save(engine, aside, reader.step)
    losses, norms = train(engine, reader.step, reader.step + 2)
    return again, Outcome(losses, norms, engine.layout, whole_state(engine))
