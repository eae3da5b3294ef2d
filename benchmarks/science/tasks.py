"""Synthetic tasks with a known floor. Every batch is a function of the seed and its number."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import permutations
from math import factorial, log
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

IGNORED = -100
"""Label of a position at which nothing is asked."""

Batch = tuple[Tensor, Tensor, Tensor]
"""Input ids, document ids and labels, (rows, tokens) each."""


class Task(Protocol):
    """What a model is asked, at any length."""

    @property
    def vocabulary(self) -> int:
        """Number of symbols."""

    def batch(self, rows: int, tokens: int, number: int, seed: int) -> Batch:
        """As many rows of so many tokens; `number` says which batch (those of evaluation are negative), `seed` of
        which run."""


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**62)


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
        generator = _generator(seed, number)
        row = torch.randint(0, self.symbols, (rows, 1), generator=generator)
        columns = [row]
        for _ in range(self.tokens):
            noise = torch.randint(0, self.symbols, (rows, 1), generator=generator)
            kept = torch.rand((rows, 1), generator=generator) < self.keep
            columns.append(torch.where(kept, order[columns[-1]], noise))
        ids = torch.cat(columns, dim=1)
        return ids[:, :-1].to(torch.int32), torch.zeros(rows, self.tokens, dtype=torch.int32), ids[:, 1:]


@dataclass(frozen=True)
class Copy:
    """A random string, and the same once more: all but its first symbol can be read behind what stands here."""

    symbols: int = 32

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.symbols

    def batch(self, rows: int, tokens: int, number: int, seed: int) -> Batch:
        """Rows of `tokens` tokens, asked about in their second half."""
        half = (tokens + 1) // 2
        text = torch.randint(0, self.symbols, (rows, half), generator=_generator(seed, number))
        ids = torch.cat((text, text), dim=1)[:, : tokens + 1]
        if ids.shape[1] < tokens + 1:
            ids = torch.cat((ids, text[:, :1]), dim=1)
        labels = ids[:, 1:].clone()
        labels[:, :half] = IGNORED
        return ids[:, :-1].to(torch.int32), torch.zeros(rows, tokens, dtype=torch.int32), labels


@dataclass(frozen=True)
class Recall:
    """Associative recall (as MQAR, arXiv 2312.04927): pairs of key and value in noise, then some of the keys again, any
    of them and more than once, after each of which its value is asked for. A longer row has more noise and as many
    pairs."""

    keys: int = 16
    values: int = 16
    noise: int = 16
    pairs: int = 8
    asked: int = 24
    """Keys that stand at the end. Of eight a row, and 80 symbols, full RoPE found a third after 2,250 updates."""

    @property
    def vocabulary(self) -> int:
        """V: noise, keys, values."""
        return self.noise + self.keys + self.values

    def batch(self, rows: int, tokens: int, number: int, seed: int) -> Batch:
        """Rows of `tokens` tokens, at least 2 * (pairs + asked)."""
        generator = _generator(seed, number)
        order = torch.rand(rows, self.keys, generator=generator).argsort(dim=1)[:, : self.pairs]
        values = torch.randint(0, self.values, (rows, self.pairs), generator=generator)
        told = torch.stack((self.noise + order, self.noise + self.keys + values), dim=2)
        again = torch.randint(0, self.pairs, (rows, self.asked), generator=generator)
        asked = told.gather(1, again[:, :, None].expand(-1, -1, 2))
        end = tokens - 2 * self.asked
        # Where the noise goes: between pairs, so that distances differ.
        ids = torch.randint(0, self.noise, (rows, tokens), generator=generator)
        gaps = torch.rand(rows, self.pairs, generator=generator).sort(dim=1).values
        begins = (gaps * (end - 2 * self.pairs + 1)).long() + 2 * torch.arange(self.pairs)
        for offset in range(2):
            ids.scatter_(1, begins + offset, told[:, :, offset])
        ids[:, end:] = asked.flatten(1)
        labels = torch.full((rows, tokens), IGNORED)
        labels[:, end::2] = asked[:, :, 1]
        return ids.to(torch.int32), torch.zeros(rows, tokens, dtype=torch.int32), labels


@dataclass(frozen=True)
class Passkey:
    """Five digits, once, somewhere in a text, and asked for at its end. The text is bytes of Python's own library."""

    digits: int = 5

    @property
    def vocabulary(self) -> int:
        """V: the bytes that are no digits stay, 256 opens the key and 257 asks for it."""
        return 258

    def batch(self, rows: int, tokens: int, number: int, seed: int) -> Batch:
        """Rows of `tokens` tokens."""
        generator = _generator(seed, number)
        text = library_bytes()
        begins = torch.randint(0, len(text) - tokens, (rows,), generator=generator)
        ids = torch.stack([text[begin : begin + tokens] for begin in begins.tolist()]).long()
        digits = torch.randint(ord("0"), ord("9") + 1, (rows, self.digits), generator=generator)
        last = tokens - 2 * self.digits - 2
        place = torch.randint(0, last + 1, (rows, 1), generator=generator)
        spread = place + 1 + torch.arange(self.digits)
        ids.scatter_(1, place, 256)
        ids.scatter_(1, spread, digits)
        ids[:, tokens - self.digits] = 257
        ids[:, tokens - self.digits + 1 :] = digits[:, :-1]
        labels = torch.full((rows, tokens), IGNORED)
        labels[:, tokens - self.digits :] = digits
        return ids.to(torch.int32), torch.zeros(rows, tokens, dtype=torch.int32), labels


@dataclass(frozen=True)
class Words:
    """The word problem of the symmetric group: permutations of `items` things, one after the other, and at each place
    asked what all up to here make together. A model of fixed depth cannot for long words (of 5 things and more; arXiv
    2210.10749, 2404.08819): the depth that it takes grows with their length."""

    items: int = 5
    letters: str = "two"
    """What stands in a row: "all" permutations, or "two" of which any other can be made, the first two things swapped
    and each thing moved to the next place: two are learned in fewer updates than 120."""

    @property
    def elements(self) -> int:
        """Of the group."""
        return factorial(self.items)

    @property
    def vocabulary(self) -> int:
        """V: the elements, and what a row begins with: a mean over equal tokens is the same for any number of them, so
        that without it nobody could count."""
        return self.elements + 1

    @cached_property
    def products(self) -> Tensor:
        """Number of the element that applying the first, and then the second, is."""
        elements = list(permutations(range(self.items)))
        number = {element: at for at, element in enumerate(elements)}
        return torch.tensor([[number[tuple(then[at] for at in first)] for then in elements] for first in elements])

    @cached_property
    def alphabet(self) -> Tensor:
        """Numbers of the elements that stand in a row."""
        if self.letters == "all":
            return torch.arange(self.elements)
        things = list(range(self.items))
        number = {element: at for at, element in enumerate(permutations(things))}
        return torch.tensor([number[(1, 0, *things[2:])], number[(*things[1:], 0)]])

    def guess(self, unknown: int) -> float:
        """Share of the answers that are right at best where so many permutations, the first ones, are not known: the
        likeliest thing that these make together."""
        likely = torch.zeros(self.elements, dtype=torch.float64)
        likely[0] = 1.0
        for _ in range(unknown):
            each = likely / len(self.alphabet)
            likely = torch.zeros_like(likely)
            for letter in self.alphabet:
                likely.index_add_(0, self.products[:, letter], each)
        return float(likely.max())

    def batch(self, rows: int, tokens: int, number: int, seed: int) -> Batch:
        """Rows of `tokens` tokens, the beginning among them, asked about at every place."""
        drawn = torch.randint(0, len(self.alphabet), (rows, tokens), generator=_generator(seed, number))
        ids = self.alphabet[drawn]
        ids[:, 0] = self.elements
        state = torch.zeros(rows, dtype=torch.int64)  # which leaves all things where they are
        labels = [state]
        for place in range(1, tokens):
            state = self.products[state, ids[:, place]]
            labels.append(state)
        return ids.to(torch.int32), torch.zeros(rows, tokens, dtype=torch.int32), torch.stack(labels, dim=1)


@dataclass(frozen=True)
class Text:
    """Bytes of Python's own library, every one asked for; the last tenth is held out and has the negative numbers."""

    @property
    def vocabulary(self) -> int:
        """V."""
        return 256

    def batch(self, rows: int, tokens: int, number: int, seed: int) -> Batch:
        """Rows of `tokens` tokens, each from one place in one file or from several that follow each other."""
        text = library_bytes()
        cut = len(text) * 9 // 10
        first, end = (cut, len(text)) if number < 0 else (0, cut)
        begins = torch.randint(first, end - tokens - 1, (rows,), generator=_generator(seed, number))
        ids = torch.stack([text[begin : begin + tokens + 1] for begin in begins.tolist()]).long()
        return ids[:, :-1].to(torch.int32), torch.zeros(rows, tokens, dtype=torch.int32), ids[:, 1:]


@cache
def library_bytes() -> Tensor:
    """4 MiB of the standard library's sources, in the order of their names; no digits, so that a key is one."""
    folder = Path(os.__file__).parent
    found, size = [], 0
    for path in sorted(folder.glob("*.py")):
        found.append(path.read_bytes())
        size += len(found[-1])
        if size > 4 << 20:
            break
    text = torch.frombuffer(bytearray(b"".join(found)), dtype=torch.uint8).clone()
    text[(text >= ord("0")) & (text <= ord("9"))] = ord("#")
    return text
