"""The exponential moving average of the weights, of the pieces that a rank owns, in any layout and without a gather.

It lies beside the fp32 masters as AdamW's moments do: for each flat tensor of masters one of the same shape on the
same device, so that a piece has the same place in both (see `partition`). It never touches training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from solomonov.partition import master_flats, refresh_parameters

SWAPPED_ELEMENTS = 1 << 24
"""Elements of masters and average that change places at a time: 64 MiB beside them."""


class WeightAverage:
    """Average a of weights w: a <- d a + (1 - d) w after each update, in fp32.

    Iterate averaging of Polyak and Juditsky (SIAM J. Control Optim. 30, 1992), with weights that fall off
    exponentially, as in `torch.optim.swa_utils.get_ema_multi_avg_fn`. It begins as the weights themselves, so that its
    coefficients sum to 1 from the start and no correction is needed; after n updates those first weights still count
    for d^n.

    Args:
        decay: d, between 0 and 1.
        optimizer: `engine.optimizer` of DeepSpeed, or the torch optimizer at stage 0.
    """

    def __init__(self, decay: float, optimizer: Any) -> None:
        self._decay, self._optimizer = decay, optimizer
        self._of = {flat: flat.detach().clone() for flat, _ in master_flats(optimizer)}

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The average of a flat tensor of masters, which lies like it. KeyError where it is none of this rank's."""
        return self._of[flat]

    def begin(self) -> None:
        """Take the masters as they are for the average."""
        for flat, average in self._of.items():
            average.copy_(flat.detach())

    def update(self) -> None:
        """Take in the masters after an update that was applied."""
        # a + (1 - d)(w - a), and not the two products: 1 - d and d are rounded on their own in fp32, so that these
        # would not sum to 1, and weights at rest would be off by 3e-4 at d = 0.9999.
        masters = [flat.detach() for flat in self._of]
        torch._foreach_lerp_(list(self._of.values()), masters, 1.0 - self._decay)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the forward uses the average; afterwards masters and average are what they were, to the bit. A
        collective. Nothing is put back after an error, which ends the rank: that would wait for the other ones."""
        self._swap()
        yield
        self._swap()

    def _swap(self) -> None:
        for flat, average in self._of.items():
            cuts = (torch.split(tensor.detach().view(-1), SWAPPED_ELEMENTS) for tensor in (flat, average))
            for master, ours in zip(*cuts, strict=True):
                kept = master.clone()
                master.copy_(ours)
                ours.copy_(kept)
        refresh_parameters(self._optimizer)
