"""Warm-up of batch and row length in tokens: functions of the tokens trained on, so that resuming needs no state."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from data_pipeline.batches import BatchRows
from solomonov.errors import ConfigurationError
from solomonov.section import Section


class WarmupConfig(Section):
    """A size that grows linearly while so many tokens are trained on."""

    from_tokens: int = Field(ge=1)
    """The size at the first update, in tokens."""
    tokens: int = Field(ge=1)
    """Tokens (row positions) that are trained on until it has its full size."""


def grown(first: int, full: int, trained: int, over: int) -> int:
    """A size on the straight line from `first` at 0 to `full` at `over`, after `trained`, rounded down; then `full`."""
    return first + (full - first) * min(trained, over) // over


@dataclass(frozen=True)
class SequenceLengths:
    """How far attention reaches: rows of T tokens are cut into pieces of t, which do not see each other.

    t is the largest divisor of T that is not above the line from `first` to T = `full` over the first `over` tokens:
    the linear pacing of Li et al. (arXiv 2108.06084, section 4), who drop what is behind t; here it is trained on too.
    Since t is a divisor of T, the pieces of a row are all as long.
    """

    full: int
    """T, tokens of a row."""
    first: int
    """t at the first update; a divisor of T."""
    over: int
    """Tokens (row positions) trained on until t is T; 0: from the beginning."""

    def at(self, trained: int) -> int:
        """t of an update before which so many tokens (row positions) were trained on."""
        if trained >= self.over:
            return self.full
        line = grown(self.first, self.full, trained, self.over)
        pieces = -(-self.full // line)
        while self.full % pieces:  # ends at full / first
            pieces += 1
        return self.full // pieces


def sequence_lengths(warmup: WarmupConfig | None, sequence_tokens: int) -> SequenceLengths:
    """The lengths of a configuration's rows.

    Raises:
        ConfigurationError: they cannot be cut into equal pieces of the first length; the message names the nearest
            lengths that can be.
    """
    if warmup is None:
        return SequenceLengths(sequence_tokens, sequence_tokens, 0)
    first = warmup.from_tokens
    if first >= sequence_tokens or sequence_tokens % first:
        legal = [length for length in range(1, sequence_tokens) if sequence_tokens % length == 0]
        near = sorted(sorted(legal, key=lambda length: (abs(length - first), length))[:3])
        advice = [f"set schedule.sequence_warmup.from_tokens to one of {', '.join(map(str, near))}"] if near else []
        raise ConfigurationError(
            "rows cannot be cut into equal pieces of the first length",
            got=f"schedule.sequence_warmup.from_tokens {first}, data.sequence_tokens {sequence_tokens}",
            rule="the length grows from a divisor of data.sequence_tokens, below it, over its greater divisors",
            remedy="; or ".join([*advice, "remove schedule.sequence_warmup"]),
        )
    return SequenceLengths(sequence_tokens, first, warmup.tokens)


def growing_batches(warmup: WarmupConfig | None, full_rows: int, sequence_tokens: int) -> BatchRows:
    """The rows of a configuration's steps.

    Raises:
        ConfigurationError: the first batch is not a whole number of rows below `full_rows`; the message names the
            nearest ones that are.
    """
    if warmup is None:
        return BatchRows(full_rows)
    rows, rest = divmod(warmup.from_tokens, sequence_tokens)
    if rest or not 0 < rows < full_rows:
        near = sorted({min(max(1, value), full_rows - 1) * sequence_tokens for value in (rows, rows + 1)} - {0})
        words = " or ".join(map(str, near))
        advice = [f"set schedule.batch_warmup.from_tokens to {words}"] if near else []
        raise ConfigurationError(
            "the first batch is not a whole number of rows below the full one",
            got=f"schedule.batch_warmup.from_tokens {warmup.from_tokens}, data.sequence_tokens {sequence_tokens},"
            f" training.global_batch_tokens {full_rows * sequence_tokens}",
            rule="batches grow from a multiple of data.sequence_tokens to training.global_batch_tokens",
            remedy="; or ".join([*advice, "remove schedule.batch_warmup"]),
        )
    return BatchRows(full_rows, rows, -(-warmup.tokens // sequence_tokens))
