"""Whether a signal passes through all layers, and whether all are used: measured on one batch, at any weights.

Four numbers that each told in advance, or afterwards, which deep models do not train: the size of the stream after
each block, how far a block turns it, the gradient of each block, and by how much the loss rises when
an eighth of the blocks is passed by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from solomonov.model.cross import Source
from solomonov.model.layers import Block, Stream
from solomonov.model.transformer import Transformer

EIGHTHS = 8


@dataclass(frozen=True)
class Signal:
    """What one forward and one backward pass found."""

    loss: float
    """Mean cross-entropy in nats."""

    stream_rms: tuple[float, ...]
    """Root mean square of the residual stream: behind the embedding, and behind each of the L blocks. Of an
    encoder_decoder these are the encoder's and then the decoder's, whose stream begins anew with the target."""

    cosines: tuple[float, ...]
    """Mean cosine of a token's vector before and after each block: 1 where a block turns nothing."""

    gradient_norms: tuple[float, ...]
    """L2 norm of the gradient of all parameters of each block together."""

    depths: tuple[int, ...] | None = None
    """Blocks of each stack; None: there is one."""

    @property
    def stacks(self) -> list[range]:
        """Which blocks each stack has. Gradients of two stacks are not alike: an encoder gets only what comes through
        cross-attention, which at the initial values looks at all of the source alike."""
        ends = list(accumulate(self.depths or (len(self.gradient_norms),)))
        return [range(begin, end) for begin, end in pairwise([0, *ends])]

    @property
    def gradient_ratio(self) -> float:
        """Gradient of the first block over that of the last; of two stacks that which is further from 1."""
        least, norms = torch.finfo(torch.float32).tiny, self.gradient_norms
        ratios = [norms[stack[0]] / max(norms[stack[-1]], least) for stack in self.stacks]
        return max(ratios, key=lambda ratio: max(ratio, 1.0 / max(ratio, least)))

    @property
    def growth(self) -> float:
        """Stream behind the last block over that behind the embedding; of two stacks the larger one's."""
        return max(self.stream_rms[stack[-1] + 1] for stack in self.stacks) / self.stream_rms[0]


def measure_signal(
    model: Transformer, input_ids: Tensor, document_ids: Tensor, labels: Tensor, source: Source | None = None
) -> Signal:
    """Measure a model as it is, and as it is written where it is compiled; its gradients are those of the mean loss
    afterwards.

    Args:
        input_ids, document_ids, labels: (B, T) integers, as the model takes them; `source` likewise.
    """
    rms: list[float] = []
    cosines: list[float] = []

    def look(_: nn.Module, given: tuple[Any, ...], stream: Stream) -> None:
        before, after = given[0][0].detach().float(), stream[0].detach().float()
        if not rms:
            rms.append(float(before.square().mean().sqrt()))
        rms.append(float(after.square().mean().sqrt()))
        cosines.append(float(functional.cosine_similarity(before, after, dim=-1).mean()))

    model.zero_grad(set_to_none=True)
    with ExitStack() as hooks:
        for block in model.blocks():
            hooks.enter_context(hooked(block, look))
        loss = model(input_ids, document_ids, labels, source=source) / (labels != -100).sum()
        loss.backward()
    norms = []
    for block in model.blocks():
        gradients = [parameter.grad for parameter in block.parameters()]
        squares = [float(gradient.double().square().sum()) for gradient in gradients if gradient is not None]
        norms.append(sum(squares) ** 0.5)
    depths = tuple(stack.layers for stack in model.config.stacks)
    return Signal(float(loss.detach()), tuple(rms), tuple(cosines), tuple(norms), depths)


def eighths(layers: int) -> list[range]:
    """The layers in eight runs that differ by one layer at most; fewer runs where there are fewer layers."""
    parts = min(EIGHTHS, layers)
    return [range(part * layers // parts, (part + 1) * layers // parts) for part in range(parts)]


@contextmanager
def as_written(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, blocks run as they are written: what torch.compile made of them knows nothing of hooks that come later,
    and takes no notice of them. Afterwards the same compiled code runs again."""
    with ExitStack() as stack:
        for block in blocks:
            stack.callback(setattr, block, "_compiled_call_impl", block._compiled_call_impl)
            block._compiled_call_impl = None
        yield


@contextmanager
def hooked(block: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """A forward hook on a block for a while, in which it runs as it is written."""
    with as_written([block]):
        handle = block.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def bypassed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Blocks that hand on the hidden that they are given, as if they were not there; a first block's values as well,
    where those behind it add them to their own."""

    def hand_on(block: nn.Module, given: tuple[Any, ...], stream: Stream) -> Stream:
        assert isinstance(block, Block), f"a {type(block).__name__} was hooked as a block"
        return block.with_hidden(stream, block.hidden_of(given[0]))

    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(hooked(block, hand_on))
        yield


@torch.no_grad()
def skip_eighths(
    model: Transformer, input_ids: Tensor, document_ids: Tensor, labels: Tensor, source: Source | None = None
) -> tuple[float, ...]:
    """By how many nats the mean loss rises when each eighth of the blocks is passed by, first to last.

    Near 0: that eighth is idle. Measured on one batch; see `measure_signal` for the arguments.
    """
    mean = partial(mean_loss, model, input_ids, document_ids, labels, source)
    whole = mean()
    rises = []
    blocks = list(model.blocks())
    for part in eighths(len(blocks)):
        with bypassed(blocks[layer] for layer in part):
            rises.append(mean() - whole)
    return tuple(rises)


@torch.no_grad()
def mean_loss(
    model: Transformer, input_ids: Tensor, document_ids: Tensor, labels: Tensor, source: Source | None = None
) -> float:
    """Mean cross-entropy in nats over the labels that count; see `measure_signal` for the arguments."""
    return float(model(input_ids, document_ids, labels, source=source) / (labels != -100).sum())
