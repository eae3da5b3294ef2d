"""What blocks, norms and head keep for the backward pass, counted by running them on tensors that have shapes and no
data, so that the count is that of the code which trains."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from solomonov.model.attention import SequenceShare, attend, attention_context, layer_contexts
from solomonov.model.attention_config import LayerAttention
from solomonov.model.config import ModelConfig, Recompute
from solomonov.model.cross import Memory, memory_of
from solomonov.model.front import Front, example
from solomonov.model.layers import Block, Embedding, FinalNorm, Head, Stream
from solomonov.model.pipeline import BlockStage, Carry
from solomonov.model.residual import BranchForm, branch_form, mixes_values
from solomonov.model.stacks import Stack, block_number, stack_of
from solomonov.parallel import ParallelConfig
from solomonov.plan import BatchPlan


class Allocated(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that are made while it is active: now, and at most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not size:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Working:
    """Bytes that a piece of the model needs for one micro-batch."""

    kept: int
    """From its forward pass until its backward pass has come."""
    backward: int
    """Beyond these, at most, while its backward pass runs."""


def _working(precision: str, make: Callable[[torch.dtype], Callable[[], Tensor]]) -> Working:
    """Forward and backward of what is made, on tensors without data."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with FakeTensorMode(), Allocated() as allocated:
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            forward = make(dtype)
        finally:
            torch.set_default_dtype(default)
        before = allocated.now
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16_autocast"):
            output = forward()
        kept = allocated.now - before
        gradient = torch.ones_like(output)
        allocated.peak = allocated.now
        output.backward(gradient)  # type: ignore[no-untyped-call]
        return Working(kept, allocated.peak - before - kept)


@dataclass(frozen=True)
class Rows:
    """A micro-batch."""

    count: int
    tokens: int
    """Of each."""
    source_tokens: int | None = None
    """Of the source of each; None: there is none."""

    def read_by(self, stack: Stack) -> int:
        """Tokens of a row that a stack reads."""
        if stack.prefix:
            assert self.source_tokens is not None, "an encoder before a decoder reads a source"
            return self.source_tokens
        return self.tokens


def _memory(config: ModelConfig, rows: Rows, documents: Tensor, dtype: torch.dtype) -> Memory | None:
    """What a decoder's blocks look at of the source, if there is one."""
    if rows.source_tokens is None:
        return None
    hidden = torch.zeros(rows.count, rows.source_tokens, config.d_model, dtype=dtype, requires_grad=True)
    return memory_of(hidden, documents.new_zeros(rows.count, rows.source_tokens), documents)


@cache
def block_working(
    config: ModelConfig,
    rows: Rows,
    precision: str,
    *,
    name: str = "layers.0",
    selective: bool = False,
    staged: bool = False,
    ranks: int = 1,
) -> Working:
    """Of one block, gradients of its parameters included.

    Args:
        name: of the block.
        selective: whether it keeps only products (see `model.recompute`).
        staged: whether it is one of a pipeline, where each makes masks and tables for itself.
        ranks: that share each row, of which this is one.
    """
    stack, index = stack_of(config, name), block_number(name)
    assert index is not None, f"{name} is no block"
    tokens = rows.read_by(stack)

    def make(dtype: torch.dtype) -> Callable[[], Tensor]:
        documents = torch.zeros(rows.count, tokens, dtype=torch.int32)
        hidden = torch.zeros(rows.count, tokens // ranks, config.d_model, dtype=dtype, requires_grad=True)
        stream: Stream = (hidden,)
        if mixes_values(config, index):
            values = config.kv_head_count * config.head_width
            stream += (torch.zeros(*hidden.shape[:2], values, dtype=dtype, requires_grad=True),)
        memory = _memory(config, rows, documents, dtype) if stack.crossed else None
        if staged:
            stage = BlockStage(config, index, name, 0, selective)
            carry: Carry = (*stream, documents)
            if memory is not None and memory.hidden is not None:
                carry = (memory.hidden, documents.new_zeros(memory.hidden.shape[:2]), *carry)
            return lambda: stage.hidden_of(stage(carry))
        block = Block(config, index, stack, selective=selective)
        context = attention_context(documents, config, index, share=_share(ranks), stack=stack)
        return lambda: block.hidden_of(block(stream, context, None, memory))

    return _working(precision, make)


def _share(ranks: int) -> SequenceShare | None:
    """A share of rows by whose exchange there are as many numbers as after a real one."""

    def exchanged(query: Tensor, key: Tensor, value: Tensor, _: int, **options: Any) -> Tensor:
        def here(x: Tensor) -> Tensor:
            return x.reshape(x.shape[0], x.shape[1] * ranks, x.shape[2] // ranks, x.shape[3])

        return attend(here(query), here(key), here(value), **options).reshape(query.shape)

    return SequenceShare(0, ranks, exchanged) if ranks > 1 else None


@cache
def contexts_bytes(config: ModelConfig, rows: Rows, ranks: int) -> int:
    """Of the masks and tables that all blocks of a stack share, of all stacks."""
    with FakeTensorMode(), Allocated() as allocated:
        documents = [torch.zeros(rows.count, rows.read_by(stack), dtype=torch.int32) for stack in config.stacks]
        before = allocated.now
        contexts = [
            layer_contexts(ids, config, share=_share(ranks), stack=stack)
            for ids, stack in zip(documents, config.stacks, strict=True)
        ]
        shared = [*contexts, memory_of(None, documents[0], documents[-1]) if config.stacks[-1].crossed else None]
        size: int = allocated.now - before
        assert shared, "they live until they are counted"
        return size


@cache
def front_working(config: ModelConfig, rows: int, tokens: int, precision: str) -> Working:
    """Of what stands before a stack that reads no tokens, for `tokens` tokens of these a row; what it reads itself,
    like token ids, is not counted."""

    def make(dtype: torch.dtype) -> Callable[[], Tensor]:
        front, read = Front(config), example(config.front, rows, tokens, torch.Generator())
        return lambda: front(*read)[0]

    return _working(precision, make)


@cache
def embedding_kept(config: ModelConfig, vocab_size: int, rows: int, tokens: int, precision: str) -> int:
    """Bytes that the embedding keeps of so many rows and tokens of each, what it gives included."""

    def make(dtype: torch.dtype) -> Callable[[], Tensor]:
        embedding, ids = Embedding(config, vocab_size), torch.zeros(rows, tokens, dtype=torch.int64)
        return lambda: embedding(ids, embedding.positions_of(ids))

    return _working(precision, make).kept


@cache
def head_working(config: ModelConfig, vocab_size: int, tokens: int, precision: str) -> Working:
    """Of head and loss on `tokens` tokens, the gradient of the head included."""

    def make(dtype: torch.dtype) -> Callable[[], Tensor]:
        hidden = torch.zeros(tokens, config.d_model, dtype=dtype, requires_grad=True)
        head, labels = Head(config, vocab_size), torch.zeros(tokens, dtype=torch.int64)
        return lambda: head(hidden, labels)

    return _working(precision, make)


@cache
def norm_kept(config: ModelConfig, tokens: int, precision: str) -> int:
    """Bytes that the norm behind a stack keeps of so many tokens, what it gives included."""

    def make(dtype: torch.dtype) -> Callable[[], Tensor]:
        norm, hidden = FinalNorm(config), torch.zeros(tokens, config.d_model, dtype=dtype, requires_grad=True)
        return lambda: norm(hidden)

    return _working(precision, make).kept


@dataclass(frozen=True)
class Held:
    """Layers of one rank, and what of them is there at once."""

    model: ModelConfig
    vocab_size: int
    plan: BatchPlan
    parallel: ParallelConfig
    names: Sequence[str]
    """Of all layers of the model."""
    begin: int
    """The rank has those from this one up to, not including, `end`."""
    end: int
    in_flight: int
    """Micro-batches whose backward pass has not come, at most."""
    precision: str
    recompute: Recompute

    @property
    def rows(self) -> Rows:
        """A micro-batch."""
        return Rows(self.plan.micro_rows, self.plan.sequence_tokens, self.plan.source_tokens)

    @property
    def layers(self) -> Sequence[str]:
        """Those of this rank."""
        return self.names[self.begin : self.end]

    def tokens(self, stack: Stack) -> int:
        """Of a micro-batch that this rank has in a stack."""
        return self.rows.count * self.rows.read_by(stack) // self.parallel.sequence

    def _bytes(self, stack: Stack, width: int) -> int:
        return self.tokens(stack) * width * (2 if self.precision == "bf16" else 4)

    def stream(self, stack: Stack) -> int:
        """Bytes of the hidden of a stack."""
        return self._bytes(stack, self.model.d_model)

    def values(self, stack: Stack) -> int:
        """Bytes of the values of a stack's first block, where those behind it add them to their own."""
        return self._bytes(stack, self.model.kv_head_count * self.model.head_width) if self.model.value_residual else 0

    def blocks(self, stack: Stack) -> list[str]:
        """Those of a stack."""
        return [name for name in self.layers if block_number(name) is not None and stack_of(self.model, name) == stack]


def activations(held: Held) -> tuple[int, int, int]:
    """Bytes while the backward pass of the head runs, that of a rank's last group of blocks, and that of its first.

    A group is what one input is kept for: a single block, but where several of a stack are computed again together.
    """
    model = held.model
    groups = [group for stack in model.stacks for group in _groups(held, stack)]
    of_blocks = sum(group.kept for group in groups)
    first, last = (groups[0], groups[-1]) if groups else (Working(0, 0), Working(0, 0))
    head = Working(0, 0)
    if "head" in held.layers:
        head = head_working(model, held.vocab_size, held.tokens(model.stacks[-1]), held.precision)
    between, shared = _between(held)
    all_kept = held.in_flight * (of_blocks + between) + shared
    of_others = all_kept - of_blocks
    return all_kept + head.kept + head.backward, all_kept + last.backward, of_others + first.kept + first.backward


def _groups(held: Held, stack: Stack) -> list[Working]:
    """What is kept of one input each, of the blocks of a stack."""
    full = held.recompute.mode == "full"
    blocks, size = held.blocks(stack), held.recompute.every if full else 1
    groups = []
    for begin in range(0, len(blocks), size):
        workings = [
            block_working(
                held.model,
                held.rows,
                held.precision,
                name=_first_alike(held.model, block),
                selective=held.recompute.mode == "selective",
                staged=held.parallel.pipeline > 1,
                ranks=held.parallel.sequence,
            )
            for block in blocks[begin : begin + size]
        ]
        # Run again, they keep what they would have kept without.
        kept, backward = sum(block.kept for block in workings), max(block.backward for block in workings)
        groups.append(Working(held.stream(stack), kept + backward) if full else Working(kept, backward))
    if full and blocks and block_number(blocks[0]) == 0:
        groups[0] = replace(groups[0], kept=groups[0].kept + held.values(stack))
    return groups


def _between(held: Held) -> tuple[int, int]:
    """Bytes that are kept beside blocks and head: of each micro-batch, and once.

    What the embedding gives, or what came from the stage before, which DeepSpeed copies; what goes on to the stage
    behind. Through one buffer each comes the next of it, and its gradients. Where blocks are computed again, their
    inputs are counted with them, and not what the last one of a stack gives: as much as its first one's input, which is
    counted here.
    """
    model = held.model
    streams = [held.stream(stack) for stack in model.stacks]
    came = streams if held.begin == 0 else 2 * _carried(held, held.begin)
    norms = [name for name in held.layers if name.endswith("final_norm")]
    kept = sum(came) + sum(norm_kept(model, held.tokens(stack_of(model, name)), held.precision) for name in norms)
    if "front" in held.layers:
        reads = model.stacks[0]
        front = front_working(model, held.rows.count, held.rows.read_by(reads), held.precision)
        kept += front.kept - held.stream(reads)  # what it gives is what came
    if "embedding" in held.layers:
        for stack in model.stacks:
            if stack.causal or model.front.kind == "tokens":
                rows, tokens = held.rows.count, held.rows.read_by(stack) // held.parallel.sequence
                kept += embedding_kept(model, held.vocab_size, rows, tokens, held.precision) - held.stream(stack)
    goes = _carried(held, held.end)
    if held.parallel.pipeline == 1:
        return kept, contexts_bytes(model, held.rows, held.parallel.sequence)
    return kept, sum(goes) + sum(_carried(held, held.begin))


def _carried(held: Held, layer: int) -> list[int]:
    """Bytes of the streams that travel to a layer from the stage before; behind the last block the source's does not,
    and none comes to the first layer."""
    if not 0 < layer < len(held.names):
        return []
    *of_source, stack = held.model.stacks
    is_behind = not any(block_number(name) is not None for name in held.names[layer:])
    streams = [held.stream(each) for each in ([] if is_behind else of_source)] + [held.stream(stack)]
    for each in held.model.stacks:
        before = [name for name in held.names[:layer] if block_number(name) is not None]
        if 0 < sum(stack_of(held.model, name) == each for name in before) < each.layers:
            streams.append(held.values(each))
    return streams


def _first_alike(model: ModelConfig, name: str) -> str:
    """The first block of the same stack and kind as one; the factor c apart, of which nothing is kept."""
    stack, index = stack_of(model, name), block_number(name)

    def kind(of: int) -> tuple[LayerAttention, BranchForm, bool]:
        form = replace(branch_form(model, of, stack), inner=0.0)
        return model.layer_attention(of, stack), form, mixes_values(model, of)

    assert index is not None, f"{name} is no block"
    return f"{stack.prefix}layers.{next(other for other in range(stack.layers) if kind(other) == kind(index))}"
