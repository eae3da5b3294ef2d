"""Which stacks of blocks an architecture has, and what a block of each does. Imports no torch.

| architecture    | stack, names of its blocks          | branches of a block                        |
|-----------------|-------------------------------------|--------------------------------------------|
| decoder         | decoder, `layers.i`                 | attention, feed_forward                    |
| encoder         | encoder, `layers.i`                 | attention of all to all, feed_forward      |
| encoder_decoder | encoder, `encoder.layers.i`         | attention of all to all, feed_forward      |
|                 | decoder, `layers.i`                 | attention, cross_attention, feed_forward   |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from solomonov.model.config import ModelConfig

Architecture = Literal["decoder", "encoder", "encoder_decoder"]


@dataclass(frozen=True)
class Stack:
    """Blocks one after the other, all of the same branches."""

    layers: int
    """How many blocks."""
    causal: bool = True
    """Whether a token sees only those before it, and itself."""
    crossed: bool = False
    """Whether a block also looks at what an encoder made of the source."""
    prefix: str = ""
    """In front of `layers.i` in the names of its blocks, and of `final_norm`."""

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the branches of each block, in order."""
        return ("attention", "cross_attention", "feed_forward") if self.crossed else ("attention", "feed_forward")

    @property
    def sublayers(self) -> int:
        """How many branches all its blocks have together."""
        return self.layers * len(self.branches)


def stacks_of(config: ModelConfig) -> tuple[Stack, ...]:
    """The stacks in the order in which they run; the last one's blocks are `layers.i`."""
    if config.architecture == "encoder_decoder":
        encoder = Stack(config.encoder_depth, causal=False, prefix="encoder.")
        return encoder, Stack(config.layers, crossed=True)
    return (Stack(config.layers, causal=config.architecture == "decoder"),)


def stack_of(config: ModelConfig, name: str) -> Stack:
    """The stack that a layer or a parameter belongs to; of what is in none, as the head, the last one.

    Args:
        name: canonical name.
    """
    stacks = stacks_of(config)
    return next((stack for stack in stacks if stack.prefix and name.startswith(stack.prefix)), stacks[-1])


def block_number(name: str) -> int | None:
    """Number, from 0 in its stack, of the block that a layer is or a parameter belongs to; None: to no block.

    Args:
        name: canonical name.
    """
    parts = name.removeprefix("encoder.").split(".")
    return int(parts[1]) if len(parts) > 1 and parts[0] == "layers" and parts[1].isdecimal() else None


def block_place(config: ModelConfig, name: str) -> int | None:
    """As `block_number`, counted through all stacks in the order in which they run.

    Args:
        name: canonical name.
    """
    number, stacks = block_number(name), stacks_of(config)
    if number is None:
        return None
    return number + sum(stack.layers for stack in stacks[: stacks.index(stack_of(config, name))])
