"""Synthetic tasks with a known floor. Every batch is a function of the seed and its number."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoisyPermutation:
    """x_{t+1} = pi(x_t) with probability `keep`, else any symbol: learned as soon as a token's identity comes through
    all layers, so it tests whether depth trains, not what it is good for."""

    symbols: int = 64
    keep: float = 0.9
    tokens: int = 16
    seed: int = 0
    """Of the permutation."""

    @property
    def uniform(self) -> float:
        """Loss of who knows nothing, in nats."""
        return log(self.symbols)

    @property
    def floor(self) -> float:
        """Loss of who knows all but the noise, in nats."""
        other = (1.0 - self.keep) / self.symbols
        hit = self.keep + other
        return -(hit * log(hit) + (self.symbols - 1) * other * log(other))

    def batch(self, rows: int, number: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Input ids, document ids and labels, (rows, tokens) each.

        Args:
            number: which batch; those of evaluation are negative.
            seed: of the run.
        """
        order = torch.randperm(self.symbols, generator=torch.Generator().manual_seed(self.seed))
        generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**62)
        row = torch.randint(0, self.symbols, (rows, 1), generator=generator)
        columns = [row]
        for _ in range(self.tokens):
            noise = torch.randint(0, self.symbols, (rows, 1), generator=generator)
            kept = torch.rand((rows, 1), generator=generator) < self.keep
            columns.append(torch.where(kept, order[columns[-1]], noise))
        ids = torch.cat(columns, dim=1)
        return ids[:, :-1].to(torch.int32), torch.zeros(rows, self.tokens, dtype=torch.int32), ids[:, 1:]
