"""What does each kind of residual and of attention cost? Time of a step and memory, against plain Pre-LN with RoPE.

    python -m benchmarks.science.cost [--out FILE] [--quick]

All models of a table take turns in one process on one thread, forwards in one round and backwards in the next; a step
is forward, backward and AdamW.

seconds    Of a step: median over the rounds, the least and the largest.
/ plain    Over the seconds of the table's first row in the same round; median over the rounds.
memory     MiB of tensors that forward and backward make, at most at once: activations, and what is on its way to the
           gradients, which are there already. Counted in a step of its own.

residual      24 layers of width 128, 4 rows of 256 tokens: every residual form, value residual, stochastic depth (which
              draws anew each round, and saves a quarter of the blocks on average).
attention     The same with pre-norm: presets and single flags.
long rows     6 layers of width 64, one row of 4,096 tokens: what windows spare.
depth         1,000 layers of width 32, 8 rows of 16 tokens: the same.
recompute     Full recomputation of every sqrt(L)-th block of width 64 on 8 rows of 64 tokens: memory at 16 to 1,024
              layers, which grows as L^p: p = 0.5 where it is O(sqrt L), 1 without recomputation.

--quick is for tests: small, one round, figures of no use.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.harness import provenance, run, spread, table
from solomonov.activations import Allocated
from solomonov.config import OptimizerConfig
from solomonov.model.config import NOTHING_AGAIN, ModelConfig, Recompute
from solomonov.model.residual import MODES
from solomonov.model.transformer import Transformer
from solomonov.optim import make_optimizer

SCHEMA_VERSION: Final = 1
MIB: Final = 2**20
VOCABULARY: Final = 256


@dataclass(frozen=True)
class Rows:
    """What a table is measured on."""

    layers: int
    d_model: int
    rows: int
    tokens: int
    rounds: int = 5


@dataclass(frozen=True)
class Choice:
    """One model."""

    title: str
    model: Mapping[str, Any] = field(default_factory=dict)
    """What differs from pre-norm with rotary positions."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    residual: Rows = Rows(24, 128, 4, 256)
    long_rows: Rows = Rows(6, 64, 1, 4096)
    depth: Rows = Rows(1000, 32, 8, 16, rounds=3)
    recompute: Rows = Rows(1024, 64, 8, 64)


QUICK: Final = Sizes(
    residual=Rows(2, 32, 1, 32, 1),
    long_rows=Rows(2, 32, 1, 64, 1),
    depth=Rows(8, 32, 1, 16, 1),
    recompute=Rows(64, 32, 1, 16, 1),
)
PLAIN: Final = Choice("plain Pre-LN with RoPE")
RESIDUALS: Final = [
    PLAIN,
    *(Choice(mode, {"residual": mode}) for mode in MODES if mode != "prenorm"),
    Choice("value residual", {"value_residual": True}),
    Choice("stochastic depth, half the updates of the last block", {"stochastic_depth": 0.5}),
]


def attention(title: str, **flags: Any) -> Choice:
    """A choice of attention."""
    return Choice(title, {"attention": {"preset": "rope", **flags}})


def attentions(tokens: int) -> list[Choice]:
    """Presets and single flags, with windows of a quarter of the row."""
    window = tokens // 4
    return [
        PLAIN,
        *(attention(preset, preset=preset, train_tokens=tokens) for preset in ("vanilla", "alibi", "local", "hybrid")),
        attention("no QK norm", qk_norm=False),
        attention("NoPE", position="nope"),
        attention("window", window_tokens=window),
        attention("gate a head", output_gate="head"),
        attention("gate an element", output_gate=True),
        attention("log-n", log_n_scale=True, train_tokens=tokens),
        attention("sink", sink=True),
    ]


def config_of(choice: Choice, size: Rows) -> ModelConfig:
    """The model of a choice in a table."""
    width = {"layers": size.layers, "d_model": size.d_model, "heads": size.d_model // 16, "d_ff": 2 * size.d_model}
    rest = {"residual": "prenorm", "attention": {"preset": "rope"}, "base_layers": 6}
    return ModelConfig.model_validate({**width, **rest, **choice.model})


class Trained:
    """A model and its optimizer, stepped by hand."""

    def __init__(self, config: ModelConfig, size: Rows, recompute: Recompute = NOTHING_AGAIN) -> None:
        self.model, self.updates = Transformer(config, VOCABULARY, seed=0, recompute=recompute), 0
        settings = OptimizerConfig(lr=1e-3)
        self.optimizer = make_optimizer(self.model.named_parameters(), settings, config, fused=False)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, VOCABULARY, (size.rows, size.tokens + 1), generator=generator)
        self.batch: tuple[Tensor, Tensor, Tensor] = (ids[:, :-1].int(), torch.zeros_like(ids[:, 1:]).int(), ids[:, 1:])

    def backward(self) -> None:
        """Forward and backward."""
        loss = self.model(*self.batch) / self.batch[2].numel()
        loss.backward()

    def step(self) -> float:
        """Seconds of a step."""
        begun = time.perf_counter()
        if self.model.config.stochastic_depth:
            for block in self.model.blocks():
                block.draw(0, self.updates)
        self.updates += 1
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - begun


def peak_bytes(config: ModelConfig, size: Rows, recompute: Recompute = NOTHING_AGAIN) -> int:
    """What forward and backward make, at most at once, beside parameters and gradients that are there already."""
    with Allocated() as allocated:
        trained = Trained(config, size, recompute)
        for parameter in trained.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        there = allocated.now
        allocated.peak = there
        trained.backward()
        return int(allocated.peak - there)


def measure_table(choices: Sequence[Choice], size: Rows) -> list[dict[str, Any]]:
    """The rows of a table of times."""
    peaks = [peak_bytes(config_of(choice, size), size) for choice in choices]
    models = [Trained(config_of(choice, size), size) for choice in choices]
    for model in models:
        model.step()  # makes the moments; not timed
    seconds: list[list[float]] = [[] for _ in models]
    for number in range(size.rounds):
        order = range(len(models)) if number % 2 == 0 else reversed(range(len(models)))
        for at in order:
            seconds[at].append(models[at].step())
    return [
        {
            "title": choice.title,
            "seconds": spread(mine),
            "ratio_to_plain": spread([own / plain for own, plain in zip(mine, seconds[0], strict=True)]),
            "memory_mib": round(peak / MIB, 2),
        }
        for choice, mine, peak in zip(choices, seconds, peaks, strict=True)
    ]


def depths(most: int) -> Iterator[int]:
    """16, 64, ... up to so many layers."""
    layers = 16
    while layers <= most:
        yield layers
        layers *= 4


def measure_recompute(size: Rows) -> dict[str, Any]:
    """Memory by depth, kept and computed again, and the exponents of its growth."""
    rows = []
    for layers in depths(size.layers):
        config = config_of(PLAIN, Rows(layers, size.d_model, size.rows, size.tokens))
        row: dict[str, Any] = {"layers": layers, "every": math.isqrt(layers)}
        for name, again in (("kept", NOTHING_AGAIN), ("recomputed", Recompute("full", row["every"]))):
            row[f"{name}_mib"] = round(peak_bytes(config, size, again) / MIB, 3)
        rows.append(row)
    growth = {
        name: statistics.linear_regression(
            [math.log(row["layers"]) for row in rows], [math.log(row[f"{name}_mib"]) for row in rows]
        ).slope
        for name in ("kept", "recomputed")
    }
    return {"rows": rows, "exponent": {name: round(slope, 3) for name, slope in growth.items()}}


def measure(sizes: Sizes, command: str) -> dict[str, Any]:
    """All tables."""
    torch.set_num_threads(1)
    result: dict[str, Any] = {"benchmark": "cost", "schema_version": SCHEMA_VERSION, **provenance(command)}
    result["residual"] = measure_table(RESIDUALS, sizes.residual)
    result["attention"] = measure_table(attentions(sizes.residual.tokens), sizes.residual)
    of_windows = ("plain Pre-LN with RoPE", "alibi", "local", "hybrid", "window")
    rows = [choice for choice in attentions(sizes.long_rows.tokens) if choice.title in of_windows]
    result["long rows"] = measure_table(rows, sizes.long_rows)
    result["depth"] = measure_table(RESIDUALS, sizes.depth)
    result["recompute"] = measure_recompute(sizes.recompute)
    return result


def report(result: Mapping[str, Any]) -> str:
    """The tables."""
    parts = []
    for name in ("residual", "attention", "long rows", "depth"):
        cells = [
            [
                row["title"],
                f"{row['seconds']['median']:.3f} ({row['seconds']['min']:.3f}-{row['seconds']['max']:.3f})",
                f"{row['ratio_to_plain']['median']:.2f}",
                f"{row['memory_mib']:.1f}",
            ]
            for row in result[name]
        ]
        parts.append(table(name, ["", "seconds (least-most)", "/ plain", "memory MiB"], cells))
    found = result["recompute"]
    cells = [
        [str(row["layers"]), str(row["every"]), f"{row['kept_mib']:.2f}", f"{row['recomputed_mib']:.2f}"]
        for row in found["rows"]
    ]
    cells.append(["grows as L^", "", f"{found['exponent']['kept']:.2f}", f"{found['exponent']['recomputed']:.2f}"])
    parts.append(table("recompute", ["layers", "every", "kept MiB", "recomputed MiB"], cells))
    return "\n".join(parts)


if __name__ == "__main__":
    run(
        "benchmarks.science.cost", __doc__, lambda quick, command: measure(QUICK if quick else Sizes(), command), report
    )
