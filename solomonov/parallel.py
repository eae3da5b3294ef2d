"""Which layouts are legal: ZeRO stage, pipeline, offload, precision and ranks, before anything is allocated."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from solomonov.errors import ConfigurationError
from solomonov.model.config import ModelConfig
from solomonov.section import Section

Offload = Literal["none", "optimizer", "parameters"]
"""What a rank keeps in its machine's memory instead of its device's."""

LIVE_PARAMETERS = 10**9
"""At stage 3, parameters that are kept whole on a rank because they are needed again soon."""


def bucket_elements(parameters: int) -> int:
    """Gradients that are reduced together, by the number of parameters of the model: at most 512 MiB in fp32.

    DeepSpeed's own buckets have 5e8 elements whatever the model, which is 2 GB each.
    """
    return min(2**27, parameters)


class ParallelConfig(Section):
    """How parameters, gradients and optimizer state are laid out over the ranks."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed partitions over the data-parallel ranks: 0 nothing, 1 optimizer state, 2 and gradients,
    3 and parameters."""
    pipeline: int = Field(default=1, ge=1)
    """Pipeline stages: each holds consecutive layers; the ranks of one stage are data-parallel."""
    sequence: int = Field(default=1, ge=1)
    """Ranks that share each row (sequence parallelism, Ulysses): each has its run of the tokens, and in attention all
    tokens for its part of the heads. For rows so long that one does not fit, or fewer rows than ranks."""
    offload: Offload = "none"
    """What lives in the memory of the rank's machine instead of its device's: `optimizer`: masters, moments and their
    update (with zero_stage 1, 2 or 3); `parameters`: these and the parameters between two uses (with zero_stage 3).
    Each update then waits for the bus and for the machine's own cores: for models that fit in no other way."""


def overlaps(parallel: ParallelConfig, precision: str) -> bool:
    """Whether gradients are reduced beside the backward pass, on devices that can do both at once: in a stream of its
    own, while a second buffer is filled. DeepSpeed's pipeline excludes it; at stage 0, and at stage 1 with bf16 where
    nothing is offloaded, its optimizers reduce after the backward pass.

    Args:
        precision: resolved: fp32, bf16 or bf16_autocast.
    """
    if parallel.pipeline > 1 or parallel.zero_stage == 0:
        return False
    return parallel.zero_stage > 1 or precision != "bf16" or parallel.offload != "none"


def check_layout(
    parallel: ParallelConfig, *, precision: str, world: int, model: ModelConfig, sequence_tokens: int
) -> int:
    """Copies of the model that train on different rows, in a legal layout.

    Args:
        precision: the resolved precision: fp32, bf16 or bf16_autocast.
        world: number of ranks.
        model: its layers, of all stacks, embedding and head not counted, are spread over a pipeline, its heads over
            ranks that share rows.
        sequence_tokens: of a row.

    Raises:
        ConfigurationError: the layout is illegal; the message names the nearest legal one.
    """
    if parallel.sequence > 1:
        _check_sequence(parallel, world=world, model=model, sequence_tokens=sequence_tokens)
    refusal = offload_refusal(parallel)
    if refusal is not None:
        raise refusal
    if parallel.pipeline > 1:
        _check_pipeline(parallel, precision=precision, world=world, layers=model.block_count)
    if precision == "bf16" and parallel.zero_stage == 0:
        raise ConfigurationError(
            "bf16 parameters need ZeRO stage 1 or higher",
            got=f"parallel.zero_stage: 0 with precision {precision}",
            rule="at stage 0 DeepSpeed takes a hidden optimizer step at start, which changes the run's numbers",
            remedy="set parallel.zero_stage to 1 (right on one rank as well), or training.precision to"
            f" {'bf16_autocast' if parallel.pipeline == 1 else 'fp32'}",
        )
    return world // (parallel.pipeline * parallel.sequence)


def _check_sequence(parallel: ParallelConfig, *, world: int, model: ModelConfig, sequence_tokens: int) -> None:
    ranks, heads = parallel.sequence, model.heads
    if model.architecture == "encoder_decoder":
        raise ConfigurationError(
            "rows with a source are not shared",
            got=f"parallel.sequence: {ranks} with model.architecture: {model.architecture}",
            rule="ranks that share a row have a run of its tokens each, which attend to one another; those of a decoder"
            " behind an encoder also attend to a row of another length",
            remedy="set parallel.sequence to 1; where rows do not fit, parallel.pipeline to as many as it was, or"
            " training.activation_checkpointing to full",
        )
    if parallel.pipeline > 1:
        raise ConfigurationError(
            "a pipeline does not share rows",
            got=f"parallel.sequence: {ranks} with parallel.pipeline: {parallel.pipeline}",
            rule="what travels between pipeline stages is whole rows",
            remedy="set parallel.pipeline to 1, or parallel.sequence to 1",
        )
    for count, what in ((world, "the ranks"), (heads, "model.heads"), (sequence_tokens, "data.sequence_tokens")):
        if count % ranks:
            common = math.gcd(world, heads, sequence_tokens)
            legal = [size for size in range(1, common + 1) if common % size == 0]
            raise ConfigurationError(
                f"parallel.sequence does not divide {what}",
                got=f"parallel.sequence: {ranks}; {world} ranks, {heads} heads, rows of {sequence_tokens} tokens",
                rule="ranks that share a row have equally many of its tokens, and of the heads in attention",
                remedy=f"set parallel.sequence to {min(legal, key=lambda size: (abs(size - ranks), size))}",
            )


def offload_refusal(parallel: ParallelConfig) -> ConfigurationError | None:
    """Why what is to be offloaded cannot be in this layout, with the nearest legal one; None: it can."""
    stage, offload = parallel.zero_stage, parallel.offload
    if offload == "parameters" and parallel.pipeline > 1:
        return ConfigurationError(
            "a pipeline does not offload parameters",
            got=f"parallel.offload: parameters with parallel.pipeline: {parallel.pipeline}",
            rule="DeepSpeed offloads parameters at ZeRO stage 3 only, and its pipeline excludes stage 3",
            remedy="set parallel.offload to optimizer and parallel.zero_stage to 1"
            + (", or parallel.pipeline to 1" if stage == 3 else ""),
        )
    if offload == "parameters" and stage != 3:
        return ConfigurationError(
            "offloaded parameters need ZeRO stage 3",
            got=f"parallel.offload: parameters with parallel.zero_stage: {stage}",
            rule="below stage 3 each rank's device holds all parameters at all times",
            remedy=f"set parallel.zero_stage to 3{', or parallel.offload to optimizer' if stage else ''}",
        )
    if offload == "optimizer" and stage == 0:
        return ConfigurationError(
            "an offloaded optimizer needs ZeRO stage 1 or higher",
            got=f"parallel.offload: {offload} with parallel.zero_stage: {stage}",
            rule="at stage 0 the parameters themselves are the masters, and DeepSpeed moves none of them",
            remedy="set parallel.zero_stage to 1 (right on one rank as well), or parallel.offload to none",
        )
    return None


def _check_pipeline(parallel: ParallelConfig, *, precision: str, world: int, layers: int) -> None:
    stages = parallel.pipeline
    if parallel.zero_stage > 1:
        raise ConfigurationError(
            "a pipeline needs ZeRO stage 1 or 0",
            got=f"parallel.zero_stage: {parallel.zero_stage} with parallel.pipeline: {stages}",
            rule="DeepSpeed's pipeline excludes stages 2 and 3",
            remedy="set parallel.zero_stage to 1",
        )
    if precision == "bf16_autocast":
        raise ConfigurationError(
            "a pipeline does not autocast",
            got=f"training.precision: {precision} with parallel.pipeline: {stages}",
            rule="what travels between pipeline stages has the parameters' own type",
            remedy="set training.precision to bf16 or fp32",
        )
    legal = [count for count in range(1, min(world, layers) + 1) if world % count == 0]
    if stages > layers:
        raise ConfigurationError(
            "there are more pipeline stages than layers",
            got=f"parallel.pipeline: {stages}, layers of all stacks: {layers}",
            rule="each stage holds at least one layer, and the same number of ranks",
            remedy=f"set parallel.pipeline to {legal[-1]}",
        )
    if world % stages:
        nearest = min(legal, key=lambda count: (abs(count - stages), count))
        raise ConfigurationError(
            "the pipeline does not divide the ranks",
            got=f"parallel.pipeline: {stages} on {world} ranks",
            rule="each stage has the same number of ranks",
            remedy=f"set parallel.pipeline to {nearest}, or use {max(1, world // stages) * stages} ranks",
        )
