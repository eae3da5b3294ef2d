"""Text continuation: one token after another, each computed once, sampled reproducibly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from solomonov.architectures import require_decoder
from solomonov.errors import ConfigurationError
from solomonov.model.cache import KeyValueCache
from solomonov.model.transformer import Transformer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits."""

    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""

    top_k: int = 0
    """Only the k likeliest tokens can be chosen; 0: all."""

    top_p: float = 1.0
    """Only the fewest likeliest tokens whose probabilities reach p can be chosen (arXiv 1904.09751); 1: all."""

    seed: int = 0
    """The n-th draw is a function of (seed, n) alone, so a continuation repeats on any machine."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise _refused("temperature", self.temperature, "a finite number of at least 0")
        if self.top_k < 0:
            raise _refused("top_k", self.top_k, "at least 1, or 0 for all")
        if not 0.0 < self.top_p <= 1.0:
            raise _refused("top_p", self.top_p, "above 0 and at most 1")


def generate(
    model: Transformer,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
) -> list[int]:
    """The ids that follow the prompt, at most `max_new_tokens`; a final end of text is not among them.

    Args:
        temperature, top_k, top_p, seed: see `Sampling`.
        eos_id: ends the text; None: it has the full length.

    Raises:
        ConfigurationError: the model is no decoder, a setting is out of range, or the prompt is empty or not of this
            vocabulary, or the text becomes longer than there are learned positions.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    return list(stream(model, prompt_ids, sampling, max_new_tokens=max_new_tokens, eos_id=eos_id))


def stream(
    model: Transformer,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    *,
    max_new_tokens: int,
    eos_id: int | None = None,
) -> Iterator[int]:
    """`generate`, each token as soon as it is known."""
    require_decoder(model.config, "generate")
    if not prompt_ids:
        raise _refused("prompt", "no tokens", "at least one token; the begin-of-text token will do")
    if not 0 <= min(prompt_ids) <= max(prompt_ids) < model.vocab_size:
        raise _refused("prompt", f"token ids {min(prompt_ids)} to {max(prompt_ids)}", f"0 to {model.vocab_size - 1}")
    longest = model.config.longest_tokens
    if longest is not None and len(prompt_ids) + max_new_tokens > longest:
        raise _refused(
            "length",
            f"a prompt of {len(prompt_ids)} tokens and {max_new_tokens} new ones",
            f"{longest} together at most, for which the model has learned positions",
        )
    weight = model.embedding.weight
    cache = KeyValueCache(
        model.config,
        batch_rows=1,
        capacity_tokens=len(prompt_ids) + max_new_tokens,
        dtype=weight.dtype,
        device=weight.device,
    )
    new = list(prompt_ids)
    for draw in range(max_new_tokens):
        token = choose(_last_logits(model, new, cache), sampling, draw)
        if token == eos_id:
            return
        yield token
        new = [token]


def choose(logits: Tensor, sampling: Sampling, draw: int) -> int:
    """The token of the `draw`-th choice.

    Args:
        logits: (V,).

    Returns:
        The likeliest token at temperature 0 (of equals the first), else the one at which the cumulative
        probability, likeliest token first, passes a number in [0, 1) drawn by (seed, draw).
    """
    wide = logits.detach().double().cpu()
    if sampling.temperature == 0.0:
        return int(wide.argmax())
    ordered, tokens = (wide / sampling.temperature).sort(descending=True, stable=True)
    cumulative = ordered.softmax(dim=0).cumsum(dim=0)
    allowed = min(sampling.top_k, len(tokens)) if sampling.top_k else len(tokens)
    if sampling.top_p < 1.0:
        # top_p counts within what top_k left.
        reached = cumulative[:allowed] >= sampling.top_p * cumulative[allowed - 1]
        allowed = int(reached.int().argmax()) + 1
    uniform = xxhash.xxh3_64_intdigest(f"{sampling.seed}/{draw}".encode()) / 2.0**64
    place = int(torch.searchsorted(cumulative[:allowed], uniform * cumulative[allowed - 1], right=True))
    return int(tokens[min(place, allowed - 1)])


def _last_logits(model: Transformer, ids: list[int], cache: KeyValueCache) -> Tensor:
    """Logits (V,) after the last of the new ids, which join the cache."""
    device = model.embedding.weight.device
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            tokens = torch.tensor([ids], dtype=torch.int32, device=device)
            logits: Tensor = model(tokens, torch.zeros_like(tokens), cache=cache)
            return logits[0, -1]
    finally:
        model.train(was_training)


def _refused(name: str, got: object, rule: str) -> ConfigurationError:
    return ConfigurationError(
        f"Text cannot be generated with this {name}.", got=str(got), rule=rule, remedy=f"give another {name}"
    )
