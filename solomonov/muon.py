"""Muon (Jordan et al., 2024): momentum whose singular values are brought near 1, for the matrices between embedding
and head; AdamW for all other parameters.

    b <- beta b + (1 - beta) g              momentum
    u  = (1 - beta) g + beta b              Nesterov's look ahead
    o  = NewtonSchulz5(u / ||u||_F)         about U V^T of the singular value decomposition of u
    w <- (1 - lr wd) w - lr 0.2 sqrt(max(m, n)) o

The last factor gives an update the root mean square of AdamW's, about 0.2, whatever the matrix's shape (Moonlight,
arXiv 2502.16982, equation 4): both optimizers then take the same kind of learning rate.

Momentum is elementwise, so it lies like the masters, in pieces over the ranks, and is saved and resharded like a moment
of AdamW. Only the orthogonalisation needs whole matrices. Each one has a home among the ranks of its data-parallel
group: pieces of u go there, pieces of o come back, every matrix is orthogonalised once. DeepSpeed's own Muon is not
used: it takes the global norm over orthogonalised updates, and lays momentum out differently at each ZeRO stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from solomonov.partition import MOMENTUM, Piece

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the iteration a x + b x^3 + c x^5, which lifts small singular values fast and leaves all within about 0.7 to 1.2
(Jordan et al., 2024)."""
ITERATIONS = 5
RMS = 0.2
"""Root mean square of an AdamW update in steady state, which Muon's are given (arXiv 2502.16982, section 2.2)."""
SMALLEST_NORM = 1e-7
"""Below it, a matrix counts as 0."""


def newton_schulz(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bring the singular values of a matrix near 1.

    Args:
        matrix: [m, n].
        dtype: of the products; bf16 costs nothing in training, but two layouts then agree to 1e-3 only.

    Returns:
        [m, n] in `dtype`.
    """
    a, b, c = COEFFICIENTS
    x: torch.Tensor = (matrix / matrix.norm().clamp_min(SMALLEST_NORM)).to(dtype)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x


def cost(shape: Sequence[int]) -> int:
    """Multiplications of `newton_schulz`, up to a factor: of the smaller side twice."""
    small, large = sorted(shape)
    return small * small * (2 * large + small)


@dataclass(frozen=True)
class _Range:
    """Elements [start, end) of the flattened matrix `number`, which lie on `rank`."""

    number: int
    rank: int
    start: int
    end: int

    @property
    def numel(self) -> int:
        return self.end - self.start


def homes(shapes: Sequence[tuple[int, ...]], ranks: int) -> list[int]:
    """A rank for each matrix, such that all multiply about as much: the dearest goes first, to whom has the least."""
    load = [0] * ranks
    found = [0] * len(shapes)
    for number in sorted(range(len(shapes)), key=lambda i: (-cost(shapes[i]), i)):
        rank = min(range(ranks), key=lambda r: (load[r], r))
        found[number] = rank
        load[rank] += cost(shapes[number])
    return found


class Exchange:
    """Carries the pieces of matrices to their homes and back, for one flat tensor of the optimizer.

    All ranks of the group make it together, each with its own pieces; afterwards nothing is agreed upon again.

    Args:
        pieces: this rank's, of matrices only.
        group: over whose ranks they tile each matrix once; None: this rank holds all of them whole.
        device: where matrices are put together; pieces that were offloaded lie elsewhere.
    """

    def __init__(self, pieces: Iterable[Piece], group: Any, device: torch.device) -> None:
        self._pieces = sorted(pieces, key=lambda piece: (piece.name, piece.start))
        self._group, self._device = group, device
        self._rank = 0 if group is None else dist.get_rank(group)
        self._ranks = 1 if group is None else dist.get_world_size(group)
        mine = [(piece.name, piece.shape, piece.start, piece.end) for piece in self._pieces]
        everyone: list[Any] = [mine]
        if group is not None:
            everyone = [None] * self._ranks
            dist.all_gather_object(everyone, mine, group=group)
        shapes = {name: shape for one in everyone for name, shape, *_ in one}
        names = sorted(shapes)
        self._shapes = [shapes[name] for name in names]
        self._home = homes(self._shapes, self._ranks)
        self._ranges = [
            _Range(names.index(name), rank, start, end)
            for rank, one in enumerate(everyone)
            for name, _, start, end in one
        ]
        for number, name in enumerate(names):
            held = sum(r.numel for r in self._ranges if r.number == number)
            assert held == math.prod(self._shapes[number]), f"the ranks hold {held} elements of {name}"

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor], flat: torch.Tensor) -> None:
        """Replace in `flat`, in place, every matrix X, wherever its pieces lie, by `function(X)` (collective).

        Args:
            function: [m, n] -> [m, n].
            flat: lies like the pieces' own flat tensor.
        """
        ranks, mine = range(self._ranks), self._of(self._rank)
        views = [piece.view(flat) for piece in self._pieces]
        # For each rank what I hold of its matrices, and what it holds of mine.
        away = [[view for view, r in zip(views, mine, strict=True) if self._home[r.number] == rank] for rank in ranks]
        here = [[r for r in self._of(rank) if self._home[r.number] == self._rank] for rank in ranks]
        came = self._swap(away, [r.numel for one in here for r in one], [sum(r.numel for r in one) for one in here])
        matrices: dict[int, torch.Tensor] = {}
        for r, part in zip((r for one in here for r in one), came, strict=True):
            if r.number not in matrices:
                matrices[r.number] = part.new_empty(math.prod(self._shapes[r.number]))
            matrices[r.number][r.start : r.end] = part
        for number, matrix in matrices.items():
            matrix.copy_(function(matrix.view(self._shapes[number])).reshape(-1))
        back = [[matrices[r.number][r.start : r.end] for r in one] for one in here]
        home_again = [view for one in away for view in one]
        returned = self._swap(back, [v.numel() for v in home_again], [sum(v.numel() for v in one) for one in away])
        for view, part in zip(home_again, returned, strict=True):
            view.copy_(part)

    def _of(self, rank: int) -> list[_Range]:
        """The ranges on a rank, in the order of its pieces."""
        return [r for r in self._ranges if r.rank == rank]

    def _swap(self, out: list[list[torch.Tensor]], parts: list[int], sizes: list[int]) -> list[torch.Tensor]:
        """Send the tensors `out[r]` to each rank r.

        Args:
            parts: elements of each tensor that comes here, those of rank 0 first.
            sizes: elements that come from each rank.
        """
        flat = [view.to(self._device) for one in out for view in one]
        sending = torch.cat(flat) if flat else torch.empty(0, device=self._device)
        if self._group is None:
            return list(torch.split(sending, parts))
        receiving = torch.empty(sum(sizes), device=self._device)
        sent = [sum(view.numel() for view in one) for one in out]
        dist.all_to_all_single(receiving, sending, sizes, sent, group=self._group)
        return list(torch.split(receiving, parts))


class Muon:
    """Muon's part of a step, on the groups of a torch AdamW that are marked `muon`.

    Args:
        momentum: beta, 0 to 1.
        dtype: of the products in Newton-Schulz.
        pieces: this rank's pieces of all parameters, once the layout stands.
        group: the ranks over which they are spread; None: each holds all whole.
        device: where to compute.
    """

    def __init__(
        self,
        momentum: float,
        dtype: torch.dtype,
        *,
        pieces: Callable[[], Iterable[Piece]],
        group: Callable[[], Any],
        device: torch.device,
    ) -> None:
        self._momentum, self._dtype, self._device = momentum, dtype, device
        self._pieces, self._group = pieces, group
        self._held: dict[torch.Tensor, list[Piece]] | None = None
        self._exchanges: dict[torch.Tensor, Exchange] = {}

    def take_over_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Have `optimizer.step` update the marked groups by Muon and the others as before."""
        others = optimizer.step

        def step(*args: Any, **kwargs: Any) -> Any:
            updated = [
                flat for group in optimizer.param_groups if group["muon"] for flat in self._update(optimizer, group)
            ]
            # AdamW passes over what has no gradient. Offloaded gradients are DeepSpeed's for good: they are put back.
            gradients = [flat.grad for flat in updated]
            for flat in updated:
                flat.grad = None
            result = others(*args, **kwargs)
            for flat, gradient in zip(updated, gradients, strict=True):
                flat.grad = gradient
            return result

        optimizer.step = step  # type: ignore[method-assign]

    @torch.no_grad()
    def _update(self, optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> list[torch.Tensor]:
        """One update of a group's tensors that have a gradient; returns them."""
        flats = [flat for flat in group["params"] if flat.grad is not None]
        for flat in flats:
            state = optimizer.state[flat]
            if MOMENTUM not in state:
                state[MOMENTUM] = torch.zeros_like(flat)
            momentum = state[MOMENTUM].lerp_(flat.grad, 1.0 - self._momentum)
            update = flat.grad.lerp(momentum, self._momentum)
            self._exchange(flat).apply(self._orthogonal, update)
            flat.mul_(1.0 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
        return flats

    def _exchange(self, flat: torch.Tensor) -> Exchange:
        """Of one flat tensor; made when it is first met, by all ranks in the same order."""
        if self._held is None:
            self._held = {}
            for piece in self._pieces():
                self._held.setdefault(piece.flat, []).append(piece)
        if flat not in self._exchanges:
            self._exchanges[flat] = Exchange(self._held.get(flat, []), self._group(), self._device)
        return self._exchanges[flat]

    def _orthogonal(self, matrix: torch.Tensor) -> torch.Tensor:
        return newton_schulz(matrix, self._dtype).to(matrix.dtype) * (RMS * math.sqrt(max(matrix.shape)))
