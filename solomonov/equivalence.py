"""Which layouts are proven equal for a configuration, and what equal means.

The configuration is scaled down until a layout takes a second on a CPU; each layout then trains the same few steps on
the same rows, and is compared with one rank that shares nothing and accumulates nothing. The bounds are those of the
promise: losses and gradient norms within 1e-5 relative, and of each tensor ||a - b|| <= 1e-5 ||b||, for masters and
first moments in fp32; in bf16 the loss within 5e-3. What the ranks do stands in `equivalence_rank`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, product
from math import prod
from typing import Any, Literal, get_args

import torch
import xxhash
from pydantic import Field

from solomonov.config import Config, OptimizerConfig
from solomonov.errors import ConfigurationError
from solomonov.layouts import one_copy
from solomonov.metrics import LOSS_BOUND
from solomonov.model.config import ModelConfig, RecomputeMode
from solomonov.model.counts import parameter_count, parameter_shapes
from solomonov.model.naming import layer_names, layer_of
from solomonov.model.residual import branch_form
from solomonov.parallel import Offload, ParallelConfig, check_layout
from solomonov.partition import EMA, MOMENTUM
from solomonov.section import Section
from solomonov.topology import stage_bounds

MOST_RANKS = 16
"""Each is a process with torch and DeepSpeed, about 0.5 GiB."""
MOST_LAYERS, MOST_HEADS, MOST_WIDTH, MOST_TOKENS, MOST_PIECES, STEPS = 4, 4, 8, 16, 97, 4
"""What is scaled down to: layers of all stacks, heads, their width, tokens a row, pieces (odd: shares are uneven),
updates."""
MOST_WINDOW = 5
"""The same of a window: rows are longer, and no multiple of it."""
LEAST_EPS = 1e-5
"""AdamW's first updates are g / (|g| + eps): of a gradient that all but cancels, what is left is rounding, and a small
eps makes a whole step of it, which no layout shares with another. Gradients here are near 1e-2."""
ACCUMULATIONS = (1, 2, 4)

State = Mapping[tuple[str, str], torch.Tensor]
"""(canonical name, kind) -> flattened tensor; kinds are `gradient`, of the first step, `master`, and the first moment
(`exp_avg`, with Muon `momentum`)."""


class Case(Section):
    """A layout."""

    ranks: int = 1
    """Processes."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed partitions."""
    pipeline: int = 1
    """Stages."""
    sequence: int = 1
    """Ranks that share each row."""
    offload: Offload = "none"
    """What lies in the host's memory."""
    accumulation: int = 1
    """Micro-batches of a rank in an update."""
    recompute: RecomputeMode = "none"
    """Activation checkpointing."""
    every: int = 1
    """Blocks that are computed again together."""
    precision: str = "fp32"
    """fp32, bf16 or bf16_autocast."""

    @property
    def data_parallel(self) -> int:
        """Copies of the model that see different rows."""
        return self.ranks // (self.pipeline * self.sequence)

    def __str__(self) -> str:
        again = f", {self.recompute}" + (f" every {self.every}" if self.every > 1 else "")
        stages = f", {self.pipeline} stages" if self.pipeline > 1 else ""
        stages += f", rows on {self.sequence}" if self.sequence > 1 else ""
        offload = f", {self.offload} offloaded" if self.offload != "none" else ""
        ranks = f"{self.ranks} rank{'s' * (self.ranks > 1)}"
        return f"{ranks}, ZeRO {self.zero_stage}{stages}{offload}, x{self.accumulation}{again}, {self.precision}"


REFERENCE = Case()
"""What all others are compared with."""


class Trial(Section):
    """What every layout trains: a configuration, scaled down."""

    model: ModelConfig
    """The network."""
    vocab_size: int
    """Pieces."""
    sequence_tokens: int
    """Of a row."""
    source_tokens: int | None = None
    """Of a row of the source, a third longer, as far as there are positions; None: the model reads none."""
    rows: int
    """Of an update."""
    steps: int = STEPS
    """Updates."""
    seed: int
    """Of the weights and of the rows, which are drawn, not read."""
    optimizer: OptimizerConfig
    """As configured, with an eps of at least LEAST_EPS; the rate is the peak from the first update on."""
    gradient_clipping: float
    """As configured."""
    z_loss: float
    """As configured."""
    ema_decay: float | None
    """As configured."""
    changed: dict[str, tuple[Any, Any]] = Field(strict=False)
    """Dotted key -> value in the configuration, value here."""


def scale_down(config: Config, ranks: int) -> Trial:
    """The trial of a configuration on up to so many ranks."""
    model = config.model
    shared = model.heads // model.kv_head_count
    keys = min(model.kv_head_count, max(1, MOST_HEADS // shared))
    most = MOST_LAYERS // len(model.stacks)
    layers, width = min(model.layers, most), min(model.head_width, MOST_WIDTH)
    d_model = shared * keys * width if model.head_dim is None else min(model.d_model, MOST_HEADS * MOST_WIDTH)
    changes: dict[str, Any] = {
        "layers": layers,
        "encoder_layers": model.encoder_layers if model.encoder_layers is None else min(model.encoder_layers, most),
        "d_model": d_model,
        "heads": shared * keys,
        "kv_heads": model.kv_heads if model.kv_heads is None else keys,
        "head_dim": model.head_dim if model.head_dim is None else width,
        "d_ff": min(model.feed_forward_width, 2 * d_model),
        # The same kind of residual branch, and one that is scaled stays so.
        "residual": model.residual_mode,
        "base_layers": model.base_layers,
    }
    if model.residual_mode == "scaled":
        changes["base_layers"] = max(1, int(layers * min(branch_form(model, 0, stack).scale for stack in model.stacks)))
    if model.base_d_model is not None:
        changes["base_d_model"] = max(2, d_model * model.base_d_model // model.d_model)
    attention = model.attention
    if attention.window_tokens is not None:
        attention = attention.model_copy(update={"window_tokens": min(attention.window_tokens, MOST_WINDOW)})
    small = ModelConfig.model_validate({**model.model_dump(), **changes, "attention": attention})
    vocab_size = min(config.tokenizer.vocab_size, MOST_PIECES)
    tokens = min(config.data.sequence_tokens, MOST_TOKENS)
    source_tokens = -(-4 * tokens // 3)
    if model.longest_tokens is not None:
        source_tokens = min(source_tokens, model.longest_tokens)
    rows = math.lcm(*worlds(ranks)) * max(ACCUMULATIONS)
    before = {f"model.{key}": getattr(model, key) for key in changes} | {
        "model.attention.window_tokens": model.attention.window_tokens,
        "tokenizer.vocab_size": config.tokenizer.vocab_size,
        "data.sequence_tokens": config.data.sequence_tokens,
        "training.global_batch_tokens": config.training.global_batch_tokens,
        "training.total_steps": one_copy(config).total_steps,
        "optimizer.eps": config.optimizer.eps,
    }
    now = {f"model.{key}": value for key, value in changes.items()} | {
        "model.attention.window_tokens": attention.window_tokens,
        "tokenizer.vocab_size": vocab_size,
        "data.sequence_tokens": tokens,
        "training.global_batch_tokens": rows * tokens,
        "training.total_steps": STEPS,
        "optimizer.eps": max(config.optimizer.eps, LEAST_EPS),
    }
    return Trial(
        model=small,
        vocab_size=vocab_size,
        sequence_tokens=tokens,
        source_tokens=source_tokens if model.architecture == "encoder_decoder" else None,
        rows=rows,
        seed=config.run.seed,
        # In bf16 Muon's orthogonalisation differs by 1e-3 between layouts, for rounding alone.
        optimizer=config.optimizer.model_copy(update={"eps": now["optimizer.eps"], "newton_schulz": "fp32"}),
        gradient_clipping=config.training.gradient_clipping,
        z_loss=config.training.z_loss,
        ema_decay=config.training.ema_decay,
        changed={key: (before[key], now[key]) for key in before if before[key] != now[key]},
    )


# --- which layouts ------------------------------------------------------------------------------------------


def worlds(ranks: int) -> list[int]:
    """The numbers of ranks that are tried: 1 to 4, and all."""
    return sorted({*range(1, min(ranks, 4) + 1), ranks})


def legal_cases(trial: Trial, ranks: int) -> Iterator[Case]:
    """All legal layouts in fp32 but the reference."""
    again: list[tuple[str, int]] = [("none", 1), ("selective", 1), ("full", 1)]
    again += [("full", 2)] * (trial.model.depth > 1)
    cuts = [(stages, 1) for stages in range(1, ranks + 1)] + [(1, sharing) for sharing in range(2, ranks + 1)]
    for world, stage, (stages, sharing), offload, accumulation, (mode, every) in product(
        worlds(ranks), (0, 1, 2, 3), cuts, get_args(Offload), ACCUMULATIONS, again
    ):
        case = Case.model_validate(
            {
                "ranks": world,
                "zero_stage": stage,
                "pipeline": stages,
                "sequence": sharing,
                "offload": offload,
                "accumulation": accumulation,
                "recompute": mode,
                "every": every,
            }
        )
        if case != REFERENCE and _is_legal(case, trial):
            yield case


def _is_legal(case: Case, trial: Trial) -> bool:
    fields = case.model_dump(include={"zero_stage", "pipeline", "sequence", "offload"})
    parallel = ParallelConfig.model_validate(fields)
    try:
        check_layout(
            parallel,
            precision=case.precision,
            world=case.ranks,
            model=trial.model,
            sequence_tokens=trial.sequence_tokens,
        )
    except ConfigurationError:
        return False
    return trial.rows % (case.data_parallel * case.accumulation) == 0


def all_cases(trial: Trial, ranks: int, precision: str) -> list[Case]:
    """Every legal layout, by number of ranks; where the configuration may compute in bf16, each of them that may does
    so as well."""
    found = list(legal_cases(trial, ranks))
    if kind := reduced_precision(precision):
        reduced = (case.model_copy(update={"precision": kind}) for case in [REFERENCE, *found])
        found += [case for case in reduced if _is_legal(case, trial)]
    return sorted(found, key=lambda case: (case.ranks, str(case)))


def draw_cases(trial: Trial, ranks: int, precision: str) -> list[Case]:
    """Layouts in which each two values of two axes meet at least once, wherever that is legal; by number of ranks.

    The axes are ZeRO stage, pipeline or sequence, offload, ranks, accumulation and recomputation. Greedy: each time the
    layout with the most pairs that have not met; of equals the one whose digest is least, so that the draw is the same
    everywhere.
    Where the configuration may compute in bf16, one layout of each kind does.
    """
    left = sorted(legal_cases(trial, ranks), key=lambda case: xxhash.xxh3_64_intdigest(str(case).encode()))
    pairs = {case: _pairs(case) for case in left}
    waiting = set[tuple[Any, ...]]().union(*pairs.values())
    drawn: list[Case] = []
    while waiting:
        best = max(left, key=lambda case: len(waiting & pairs[case]))
        waiting -= pairs[best]
        drawn.append(best)
    return sorted([*drawn, *_in_bf16(trial, ranks, precision)], key=lambda case: (case.ranks, str(case)))


def _pairs(case: Case) -> set[tuple[Any, ...]]:
    cut, again = (case.pipeline, case.sequence), (case.recompute, case.every)
    values = [case.zero_stage, cut, case.offload, case.ranks, case.accumulation, again]
    return set(combinations(enumerate(values), 2))


def reduced_precision(precision: str) -> str | None:
    """The kind of bf16 that a configuration with this precision may compute in."""
    return {"fp32": None, "bf16_autocast": "bf16_autocast"}.get(precision, "bf16")


def _in_bf16(trial: Trial, ranks: int, precision: str) -> list[Case]:
    kind = reduced_precision(precision)
    if kind is None:
        return []
    wanted = [(1, 0, 1, 1, "none"), (1, 1, 1, 2, "none"), (ranks, 1, 1, 1, "none"), (ranks, 2, 1, 2, "optimizer")]
    wanted += [(ranks, 3, 1, 2, "none"), (ranks, 3, 1, 1, "parameters"), (ranks, 1, 2, 4, "none")]
    names = ("ranks", "zero_stage", "pipeline", "accumulation", "offload")
    cases = [Case.model_validate({**dict(zip(names, each, strict=True)), "precision": kind}) for each in wanted]
    cases.append(Case(ranks=ranks, zero_stage=2, sequence=2, precision=kind))
    return [case for case in dict.fromkeys(cases) if _is_legal(case, trial)]


# --- whether they ran ---------------------------------------------------------------------------------------


def optimizer_of(case: Case) -> str:
    """The class that DeepSpeed makes of AdamW in a layout."""
    if case.zero_stage == 0:
        return "AdamW"
    if case.zero_stage == 3:
        return "DeepSpeedZeroOptimizer_Stage3"
    mixed = case.precision == "bf16" and case.zero_stage == 1 and case.offload == "none"
    return "BF16_Optimizer" if mixed else "DeepSpeedZeroOptimizer"


def parameters_held(case: Case, trial: Trial) -> list[int]:
    """How many values of parameters the ranks hold, in ascending order."""
    model, vocab_size = trial.model, trial.vocab_size
    sizes = {name: prod(shape) for name, shape in parameter_shapes(model, vocab_size).items()}
    if case.zero_stage == 3:
        return [sum(-(-size // case.ranks) for size in sizes.values())] * case.ranks
    if case.pipeline == 1:
        return [parameter_count(model, vocab_size)] * case.ranks
    layers = layer_names(model)
    by_layer = {layer: sum(size for name, size in sizes.items() if layer_of(name, layers) == layer) for layer in layers}
    if model.tie_embeddings:
        by_layer["head"] += vocab_size * model.d_model  # the matrix's copy on the last stage
    bounds = stage_bounds(model, vocab_size, trial.sequence_tokens, case.pipeline, trial.source_tokens)
    held = [sum(by_layer[layer] for layer in layers[begin:end]) for begin, end in pairwise(bounds)]
    return sorted(held * case.data_parallel)


def layout_problem(case: Case, trial: Trial, layouts: Sequence[Mapping[str, Any]]) -> str | None:
    """What ran that was not asked for, or None.

    Args:
        layouts: `Engine.layout` of each rank.
    """
    wanted = {
        "optimizer": optimizer_of(case),
        "zero_stage": case.zero_stage,
        "pipeline": case.pipeline,
        "sequence": case.sequence,
        "offload": case.offload,
        "world": case.ranks,
        "data_parallel": case.data_parallel,
        "accumulation": case.accumulation,
        "precision": case.precision,
    }
    for rank, layout in enumerate(layouts):
        for key, value in wanted.items():
            if layout[key] != value:
                return f"{key} of rank {rank} is {layout[key]}, not {value}"
    held = sorted(layout["parameters_held"] for layout in layouts)
    if held != parameters_held(case, trial):
        return f"the ranks hold {held} values of parameters, not {parameters_held(case, trial)}"
    return None


# --- whether they are equal ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a layout gave."""

    losses: Sequence[float]
    """Mean cross-entropy of each update, nats."""
    norms: Sequence[float]
    """Gradient norm of each update, before clipping."""
    layouts: Sequence[Mapping[str, Any]]
    """`Engine.layout` of each rank."""
    state: State
    """Gradients of the first update, masters and first moments after the last one."""


@dataclass(frozen=True)
class Verdict:
    """How a layout compares with the reference."""

    case: Case
    verdict: Literal["equal", "within bound", "differs", "did not run"]
    """`equal`: to the bit."""
    loss: float | None = None
    """Largest relative difference of a loss; None: not finite, or not compared."""
    grad_norm: float | None = None
    """The same of a gradient norm."""
    master: float | None = None
    """Largest ||a - b|| / ||b|| of a parameter's fp32 master, or of its moving average."""
    first_moment: float | None = None
    """The same of first moments."""
    parts: str | None = None
    """Where it parts from the reference first: the layer, and by what that is known."""
    problem: str | None = None
    """Why it did not run."""

    @property
    def holds(self) -> bool:
        """Whether it keeps the promise."""
        return self.verdict in ("equal", "within bound")


def compare(case: Case, trial: Trial, found: Outcome, expected: Outcome) -> Verdict:
    """The verdict on a layout that ran, by the outcome of the reference."""
    problem = layout_problem(case, trial, found.layouts)
    if problem is not None:
        return Verdict(case, "did not run", problem=problem)
    bound = LOSS_BOUND[case.precision]
    loss = _worst(found.losses, expected.losses)
    if case.precision != "fp32":
        holds = loss <= bound
        parts = None if holds else f"step {_first_step(found.losses, expected.losses, bound)}, by its loss"
        return Verdict(case, "within bound" if holds else "differs", _finite(loss), parts=parts)
    norm = _worst(found.norms, expected.norms)
    tensors = {key: relative(found.state[key], expected.state[key]) for key in expected.state}
    master = max(value for (_, kind), value in tensors.items() if kind in ("master", EMA))
    moment = max(value for (_, kind), value in tensors.items() if kind in ("exp_avg", MOMENTUM))
    worst = max(loss, norm, master, moment)
    verdict: Literal["equal", "within bound", "differs"] = "within bound" if worst <= bound else "differs"
    if not worst:
        verdict = "equal"
    parts = first_difference(trial.model, found, expected, tensors) if verdict == "differs" else None
    return Verdict(case, verdict, _finite(loss), _finite(norm), _finite(master), _finite(moment), parts)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||a - b|| / ||b|| in float64; 0 where both are zero, infinite where a number is not finite."""
    a, b = found.double(), expected.double()
    distance, norm = float(torch.linalg.vector_norm(a - b)), float(torch.linalg.vector_norm(b))
    if distance == 0.0:
        return 0.0
    return distance / norm if norm > 0.0 and math.isfinite(distance) and math.isfinite(norm) else math.inf


def first_difference(
    model: ModelConfig, found: Outcome, expected: Outcome, tensors: Mapping[tuple[str, str], float]
) -> str:
    """The first layer that parts: of those whose gradient differs in the first update the one that the backward pass
    comes to first; where none does, the one whose state differs most at the end.

    Args:
        tensors: (name, kind) -> relative difference.
    """
    bound = LOSS_BOUND["fp32"]
    gradients = {name: value for (name, kind), value in tensors.items() if kind == "gradient" and value > bound}
    layers = layer_names(model)
    for layer in reversed(layers):
        inside = {name: value for name, value in gradients.items() if layer_of(name, layers) == layer}
        if inside:
            name = max(inside, key=lambda key: inside[key])
            return f"{layer}, by the gradient of {name} in step 1: {inside[name]:.1e}"
    (name, kind), value = max(tensors.items(), key=lambda item: item[1])
    if value > bound:
        return f"{layer_of(name, layers)}, by {kind} of {name} after step {len(expected.losses)}: {value:.1e}"
    steps = [_first_step(found.losses, expected.losses, bound), _first_step(found.norms, expected.norms, bound)]
    return f"no layer; loss or gradient norm in step {min(step for step in steps if step)}"


def _differences(found: Sequence[float], expected: Sequence[float]) -> list[float]:
    pairs = zip(found, expected, strict=True)
    return [0.0 if a == b else abs(a - b) / abs(b) if math.isfinite(a - b) and b else math.inf for a, b in pairs]


def _worst(found: Sequence[float], expected: Sequence[float]) -> float:
    return max(_differences(found, expected))


def _first_step(found: Sequence[float], expected: Sequence[float], bound: float) -> int:
    """Number of the first update that differs by more, from 1; 0: none."""
    differences = _differences(found, expected)
    return next((number for number, value in enumerate(differences, 1) if value > bound), 0)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
