"""The legal layouts of a configuration on so many ranks. Imports no torch: it is asked before anything is started."""

from __future__ import annotations

import math
from collections.abc import Iterator

from solomonov.config import Config
from solomonov.errors import ConfigurationError
from solomonov.parallel import ParallelConfig, check_layout, offload_refusal
from solomonov.plan import BatchPlan, plan_batch


def candidates(config: Config, world: int) -> Iterator[ParallelConfig]:
    """What `parallel: auto` considers, legal or not, plainest first: ZeRO stages, pipelines that divide the ranks."""
    for stages in range(1, min(world, config.model.block_count) + 1):
        if world % stages == 0:
            for zero_stage in (0, 1, 2, 3):
                yield ParallelConfig.model_validate({"zero_stage": zero_stage, "pipeline": stages})


def sequence_candidates(config: Config, world: int) -> Iterator[ParallelConfig]:
    """What `parallel: auto` considers where none of those fits, plainest first: so many ranks to a row as divide ranks,
    heads and tokens."""
    most = math.gcd(world, config.model.heads, config.data.sequence_tokens)
    for ranks in range(2, most + 1):
        if most % ranks == 0:
            for zero_stage in (0, 1, 2, 3):
                yield ParallelConfig.model_validate({"zero_stage": zero_stage, "sequence": ranks})


def offloaded_candidates(config: Config, world: int) -> Iterator[ParallelConfig]:
    """What `parallel: auto` considers where none of those fits, plainest first: each with what can be offloaded."""
    for offload in ("optimizer", "parameters"):
        for parallel in candidates(config, world):
            changed = parallel.model_copy(update={"offload": offload})
            if not offload_refusal(changed):
                yield changed


def batch_of(config: Config, parallel: ParallelConfig, *, precision: str, world: int) -> BatchPlan:
    """The batch in a layout.

    Raises:
        ConfigurationError: layout or batch is illegal on so many ranks.
    """
    tokens = config.data.sequence_tokens
    return _plan(
        config, check_layout(parallel, precision=precision, world=world, model=config.model, sequence_tokens=tokens)
    )


def one_copy(config: Config) -> BatchPlan:
    """The batch for one copy of the model: what of it is the same in all layouts.

    Raises:
        ConfigurationError: it is illegal in every layout.
    """
    return _plan(config, 1)


def _plan(config: Config, copies: int) -> BatchPlan:
    """The batch for so many copies of the model; rows of the source are as long as those of the target."""
    tokens = config.data.sequence_tokens
    source = tokens if config.model.architecture == "encoder_decoder" else None
    training, schedule = config.training, config.schedule
    return plan_batch(training, schedule, sequence_tokens=tokens, data_parallel=copies, source_tokens=source)


def legal_batch(config: Config, *, precision: str, world: int) -> BatchPlan:
    """The batch in the configured layout, or with `parallel: auto` in the plainest legal one.

    Raises:
        ConfigurationError: there is no legal one; the message is that of the configured one, or of ZeRO 1.
    """
    if config.parallel is not None:
        return batch_of(config, config.parallel, precision=precision, world=world)
    for parallel in [*candidates(config, world), *sequence_candidates(config, world)]:
        try:
            return batch_of(config, parallel, precision=precision, world=world)
        except ConfigurationError:
            continue
    return batch_of(config, ParallelConfig(), precision=precision, world=world)
