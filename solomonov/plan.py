"""Every number that is derived from the batch keys, computed once, with its arithmetic in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from data_pipeline.batches import BatchRows
from solomonov.errors import ConfigurationError
from solomonov.model.config import Recompute, RecomputeMode
from solomonov.schedule import ScheduleConfig
from solomonov.section import Section
from solomonov.warmup import SequenceLengths, growing_batches, sequence_lengths


class TrainingConfig(Section):
    """How much is trained, in which batches and precision."""

    total_steps: int | None = Field(default=None, ge=1)
    """Updates in the whole run. Give this or `total_tokens`."""
    total_tokens: int | None = Field(default=None, ge=1)
    """Tokens in the whole run, padding included; rounded up to whole batches. Give this or `total_steps`."""
    global_batch_tokens: int = Field(default=16384, ge=1)
    """Tokens (row positions) in one update over all ranks; independent of the machines."""
    micro_batch_sequences: int = Field(default=8, ge=1)
    """Rows in one forward and backward of one rank; accumulation follows from it."""
    precision: Literal["auto", "fp32", "bf16", "bf16_autocast"] = "auto"
    """`bf16`: bf16 parameters, fp32 masters and accumulation; `bf16_autocast`: fp32 parameters, bf16 compute;
    `auto`: bf16 on CUDA devices that have it, else fp32."""
    activation_checkpointing: RecomputeMode = "none"
    """`selective`: keep products and attention, and compute norms, activations and sums again in the backward pass;
    `full`: keep only the input of each group of `activation_checkpointing_every` blocks, and compute all again."""
    activation_checkpointing_every: int = Field(default=1, ge=1)
    """With `full`: consecutive blocks in a group. Kept are layers / this inputs, and while a group is computed again
    the insides of so many blocks: O(sqrt(layers)) at the order of sqrt(layers) (Chen et al., arXiv 1604.06174), least
    near sqrt(layers / 30), for a block keeps some 30 times its input."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile of each block; `auto`: on CUDA, not on CPU, where compiling costs more than short runs gain."""
    gradient_clipping: float = Field(default=1.0, ge=0.0)
    """Largest global L2 norm of the gradients; larger ones are scaled down to it. 0: never."""
    z_loss: float = Field(default=0.0, ge=0.0)
    """Coefficient of the mean of ln^2 Z over the predicted tokens, which is added to what is minimised, not to the loss
    that is recorded; 0: none, 1e-4: as in PaLM (arXiv 2204.02311, section 5)."""
    ema_decay: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Decay d of an exponential moving average of the weights, a <- d a + (1 - d) w after each update, which is kept in
    fp32 (4 bytes a parameter), saved, evaluated beside the weights and exported on demand; null: none. It begins as the
    weights; after n updates those still count for d^n, so 1 / (1 - d) is to be a small part of the run's updates."""

    @model_validator(mode="after")
    def _groups_are_recomputed(self) -> TrainingConfig:
        if self.activation_checkpointing_every > 1 and self.activation_checkpointing != "full":
            raise ValueError(
                f"training.activation_checkpointing_every is {self.activation_checkpointing_every} with"
                f" training.activation_checkpointing {self.activation_checkpointing}: only full computes groups of"
                " blocks again; set training.activation_checkpointing to full, or remove the other"
            )
        return self

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        if (self.total_steps is None) == (self.total_tokens is None):
            raise ValueError("give exactly one of training.total_steps and training.total_tokens")
        return self

    @property
    def recompute(self) -> Recompute:
        """The two keys of activation checkpointing."""
        return Recompute(self.activation_checkpointing, self.activation_checkpointing_every)


@dataclass(frozen=True)
class BatchPlan:
    """Rows of one update and how they are cut: micro x accumulation x data_parallel == batch, exactly."""

    sequence_tokens: int
    batch_rows: int
    """Rows of one update over all ranks."""
    micro_rows: int
    """Rows of one forward of one rank."""
    accumulation: int
    """Forwards of one rank in one update."""
    data_parallel: int
    """Ranks that see different rows."""
    total_steps: int
    source_tokens: int | None = None
    """Of a row of the source, S; None: rows have no source."""
    lengths: SequenceLengths | None = None
    """How far attention reaches; None: over whole rows, always."""
    warmup: BatchRows | None = None
    """The rows of each update, where they are fewer at first; None: `batch_rows`, always."""

    @property
    def batches(self) -> BatchRows:
        """The rows of each update, over all ranks."""
        return self.warmup or BatchRows(self.batch_rows)

    def micro_batches(self, step: int) -> int:
        """Forwards of each rank in the update after `step` updates: as many as the rank with the most rows needs."""
        rows = len(self.batches.rows(step))
        return -(-rows // (self.micro_rows * self.data_parallel))

    def attended_tokens(self, step: int) -> int:
        """Length of the pieces of a row within which the update after `step` updates attends."""
        if self.lengths is None:
            return self.sequence_tokens
        return self.lengths.at(self.trained_tokens(step))

    def trained_tokens(self, step: int) -> int:
        """Row positions of the first `step` updates, over all ranks."""
        return self.batches.before(step) * self.sequence_tokens

    def describe(self) -> str:
        """The arithmetic, on one line."""
        cut = f"{self.micro_rows} rows x {self.accumulation} accumulated x {self.data_parallel} data-parallel ranks"
        return f"{cut} = {self.describe_total()}"

    def describe_total(self) -> str:
        """What of it is the same in all layouts."""
        tokens, whole = self.batch_rows * self.sequence_tokens, self.trained_tokens(self.total_steps)
        return (
            f"{self.batch_rows} rows of {self.sequence_tokens} = {tokens:,} tokens an update;"
            f" {self.total_steps:,} updates = {whole:,} tokens{self._describe_warmups()}"
        )

    def _describe_warmups(self) -> str:
        words = ""
        if steps := self.batches.warmup_steps:
            words += f"; {len(self.batches.rows(0))} rows at first, {self.batch_rows} after {steps:,} updates"
        if steps := self.sequence_warmup_steps:
            first, last = self.attended_tokens(0), self.sequence_tokens
            words += f"; attention over {first} tokens at first, over {last} after {steps:,} updates"
        return words

    @property
    def sequence_warmup_steps(self) -> int:
        """Updates that do not attend over whole rows yet."""
        if self.lengths is None:
            return 0
        return self.batches.steps(-(-self.lengths.over // self.sequence_tokens))


def plan_batch(
    training: TrainingConfig,
    schedule: ScheduleConfig,
    *,
    sequence_tokens: int,
    data_parallel: int,
    source_tokens: int | None = None,
) -> BatchPlan:
    """Derive the batch plan, or say why the batch does not divide.

    Raises:
        ConfigurationError: `global_batch_tokens` is not a whole number of rows, or the rows do not divide over
            micro-batches and data-parallel ranks, or a warm-up begins at a size that does not divide; the message
            names the nearest values that do.
    """
    batch_rows, rest = divmod(training.global_batch_tokens, sequence_tokens)
    if rest or not batch_rows:
        below = max(1, batch_rows) * sequence_tokens
        raise ConfigurationError(
            "the batch is not a whole number of rows",
            got=f"training.global_batch_tokens {training.global_batch_tokens}, data.sequence_tokens {sequence_tokens}",
            rule="global_batch_tokens must be a multiple of sequence_tokens",
            remedy=f"set training.global_batch_tokens to {below} or {(batch_rows + 1) * sequence_tokens}",
        )
    micro = training.micro_batch_sequences
    if batch_rows % (micro * data_parallel):
        legal = legal_data_parallel(batch_rows, micro)
        near = sorted(sorted(legal, key=lambda world: (abs(world - data_parallel), world))[:3])
        per_rank = batch_rows // data_parallel if batch_rows % data_parallel == 0 else 0
        micros = [str(m) for m in range(1, per_rank + 1) if per_rank % m == 0 and m <= 4 * micro]
        advice = [f"use {' or '.join(map(str, near))} data-parallel ranks"] if near else []
        advice += [f"set training.micro_batch_sequences to one of {', '.join(micros)}"] if micros else []
        unit = micro * data_parallel
        multiple = max(1, round(batch_rows / unit)) * unit * sequence_tokens
        advice.append(f"set training.global_batch_tokens to {multiple}")
        raise ConfigurationError(
            "the batch does not divide over the ranks",
            got=(
                f"{training.global_batch_tokens} tokens / {sequence_tokens} = {batch_rows} rows,"
                f" over {data_parallel} data-parallel ranks x {micro} rows a micro-batch"
            ),
            rule="micro_batch_sequences x accumulation x data-parallel ranks must equal the rows of the batch",
            remedy="; or ".join(advice),
        )
    batches = growing_batches(schedule.batch_warmup, batch_rows, sequence_tokens)
    return BatchPlan(
        sequence_tokens=sequence_tokens,
        batch_rows=batch_rows,
        micro_rows=micro,
        accumulation=batch_rows // (micro * data_parallel),
        data_parallel=data_parallel,
        total_steps=total_steps(training, batches, sequence_tokens),
        source_tokens=source_tokens,
        lengths=sequence_lengths(schedule.sequence_warmup, sequence_tokens),
        warmup=batches if batches.warmup_steps else None,
    )


def total_steps(training: TrainingConfig, batches: BatchRows, sequence_tokens: int) -> int:
    """Updates in the whole run."""
    if training.total_steps is not None:
        return training.total_steps
    assert training.total_tokens is not None, "one of total_steps and total_tokens is set (validated)"
    return batches.steps(-(-training.total_tokens // sequence_tokens))


def legal_data_parallel(batch_rows: int, micro_rows: int) -> list[int]:
    """All data-parallel sizes that divide a batch of `batch_rows` cut in micro-batches of `micro_rows`."""
    if batch_rows % micro_rows:
        return []
    groups = batch_rows // micro_rows
    small = [d for d in range(1, int(groups**0.5) + 1) if groups % d == 0]
    return sorted({*small, *(groups // d for d in small)})
