"""How much memory a rank needs in a layout, worked out without allocating any of it.

Weights, gradients and optimizer state follow from how DeepSpeed lays them out; what is kept for the backward pass is
counted (see `activations`). The tests hold the sum against all that was really allocated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod

from solomonov.activations import Held, activations
from solomonov.model.config import NOTHING_AGAIN, ModelConfig, Recompute
from solomonov.model.counts import parameter_count, parameter_shapes
from solomonov.model.naming import is_hidden_matrix, layer_names, layer_of
from solomonov.parallel import LIVE_PARAMETERS, ParallelConfig, bucket_elements, overlaps
from solomonov.plan import BatchPlan
from solomonov.topology import stage_bounds

STAGE_0_BUCKET_ELEMENTS = 5 * 10**8
"""Gradients that DeepSpeed reduces together at stage 0, whatever its configuration says."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank at the moment of a step at which they are the most."""

    moment: str
    """The backward pass of the `head`, that of the last or first `block`, the last `reduction`, or the `update`."""
    weights: int
    """Parameters in the type that computes."""
    gradients: int
    """As far as they are there at that moment."""
    optimizer: int
    """Masters, moments, and the moving average of the weights."""
    buffers: int
    """For communication, or of the update."""
    activations: int
    """Kept for the backward pass, and what it works with."""
    host: int = 0
    """In the memory of the rank's machine, at all moments: what is offloaded, and what it travels through."""

    @property
    def total(self) -> int:
        """All of them on the device."""
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations


@dataclass(frozen=True)
class Training:
    """What else decides how much memory is needed."""

    precision: str
    """Resolved: fp32, bf16 or bf16_autocast."""
    recompute: Recompute = NOTHING_AGAIN
    """What the backward pass computes again."""
    ema: bool = False
    """A moving average of the weights is kept."""
    muon: bool = False
    """Muon updates the matrices between embedding and head."""
    overlap: bool = False
    """The device can reduce gradients beside the backward pass: where the layout does so, one buffer is filled while
    another one is reduced."""


def footprint(
    model: ModelConfig,
    vocab_size: int,
    plan: BatchPlan,
    parallel: ParallelConfig,
    training: Training,
) -> Footprint:
    """What the rank that needs the most needs.

    Args:
        plan: the batch and its cut, for the number of data-parallel ranks of this layout.
        parallel: a legal layout.
    """
    precision, recompute = training.precision, training.recompute
    bounds = stage_bounds(model, vocab_size, plan.sequence_tokens, parallel.pipeline, plan.source_tokens)
    names = layer_names(model)
    bucket = 4 * bucket_elements(parameter_count(model, vocab_size))
    sizes, of_muon, largest_matrix = dict.fromkeys(names, 0), dict.fromkeys(names, 0), 0
    for name, shape in parameter_shapes(model, vocab_size).items():
        layer = layer_of(name, names)
        sizes[layer] += prod(shape)
        if training.muon and is_hidden_matrix(name, shape):
            of_muon[layer] += prod(shape)
            largest_matrix = max(largest_matrix, prod(shape))
    if model.tie_embeddings and parallel.pipeline > 1:
        sizes["head"] += vocab_size * model.d_model  # a copy of the matrix on the last stage
    moments = []
    for stage, (begin, end) in enumerate(pairwise(bounds)):
        held_parameters = sum(sizes[name] for name in names[begin:end])
        matrices = sum(of_muon[name] for name in names[begin:end])
        state = _state(
            _Numbers(held_parameters, matrices, largest_matrix, 16 if training.ema else 12), parallel, plan, precision
        )
        if parallel.offload != "none":
            state = _offloaded(state, held_parameters, max(sizes.values()), parallel, plan, precision)
        in_flight = min(plan.accumulation, parallel.pipeline - stage)
        head, last_block, first_block = activations(
            Held(model, vocab_size, plan, parallel, names, begin, end, in_flight, precision, recompute)
        )
        # Gradients come one by one; where they are accumulated, or have a place of their own, all are there before.
        early = state.gradients if state.early or plan.accumulation > 1 else 0
        during = bucket if parallel.zero_stage else 0
        if training.overlap and parallel.zero_stage < 3 and overlaps(parallel, precision):
            during *= 2  # at stage 3 both are always there
        # At stages 1 and 2 the bucket is made for the first gradient, when the head is done. At stage 1 it then stays
        # for the micro-batches that follow.
        plain = precision != "bf16" and parallel.pipeline == 1 and parallel.offload == "none"
        stays = parallel.zero_stage == 3 or (parallel.zero_stage == 1 and plan.accumulation > 1 and plain)
        at = [("head", early, during if stays else 0, head)]
        at += [("block", early, during, last_block), ("block", state.gradients, during, first_block)]
        at.append(("update", state.gradients, state.update, 0))
        at.append(("reduction", state.gradients, _reduction(parallel, plan, state, bucket), 0))
        moments += [
            Footprint(
                moment, state.weights, gradients, state.optimizer, buffers + state.passage, activations, state.host
            )
            for moment, gradients, buffers, activations in at
        ]
    return max(moments, key=lambda footprint: footprint.total)


def _reduction(parallel: ParallelConfig, plan: BatchPlan, state: _State, bucket: int) -> int:
    """Bytes beside the gradients while the last of them are reduced, when no activation is left."""
    if parallel.zero_stage == 0:
        return min(state.gradients, 4 * STAGE_0_BUCKET_ELEMENTS) if sharers(plan, parallel) > 1 else 0
    # At stage 3 a bucket is copied in the order of its owners, and that is reduced into another one.
    return 3 * bucket if parallel.zero_stage == 3 else bucket


@dataclass(frozen=True)
class _State:
    """Bytes of what does not depend on the rows."""

    weights: int
    gradients: int
    early: bool
    """The gradients have their place from the start."""
    optimizer: int
    update: int
    """Of the update alone."""
    exchange: int = 0
    """Of that, what is on the device also where the update is not."""
    passage: int = 0
    """Through which gradients leave the device."""
    host: int = 0
    """Not on the device."""


def sharers(plan: BatchPlan, parallel: ParallelConfig) -> int:
    """Ranks over which ZeRO partitions a stage's state, and which reduce its gradients together: data-parallel ones,
    and those that share rows."""
    return plan.data_parallel * parallel.sequence


@dataclass(frozen=True)
class _Numbers:
    """How many parameters a pipeline stage has."""

    parameters: int
    matrices: int
    """Those of them that Muon updates: it has one moment, AdamW two."""
    largest_matrix: int
    kept: int
    """Bytes of another parameter's master, moments and average."""

    @property
    def kept_bytes(self) -> int:
        """Of all."""
        return self.kept * self.parameters - 4 * self.matrices


def _state(numbers: _Numbers, parallel: ParallelConfig, plan: BatchPlan, precision: str) -> _State:
    """4 bytes a number, but for bf16 weights, which have 2."""
    parameters, ranks = numbers.parameters, sharers(plan, parallel)
    stage, share, width = parallel.zero_stage, math.ceil(parameters / ranks), 2 if precision == "bf16" else 4
    if stage == 0:  # Muon takes one matrix at a time
        moments = numbers.kept_bytes - 4 * parameters
        return _State(4 * parameters, 4 * parameters, False, moments, 16 * numbers.largest_matrix)
    # Of the matrices that Muon updates: the update; pieces that came, the whole ones, pieces that go back and return.
    exchanged = 20 * math.ceil(numbers.matrices / ranks)
    whole = stage == 1 and (plan.accumulation > 1 or precision == "bf16")
    return _State(
        # At stage 3 what was gathered for one layer stays while it is needed again soon.
        weights=width * (share + min(parameters, LIVE_PARAMETERS) if stage == 3 else parameters),
        gradients=4 * (parameters if whole else share),
        early=stage == 3 or (stage == 1 and precision == "bf16"),
        optimizer=math.ceil(numbers.kept_bytes / ranks),
        # The gradients in one piece; AdamW's two temporary results beside them where its kernel is not fused.
        update=4 * share + max(exchanged, 8 * math.ceil((parameters - numbers.matrices) / ranks)),
        exchange=exchanged,
    )


def _offloaded(
    state: _State, parameters: int, largest: int, parallel: ParallelConfig, plan: BatchPlan, precision: str
) -> _State:
    """The same with optimizer, or parameters as well, on the host, as DeepSpeed 0.19 has it there.

    Args:
        parameters: of this pipeline stage.
        largest: numbers in the largest layer, of which a buffer holds the largest tensor.
    """
    share, width = math.ceil(parameters / sharers(plan, parallel)), 2 if precision == "bf16" else 4
    host = state.optimizer + 4 * share  # masters, moments, average, and a gradient for each
    if parallel.zero_stage == 3:
        host += 4 * share  # the reduced gradients, before they are copied to those
        weights = state.weights
        if parallel.offload == "parameters":
            host += width * share
            weights -= width * share
        return replace(state, weights=weights, gradients=0, optimizer=0, update=state.exchange, host=host)
    host += width * (share + largest)  # weights on their way back, and gradients on theirs
    passage = width * largest
    if plan.accumulation > 1 and precision != "bf16" and parallel.pipeline == 1:
        whole_tensors = 4 * (share + largest)
        if parallel.zero_stage == 2:
            host += whole_tensors  # accumulated there
        else:
            passage += whole_tensors  # of the reduction before, beside those that are accumulated
    return replace(state, early=False, optimizer=0, update=state.exchange, passage=passage, host=host)
