"""Which layers form a pipeline stage, and which rank stands where in the grid of stages and replicas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from solomonov.model.config import ModelConfig
from solomonov.model.counts import layer_flops


def stage_bounds(
    model: ModelConfig, vocab_size: int, sequence_tokens: int, stages: int, source_tokens: int | None = None
) -> tuple[int, ...]:
    """Which of the named layers each pipeline stage holds: `balanced_cut` by the operations that a token costs.

    Counted, not timed: two attempts of a run cut alike.

    Args:
        source_tokens: of a row of the source, if there is one.
    """
    return balanced_cut(list(layer_flops(model, vocab_size, sequence_tokens, source_tokens).values()), stages)


def balanced_cut(costs: Sequence[int], stages: int) -> tuple[int, ...]:
    """Cut a row of layers into runs of which the dearest is as cheap as can be.

    Of the cuts that reach that, the one whose last stages are the fullest: the first stage keeps the activations of
    `stages` micro-batches until their backward comes, the last one those of a single one.

    Args:
        costs: of each layer, in order; any unit.
        stages: number of runs, at most as many as layers.

    Returns:
        `stages + 1` indices: stage s holds the layers from bounds[s] up to, not including, bounds[s + 1]; none is
        empty.
    """
    assert 1 <= stages <= len(costs), f"{stages} stages for {len(costs)} layers"
    low, high = max(costs), sum(costs)
    while low < high:
        middle = (low + high) // 2
        if _cut_within(costs, stages, middle) is None:
            low = middle + 1
        else:
            high = middle
    bounds = _cut_within(costs, stages, high)
    assert bounds is not None, "one run holds all layers within their sum"
    return bounds


def _cut_within(costs: Sequence[int], stages: int, limit: int) -> tuple[int, ...] | None:
    """Fill stages from the last one on with as much as fits, leaving a layer for each of the others."""
    bounds = [len(costs)]
    for before in range(stages - 1, -1, -1):
        begin, load = bounds[-1], 0
        while begin > before and load + costs[begin - 1] <= limit:
            begin -= 1
            load += costs[begin]
        bounds.append(begin)
    return tuple(reversed(bounds)) if bounds[-1] == 0 else None


@dataclass(frozen=True, order=True)
class Place:
    """Where a rank computes."""

    node: int
    """Number of its machine."""
    device: int
    """Number of its device there."""


@dataclass(frozen=True)
class RankGrid:
    """The ranks of a job as stages x replicas."""

    stages: tuple[tuple[int, ...], ...]
    """[stage][replica] -> rank. The ranks of one stage hold the same layers; those of one replica, one behind the
    other, the whole model. With sequence parallelism a stage is a run of each row's tokens instead, and those of one
    replica have the whole row."""

    def coordinates(self) -> dict[int, tuple[int, int]]:
        """Rank -> (stage, replica)."""
        return {rank: (stage, replica) for stage, ranks in enumerate(self.stages) for replica, rank in enumerate(ranks)}


def rank_grid(places: Sequence[Place], pipeline: int) -> RankGrid:
    """Put the stages of a replica next to each other: on one machine where they fit, else on as few as can be.

    Launchers number ranks as they please, so the grid comes from where the ranks are, never from their numbers.

    Args:
        places: of each rank, in rank order.
        pipeline: stages; divides the number of ranks.
    """
    assert len(places) % pipeline == 0, f"{pipeline} stages on {len(places)} ranks"
    by_node: dict[int, list[int]] = {}
    for rank in sorted(range(len(places)), key=lambda rank: (places[rank], rank)):
        by_node.setdefault(places[rank].node, []).append(rank)
    # Whole replicas of each machine first; what is left over on machines is joined in their order.
    replicas: list[list[int]] = []
    rest: list[int] = []
    for ranks in by_node.values():
        whole = len(ranks) // pipeline * pipeline
        replicas += [ranks[begin : begin + pipeline] for begin in range(0, whole, pipeline)]
        rest += ranks[whole:]
    replicas += [rest[begin : begin + pipeline] for begin in range(0, len(rest), pipeline)]
    return RankGrid(tuple(tuple(replica[stage] for replica in replicas) for stage in range(pipeline)))
