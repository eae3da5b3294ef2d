"""What `solomonov plan` says: the numbers that follow from a configuration, and their arithmetic."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

from solomonov.config import Config
from solomonov.devices import GIB, Device, measured_speed
from solomonov.layouts import legal_batch
from solomonov.memory import describe
from solomonov.model.config import ModelConfig
from solomonov.model.counts import flops_per_token, parameter_count, parameter_shapes
from solomonov.model.naming import is_hidden_matrix, layer_names
from solomonov.planner import (
    FASTER,
    SLOWER,
    UTILISATION,
    Estimate,
    Question,
    Refused,
    best,
    estimate,
    found_estimates,
    layout_name,
    reason,
    smallest_change,
    survey,
)
from solomonov.topology import stage_bounds


def checkpoint_bytes(config: Config, vocab_size: int) -> int:
    """Of each parameter its master, its moments (two of AdamW, one of Muon) and its moving average where one is kept,
    in fp32."""
    muon, average = config.optimizer.kind == "muon", config.training.ema_decay is not None
    return sum(
        4 * math.prod(shape) * (3 - (muon and is_hidden_matrix(name, shape)) + average)
        for name, shape in parameter_shapes(config.model, vocab_size).items()
    )


@dataclasses.dataclass(frozen=True)
class Explanation:
    """A configuration on so many devices."""

    question: Question
    found: Sequence[Estimate | Refused]
    taken: Estimate
    """The configured layout, or the chosen one."""
    why: str
    change: str | None
    """What would make it fit, if it does not and anything does."""
    device: Device
    """The device with the speed that it has, where that can be measured."""
    seconds: float
    """Of one update at that speed."""


def explain(question: Question) -> Explanation:
    """Work it all out.

    Raises:
        ConfigurationError: the layout or the batch is illegal on so many ranks; the message names what is legal.
    """
    legal_batch(question.config, precision=question.precision, world=question.world)
    found = survey(question)
    if question.config.parallel is None:
        chosen = best(found)
        taken = chosen or min(found_estimates(found), key=lambda item: item.footprint.total)
        why = f"chosen: {reason(found, taken)}" if chosen else "the one that needs the least"
    else:
        taken, why = estimate(question, question.config.parallel), "as configured"
    change = None if taken.fits else smallest_change(question, taken.parallel)
    device = measured_speed(question.device)
    seconds = estimate(dataclasses.replace(question, device=device), taken.parallel).seconds
    return Explanation(question, found, taken, why, change, device, seconds)


def facts(explanation: Explanation) -> dict[str, Any]:
    """All of it for scripts: bytes, seconds, counts."""
    question, taken, seconds = explanation.question, explanation.taken, explanation.seconds
    plan, model = taken.plan, question.config.model
    parameters = parameter_count(model, question.vocab_size)
    tokens = plan.batch_rows * plan.sequence_tokens
    updates = plan.trained_tokens(plan.total_steps) / tokens  # of whole batches
    lengths = plan.sequence_tokens, plan.source_tokens
    flops = flops_per_token(model, question.vocab_size, *lengths)
    bounds = stage_bounds(model, question.vocab_size, lengths[0], taken.parallel.pipeline, lengths[1])
    names = layer_names(model)
    return {
        "parameters": parameters,
        "flops_per_token": flops,
        "flops_per_token_undropped": flops_per_token(
            model.model_copy(update={"stochastic_depth": 0.0}), question.vocab_size, plan.sequence_tokens
        ),
        "batch": dataclasses.asdict(plan),
        "tokens": plan.trained_tokens(plan.total_steps),
        "batch_warmup_steps": plan.batches.warmup_steps,
        "sequence_warmup_steps": plan.sequence_warmup_steps,
        "world": question.world,
        "precision": question.precision,
        "device": dataclasses.asdict(explanation.device),
        "layout": _layout(taken) | {"why": explanation.why},
        "stages": [[names[begin], names[end - 1]] for begin, end in pairwise(bounds)],
        "memory": dataclasses.asdict(taken.footprint) | {"total": taken.footprint.total, "usable": taken.usable_bytes},
        "offload": {
            "host_bytes": taken.footprint.host,
            "host_usable": taken.usable_host_bytes,
            "bus_bytes_an_update": taken.bus_bytes,
            "bus_bytes_per_second": explanation.device.bus_bytes_per_second,
            "seconds_an_update": taken.offload_seconds,
        },
        "checkpoint_bytes": checkpoint_bytes(question.config, question.vocab_size),
        "checkpoints_kept": question.config.checkpoint.keep_last,
        "seconds_an_update": seconds,
        "seconds_range": [seconds * FASTER, seconds * SLOWER],
        "seconds": seconds * updates,
        "device_hours": seconds * updates * question.world / 3600,
        "tokens_per_second": tokens / seconds,
        "fits": taken.fits,
        "change": explanation.change,
        "layouts": [_row(item, taken) for item in explanation.found],
    }


def _layout(item: Estimate | Refused) -> dict[str, Any]:
    return item.parallel.model_dump()


def _row(item: Estimate | Refused, taken: Estimate) -> dict[str, Any]:
    if isinstance(item, Refused):
        return _layout(item) | {"refused": item.reason}
    row = {"bytes": item.footprint.total, "relative_seconds": item.seconds / taken.seconds, "fits": item.fits}
    return _layout(item) | row


def lines(explanation: Explanation) -> Iterator[str]:
    """The same for people."""
    question, taken, known = explanation.question, explanation.taken, facts(explanation)
    model, plan, device = question.config.model, taken.plan, explanation.device
    peak = device.fp32_flops if question.precision == "fp32" else device.bf16_flops
    yield (
        f"model       {' + '.join(str(stack.layers) for stack in model.stacks)} layers of {model.d_model},"
        f" {known['parameters']:,} parameters,"
        f" {known['flops_per_token'] / 1e9:.4g} GFLOP a token{_undropped(model, known)}"
    )
    yield f"batch       {plan.describe()}"
    yield (
        f"devices     {question.world} x {device.name}: {device.memory_bytes / GIB:.4g} GiB,"
        f" {peak / 1e12:.3g} TFLOP/s in {question.precision}, {device.link_bytes_per_second / 1e9:.3g} GB/s between"
        f" them, {device.network_bytes_per_second / 1e9:.3g} GB/s between machines of {device.per_machine}"
        f" ({device.source})"
    )
    yield f"layout      {taken.name} ({explanation.why})"
    if taken.parallel.pipeline > 1:
        yield f"stages      {_stages(known['stages'])}"
    room = f"{taken.usable_bytes / GIB:.4g} ({device.usable:.0%} of the device)"
    yield f"memory      {describe(taken.footprint)} of {room}"
    if taken.footprint.host:
        yield f"host        {_host(taken, device)}"
    yield f"checkpoint  {known['checkpoint_bytes'] / 1e9:.4g} GB, {known['checkpoints_kept']} kept"
    low, high = (_duration(known["seconds"] * factor) for factor in (FASTER, SLOWER))
    yield (
        f"time        {known['seconds_an_update']:.3g} s an update at {UTILISATION:.0%} of the peak,"
        f" {known['tokens_per_second']:,.0f} tokens/s; the run {_duration(known['seconds'])} ({low} to {high}),"
        f" {known['device_hours']:,.3g} device hours"
    )
    yield ""
    yield from _table(explanation)
    yield ""
    if taken.fits:
        yield "verdict     fits"
    else:
        yield f"verdict     does not fit; the smallest change that does: {explanation.change or 'none was found'}"


def _table(explanation: Explanation) -> Iterator[str]:
    taken = explanation.taken
    yield "ZeRO  pipeline  sequence  memory GiB  time   verdict"
    for item in found_estimates(explanation.found):
        verdict = "does not fit" if not item.fits else "taken" if item.parallel == taken.parallel else "fits"
        offloaded = f", {item.parallel.offload} offloaded" if item.parallel.offload != "none" else ""
        yield (
            f"{item.parallel.zero_stage:<4}  {item.parallel.pipeline:<8}  {item.parallel.sequence:<8}"
            f"  {item.footprint.total / GIB:<10.4g}  {item.seconds / taken.seconds:<5.2f}  {verdict}{offloaded}"
        )
    refused = sorted((item for item in explanation.found if isinstance(item, Refused)), key=lambda item: item.reason)
    for why, items in groupby(refused, key=lambda item: item.reason):
        first, *others = [layout_name(item.parallel) for item in items]
        yield f"refused: {first}{f' and {len(others)} more' if others else ''}: {why}"


def _undropped(model: ModelConfig, known: Mapping[str, Any]) -> str:
    """What stochastic depth saves, if anything."""
    if not model.stochastic_depth:
        return ""
    whole = known["flops_per_token_undropped"]
    saved = 1.0 - known["flops_per_token"] / whole
    return f" expected (stochastic depth saves {saved:.1%} of {whole / 1e9:.4g})"


def _host(taken: Estimate, device: Device) -> str:
    """What a rank takes of its machine for what is offloaded."""
    room = taken.usable_host_bytes
    of = "the size of its machine's memory is not known" if room is None else f"of {room / GIB:.4g}"
    return (
        f"{taken.footprint.host / GIB:.3g} GiB a rank ({of}); {taken.bus_bytes / 1e9:.3g} GB an update over a bus of"
        f" {device.bus_bytes_per_second / 1e9:.3g} GB/s and the update by the machine's cores:"
        f" {taken.offload_seconds:.3g} s"
    )


def _stages(ends: Sequence[Sequence[str]]) -> str:
    """First and last layer of each stage, or of many stages of the first and the last one."""
    words = [first if first == last else f"{first} to {last}" for first, last in ends]
    return "; ".join(words if len(words) <= 8 else [words[0], f"{len(words) - 2} more", words[-1]])


def _duration(seconds: float) -> str:
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 86400:.3g} days"
