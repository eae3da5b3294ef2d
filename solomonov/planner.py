"""Which layouts a run could take, what each needs and how long it takes, and which one to take and why.

Memory is counted (see `footprint`); time is a model of three terms with an honest width: products at a share of the
device's peak, the idle part of a pipeline, and what is exchanged over the slowest wire between replicas; where state
is offloaded a fourth: what goes over the bus, and the update by the machine's cores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from solomonov.config import Config
from solomonov.devices import CPU, GIB, HOST_USABLE, Device
from solomonov.errors import ConfigurationError
from solomonov.footprint import Footprint, Training, footprint, sharers
from solomonov.layouts import batch_of, candidates, legal_batch, offloaded_candidates, sequence_candidates
from solomonov.memory import describe
from solomonov.model.counts import flops_per_token, layer_flops, parameter_count
from solomonov.parallel import Offload, ParallelConfig, overlaps
from solomonov.plan import BatchPlan, TrainingConfig
from solomonov.topology import stage_bounds

UTILISATION = 0.4
"""Share of the peak that training reaches in products; published runs of dense models: 0.3 to 0.55."""
FASTER, SLOWER = 0.7, 1.6
"""Factors on the estimated time between which a run is expected."""
NEARLY_AS_FAST = 1.03
"""Layouts whose times differ by less are as good as equal: the simplest of them is taken."""
HOST_UPDATE_BYTES_PER_SECOND = 4e10
"""What an update on the host reads and writes a second for one rank: of the order of its share of a server's memory
bandwidth. One core reaches 1.5e10 with torch's fused AdamW."""
ADAMW_BYTES = 28
"""Of each number in an update: gradient, master and two moments read, the last three written."""
EMA_BYTES = 12
"""The same for the moving average of the weights: master and average read, the average written."""
OFFLOADS: tuple[Offload, ...] = ("none", "optimizer", "parameters")


def layout_name(parallel: ParallelConfig) -> str:
    """A layout in words."""
    stages = f" with {parallel.pipeline} pipeline stages" if parallel.pipeline > 1 else ""
    offloaded = f", {parallel.offload} offloaded" if parallel.offload != "none" else ""
    shared = f" with rows on {parallel.sequence} ranks" if parallel.sequence > 1 else ""
    return f"ZeRO {parallel.zero_stage}{stages}{shared}{offloaded}"


@dataclass(frozen=True)
class Estimate:
    """What a layout needs."""

    parallel: ParallelConfig
    plan: BatchPlan
    footprint: Footprint
    compute_seconds: float
    """Of one update, the idle part of a pipeline included."""
    exchange_seconds: float
    """Of one update, not hidden behind the backward pass."""
    usable_bytes: int
    usable_host_bytes: int | None = None
    """None: not known."""
    bus_bytes: float = 0.0
    """To and from the machine's memory in one update."""
    offload_seconds: float = 0.0
    """Of one update: for these, and for the update by the machine's cores."""

    @property
    def name(self) -> str:
        """In words."""
        return layout_name(self.parallel)

    @property
    def seconds(self) -> float:
        """Of one update."""
        return self.compute_seconds + self.exchange_seconds + self.offload_seconds

    @property
    def fits(self) -> bool:
        """Whether a rank has the memory, on its device and, as far as that is known, on its machine."""
        on_host = self.usable_host_bytes is None or self.footprint.host <= self.usable_host_bytes
        return self.footprint.total <= self.usable_bytes and on_host

    @property
    def plainness(self) -> tuple[int, int, int, int]:
        """The smaller, the fewer moving parts."""
        parallel = self.parallel
        return OFFLOADS.index(parallel.offload), parallel.sequence, parallel.pipeline, parallel.zero_stage


@dataclass(frozen=True)
class Refused:
    """A layout that is not legal."""

    parallel: ParallelConfig
    reason: str


@dataclass(frozen=True)
class Question:
    """What is planned: a configuration on so many devices."""

    config: Config
    vocab_size: int
    world: int
    device: Device
    precision: str
    """Resolved: fp32, bf16 or bf16_autocast."""

    def with_training(self, **changes: object) -> Question:
        """The same with other keys of the training section."""
        training = TrainingConfig.model_validate({**self.config.training.model_dump(), **changes})
        return replace(self, config=self.config.model_copy(update={"training": training}))


def estimate(question: Question, parallel: ParallelConfig) -> Estimate:
    """Work out one layout.

    Raises:
        ConfigurationError: it is not legal; the message names the nearest legal one.
    """
    config = question.config
    plan = batch_of(config, parallel, precision=question.precision, world=question.world)
    device, ema = question.device, config.training.ema_decay is not None
    training = Training(
        question.precision,
        config.training.recompute,
        ema=ema,
        muon=config.optimizer.kind == "muon",
        overlap=device.name != CPU,
    )
    needed = footprint(config.model, question.vocab_size, plan, parallel, training)
    compute = _compute_seconds(question, plan, parallel)
    exchange = _exchange_seconds(question, plan, parallel)
    # A backward pass is two thirds of the products, and exchange runs beside it; in a pipeline it comes after it.
    hidden = compute * 2 / 3 if training.overlap and overlaps(parallel, question.precision) else 0.0
    if device.name == CPU:  # whose memory is the machine's
        needed = replace(needed, optimizer=needed.optimizer + needed.host, host=0)
    bus = _bus_bytes(question, plan, parallel)
    numbers = _numbers(question, parallel) / sharers(plan, parallel) if parallel.offload != "none" else 0.0
    touched = ADAMW_BYTES + EMA_BYTES * ema
    offload = bus / device.bus_bytes_per_second + touched * numbers / HOST_UPDATE_BYTES_PER_SECOND
    exposed = max(0.0, exchange - hidden) + _row_exchange_seconds(question, plan, parallel)
    usable = device.usable_bytes, device.usable_host_bytes
    return Estimate(parallel, plan, needed, compute, exposed, *usable, bus, offload)


def _numbers(question: Question, parallel: ParallelConfig) -> float:
    """Parameters of a pipeline stage."""
    return parameter_count(question.config.model, question.vocab_size) / parallel.pipeline


def _bus_bytes(question: Question, plan: BatchPlan, parallel: ParallelConfig) -> float:
    """Down go gradients, up weights; with accumulation reduced gradients go to and fro, but where the device has a
    place for the share that it owns: at stage 1, which reduces once, and at stage 2 with bf16."""
    if parallel.offload == "none":
        return 0.0
    weight, again = 2 if question.precision == "bf16" else 4, plan.accumulation
    accumulates_there = parallel.zero_stage == 3 or (
        parallel.zero_stage == 2 and again > 1 and question.precision != "bf16"
    )
    a_number = weight + (8 * again if accumulates_there else 4)
    if parallel.offload == "parameters":
        a_number += 2 * weight * again  # forward and backward of each micro-batch
    return a_number * _numbers(question, parallel) / sharers(plan, parallel)


def _compute_seconds(question: Question, plan: BatchPlan, parallel: ParallelConfig) -> float:
    device, config = question.device, question.config
    peak = device.fp32_flops if question.precision == "fp32" else device.bf16_flops
    flops = flops_per_token(config.model, question.vocab_size, plan.sequence_tokens, plan.source_tokens)
    tokens = plan.batch_rows * plan.sequence_tokens / question.world
    idle = 1.0 + (parallel.pipeline - 1) / plan.accumulation  # 1F1B: arXiv 2104.04473, section 2.2.1
    slowest = _dearest_stage(question, plan, parallel.pipeline) * parallel.pipeline
    # Products are what counts: `selective` computes none again, `full` the forward third.
    again = 4 / 3 if config.training.recompute.mode == "full" else 1.0
    return flops * tokens * slowest * again * idle / (peak * UTILISATION)


def _dearest_stage(question: Question, plan: BatchPlan, stages: int) -> float:
    """Its share of all operations."""
    model, vocab_size = question.config.model, question.vocab_size
    tokens, source = plan.sequence_tokens, plan.source_tokens
    costs = list(layer_flops(model, vocab_size, tokens, source).values())
    bounds = stage_bounds(model, vocab_size, tokens, stages, source)
    return max(sum(costs[begin:end]) for begin, end in pairwise(bounds)) / sum(costs)


def _exchange_seconds(question: Question, plan: BatchPlan, parallel: ParallelConfig) -> float:
    """Ring collectives move (n - 1) / n of a buffer in a reduce-scatter or a gather, twice that in an all-reduce."""
    copies, device = sharers(plan, parallel), question.device
    if copies == 1:
        return 0.0
    numbers = _numbers(question, parallel)
    weight = 2 if question.precision == "bf16" else 4
    ring = (copies - 1) / copies * numbers
    moved = {
        0: 2 * 4 * ring,
        1: (2 * 4 + weight) * ring,
        2: (4 * plan.accumulation + weight) * ring,
        3: (4 + 2 * weight) * plan.accumulation * ring,
    }[parallel.zero_stage]
    one_machine = question.world <= device.per_machine
    return moved / (device.link_bytes_per_second if one_machine else device.network_bytes_per_second)


def _row_exchange_seconds(question: Question, plan: BatchPlan, parallel: ParallelConfig) -> float:
    """Ranks that share rows exchange queries, keys, values and what attention makes of them, in each layer, forward and
    backward, and again where blocks are computed again; attention waits for it."""
    ranks, device, model = parallel.sequence, question.device, question.config.model
    if ranks == 1:
        return 0.0
    keys = math.lcm(model.kv_head_count, ranks)
    channels = 2 * (model.heads + keys) * model.head_width
    passes = 3 if question.config.training.recompute.mode == "full" else 2
    tokens = plan.micro_rows * plan.accumulation * plan.sequence_tokens / ranks
    width = 4 if question.precision == "fp32" else 2
    moved = passes * model.block_count * tokens * channels * width * (ranks - 1) / ranks
    one_machine = ranks <= device.per_machine
    return moved / (device.link_bytes_per_second if one_machine else device.network_bytes_per_second)


def survey(question: Question) -> list[Estimate | Refused]:
    """All layouts of ZeRO stages and pipelines, legal or not, plainest first; where none of them fits, or the
    configuration has such a one, the legal ones that share rows as well, and likewise those that offload."""
    config, world = question.config, question.world
    found = [_estimate_or_refusal(question, parallel) for parallel in candidates(config, world)]
    shares = config.parallel is not None and config.parallel.sequence > 1
    if shares or not any(item.fits for item in found_estimates(found)):
        sharing = [_estimate_or_refusal(question, parallel) for parallel in sequence_candidates(config, world)]
        found += found_estimates(sharing)
    configured = config.parallel is not None and config.parallel.offload != "none"
    # Of a CPU the memory is the machine's own: there is nowhere else.
    nowhere = question.device.name == CPU or any(item.fits for item in found_estimates(found))
    if configured or not nowhere:
        offloaded = [_estimate_or_refusal(question, parallel) for parallel in offloaded_candidates(config, world)]
        found += found_estimates(offloaded)
    return found


def _estimate_or_refusal(question: Question, parallel: ParallelConfig) -> Estimate | Refused:
    try:
        return estimate(question, parallel)
    except ConfigurationError as error:
        return Refused(parallel, error.what)


def best(found: Sequence[Estimate | Refused]) -> Estimate | None:
    """The fastest layout that fits; of those that are nearly as fast the plainest; with something offloaded only
    where nothing else fits. None: nothing fits."""
    fitting = [item for item in found_estimates(found) if item.fits]
    fitting = [item for item in fitting if item.parallel.offload == "none"] or fitting
    if not fitting:
        return None
    fastest = min(item.seconds for item in fitting)
    return min((item for item in fitting if item.seconds <= NEARLY_AS_FAST * fastest), key=lambda item: item.plainness)


def choose(question: Question) -> tuple[ParallelConfig, str]:
    """The layout of `parallel: auto`, and why this one; the same on every rank.

    Raises:
        ConfigurationError: none is legal, or none fits.
    """
    legal_batch(question.config, precision=question.precision, world=question.world)
    found = survey(question)
    chosen = best(found)
    if chosen is None:
        raise nothing_fits(question, min(found_estimates(found), key=lambda item: item.footprint.total))
    return chosen.parallel, reason(found, chosen)


def nothing_fits(question: Question, nearest: Estimate) -> ConfigurationError:
    """What is said of a layout that needs more than there is."""
    change, device = smallest_change(question, nearest.parallel), question.device
    host = f"; on its machine with {HOST_USABLE:.0%} of its share" if nearest.footprint.host else ""
    return ConfigurationError(
        "the run does not fit into memory",
        got=f"{nearest.name} needs {describe(nearest.footprint)} of {nearest.usable_bytes / GIB:.3g} usable",
        rule=f"a rank plans with {device.usable:.0%} of its device's {device.memory_bytes / GIB:.3g} GiB{host}",
        remedy=f"the smallest change that fits: {change}" if change else "use devices with more memory",
    )


def found_estimates(found: Sequence[Estimate | Refused]) -> list[Estimate]:
    """The legal ones."""
    return [item for item in found if isinstance(item, Estimate)]


def reason(found: Sequence[Estimate | Refused], chosen: Estimate) -> str:
    """Why this one and not a plainer one, in words."""
    words = []
    plainer = [item for item in found_estimates(found) if item.plainness < chosen.plainness]
    if chosen.parallel.offload != "none":
        on_device = [item for item in plainer if item.parallel.offload == "none"]
        if on_device:
            least = min(on_device, key=lambda item: item.footprint.total)
            words.append(f"nothing fits without offload, of which {least.name} needs the least, {_need(least)}")
        plainer = [item for item in plainer if item not in on_device]
    for item in plainer:
        if item.fits:
            words.append(f"{item.name} takes {item.seconds / chosen.seconds:.2f} times as long")
        else:
            words.append(f"{item.name} needs {_need(item)}")
    if chosen.parallel.offload != "none":
        words.append(f"each update waits {chosen.offload_seconds:.3g} s for the bus and the machine's cores")
    return "; ".join(words) or "no legal layout is plainer, and none that fits is clearly faster"


def _need(item: Estimate) -> str:
    """What does not fit, of what there is."""
    need, room = item.footprint.total, item.usable_bytes
    if need <= room and item.usable_host_bytes is not None:
        return f"{item.footprint.host / GIB:.3g} of {item.usable_host_bytes / GIB:.3g} GiB of its machine"
    return f"{need / GIB:.3g} of {room / GIB:.3g} GiB"


def smallest_change(question: Question, parallel: ParallelConfig) -> str | None:
    """What makes a layout fit that does not: the first that does of recomputing what is cheap, recomputing blocks,
    smaller micro-batches, the last two, another layout (those with offload last), more devices. None: nothing of it."""
    training = question.config.training
    changes: list[tuple[str, Question]] = []
    full = {"activation_checkpointing": "full"}
    for mode in {"none": ("selective", "full"), "selective": ("full",), "full": ()}[training.activation_checkpointing]:
        words = f"training.activation_checkpointing={mode}"
        changes.append((words, question.with_training(activation_checkpointing=mode)))
    rows = training.micro_batch_sequences
    for recompute in (False, True):
        smaller = rows // 2
        while smaller:
            changed = question.with_training(micro_batch_sequences=smaller, **(full if recompute else {}))
            words = f"training.micro_batch_sequences={smaller}"
            changes.append((f"training.activation_checkpointing=full {words}" if recompute else words, changed))
            smaller //= 2
    for words, changed in changes:
        item = _estimate_or_refusal(changed, parallel)
        if isinstance(item, Estimate) and item.fits:
            return words
    other = best(survey(question))
    if other is not None:
        words = f"parallel.zero_stage={other.parallel.zero_stage} parallel.pipeline={other.parallel.pipeline}"
        words += f" parallel.sequence={other.parallel.sequence}" if parallel.sequence != other.parallel.sequence else ""
        offloads = {parallel.offload, other.parallel.offload} != {"none"}
        return f"{words} parallel.offload={other.parallel.offload}" if offloads else words
    return next((f"{world} devices" for world in _more(question) if best(survey(replace(question, world=world)))), None)


def _more(question: Question) -> Iterator[int]:
    rows = question.config.training.global_batch_tokens // question.config.data.sequence_tokens
    world = question.world * 2
    while world <= rows:
        yield world
        world *= 2


def cannot_allocate(question: Question, error: BaseException, measured: int) -> ConfigurationError:
    """What is said when a rank was refused memory: what was foreseen, what was had, what would fit."""
    parallel = question.config.parallel
    item = _estimate_or_refusal(question, parallel) if parallel else best(survey(question))
    foreseen, change = "nothing that fits", None
    if isinstance(item, Estimate):
        foreseen = f"{item.name}: {describe(item.footprint)}"
        # It did not fit, whatever was foreseen: what does must need less than what was foreseen for this.
        room = min(question.device.memory_bytes, int(item.footprint.total * 0.99 / question.device.usable))
        change = smallest_change(replace(question, device=replace(question.device, memory_bytes=room)), item.parallel)
    return ConfigurationError(
        "a rank could not allocate memory",
        got=(
            f"{' '.join(str(error).split())[:300]}; the process had {measured / GIB:.3g} GiB at most,"
            f" of {question.device.memory_bytes / GIB:.3g} GiB; foreseen {foreseen}"
        ),
        rule="each rank has the memory that its layout needs, and other processes leave it that",
        remedy=f"the smallest change that would fit: {change}" if change else "use devices with more memory",
    )
