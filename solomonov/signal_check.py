"""Before training: whether a signal comes through all layers of a model as deep as it is, and what to change if not.

Depth is what decides it, and width hardly matters: so a copy is measured that has all layers and every flag, and is
narrow (32 to 64 channels). 1,000 layers take some seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from solomonov.model.config import ModelConfig
from solomonov.model.cross import Source
from solomonov.model.front import example
from solomonov.model.signal import Signal, eighths, measure_signal
from solomonov.model.transformer import Transformer

DEEP_LAYERS = 64
"""From more layers on `plan` looks at the signal by itself."""
NARROW_HEADS, NARROW_WIDTH = 4, 16
VOCABULARY, ROWS, TOKENS = 64, 8, 16

UNEVEN = 10.0
"""Gradient of the first eighth over the last's, or the reverse, or growth of the stream, from which the depth is not
used evenly: Peri-LN at 24 layers has 8, at 100 layers 26."""
BROKEN = 1000.0
"""From which no learning rate suits both ends: Post-LN has 5 at 24 layers, 20,000 at 100, where it does not train."""

Verdict = Literal["even", "uneven", "broken"]


@dataclass(frozen=True)
class SignalCheck:
    """What was found at the initial values."""

    layers: int
    width: int
    """D of the copy that was measured."""
    signal: Signal
    verdict: Verdict
    reading: str
    """The verdict in words, with its numbers."""
    advice: str | None
    """Which key to change; None where nothing need be."""


def narrowed(model: ModelConfig) -> ModelConfig:
    """A copy with all layers and flags, few and narrow heads, and a feed-forward in proportion."""
    shared = min(model.heads // model.kv_head_count, NARROW_HEADS)
    keys = min(model.kv_head_count, max(1, NARROW_HEADS // shared))
    heads, width = shared * keys, min(model.head_width, NARROW_WIDTH)
    d_model = heads * width
    changes: dict[str, Any] = {
        "d_model": d_model,
        "heads": heads,
        "kv_heads": keys,
        "head_dim": width,
        "d_ff": max(1, model.feed_forward_width * d_model // model.d_model),
    }
    if model.base_d_model is not None:
        changes["base_d_model"] = max(2, model.base_d_model * d_model // model.d_model)
    return ModelConfig.model_validate(model.model_dump() | changes)


def check_signal(model: ModelConfig, *, seed: int = 0) -> SignalCheck:
    """Measure the initial values of a model's narrow copy, on random tokens, or what its front reads."""
    copy = narrowed(model)
    generator = torch.Generator().manual_seed(seed)
    tokens = TOKENS if copy.longest_tokens is None else min(TOKENS, copy.longest_tokens)
    ids, labels = (torch.randint(0, VOCABULARY, (ROWS, tokens), generator=generator) for _ in range(2))
    target, source = (ids, torch.zeros_like(ids)), None
    if copy.architecture == "encoder_decoder":
        source = Source(torch.randint(0, VOCABULARY, (ROWS, tokens), generator=generator), target[1])
    if copy.front.kind != "tokens":
        read = example(copy.front, ROWS, tokens, generator)
        target, source = (target, Source(*read)) if source is not None else (read, None)
    signal = measure_signal(Transformer(copy, VOCABULARY, seed=seed), *target, labels, source)
    verdict, reading = judge(signal)
    return SignalCheck(len(signal.gradient_norms), copy.d_model, signal, verdict, reading, advice(model, verdict))


def judge(signal: Signal) -> tuple[Verdict, str]:
    """The verdict and its words: by the mean gradient of the first eighth over the last's, in that stack where they
    differ more, and the stream's growth."""
    tiny = torch.finfo(torch.float32).tiny
    ratio = worst = 0.0
    for stack in signal.stacks:
        norms = [signal.gradient_norms[block] for block in stack]
        parts = eighths(len(norms))
        first, last = (_mean([norms[layer] for layer in part]) for part in (parts[0], parts[-1]))
        if not all(map(math.isfinite, (signal.loss, first, last, signal.growth))):
            return "broken", "the pass through the layers is not finite"
        of_stack = first / max(last, tiny)
        if max(of_stack, 1.0 / max(of_stack, tiny)) > worst:
            ratio, worst = of_stack, max(of_stack, 1.0 / max(of_stack, tiny))
    grows = f"the stream grows {signal.growth:.3g} times"
    numbers = f"the gradient of the first eighth is {ratio:.3g} times the last's, {grows}"
    if worst >= BROKEN:
        return "broken", f"{numbers}: no learning rate suits both ends"
    if worst >= UNEVEN or signal.growth >= UNEVEN:
        return "uneven", f"{numbers}: some layers do most of the work"
    return "even", numbers


def advice(model: ModelConfig, verdict: Verdict) -> str | None:
    """The key to change."""
    if verdict == "even":
        return None
    if model.residual_mode in ("scaled", "deepnorm"):
        return "model.base_layers: the depth at which the learning rate was found, 6 to 12"
    return "model.residual: scaled (or deepnorm), which is even at 1,000 layers"


def facts(check: SignalCheck) -> dict[str, Any]:
    """For JSON."""
    signal = check.signal
    return {
        "verdict": check.verdict,
        "reading": check.reading,
        "advice": check.advice,
        "width": check.width,
        "stream_rms": list(signal.stream_rms),
        "cosines": list(signal.cosines),
        "gradient_norms": list(signal.gradient_norms),
    }


def lines(check: SignalCheck, *, whole: bool) -> Iterator[str]:
    """For people: the verdict, and with `whole` a row an eighth of the layers."""
    yield f"signal      {check.verdict}: {check.reading} (all {check.layers} layers, {check.width} wide)"
    if check.advice is not None:
        yield f"            change {check.advice}"
    if not whole:
        return
    parts = eighths(check.layers)
    gradients = [_mean([check.signal.gradient_norms[layer] for layer in part]) for part in parts]
    yield ""
    yield f"{'layers':12}{'stream':>10}{'turned':>10}{'gradient':>12}  gradient, a column a factor of 2"
    least = min((gradient for gradient in gradients if gradient > 0.0), default=1.0)
    for part, gradient in zip(parts, gradients, strict=True):
        stream = check.signal.stream_rms[part[-1] + 1]
        turned = 1.0 - _mean([check.signal.cosines[layer] for layer in part])
        bar = "#" * min(48, 1 + round(math.log2(gradient / least))) if math.isfinite(gradient) and gradient > 0 else ""
        name = f"{part[0]}" if len(part) == 1 else f"{part[0]}-{part[-1]}"
        yield f"{name:12}{stream:10.3g}{turned:10.2g}{gradient:12.3g}  {bar}"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
