"""The model written out as plain float64 loops over Python numbers and small numpy vectors.

Slow and obvious on purpose: nothing here shares code, shapes or tricks with `solomonov.model`.
Documents are computed one by one, each as if it stood alone, so packing cannot hide a mistake.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from solomonov.model.config import ModelConfig

Array = NDArray[np.float64]


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean of squares + eps) * weight, for one vector."""
    mean_square = sum(float(value) ** 2 for value in x) / len(x)
    return np.array([float(v) / math.sqrt(mean_square + eps) * float(w) for v, w in zip(x, weight, strict=True)])


def rope(x: Array, position: int, theta: float) -> Array:
    """One head's vector, turned: the pair (x_i, x_{i+E/2}) is a complex number, turned by e^(i angle)."""
    half = len(x) // 2
    result = np.zeros(len(x))
    for i in range(half):
        angle = position * theta ** (-2.0 * i / len(x))
        turned = complex(x[i], x[i + half]) * cmath.exp(1j * angle)
        result[i], result[i + half] = turned.real, turned.imag
    return result


def softmax_mix(query: Array, keys: Sequence[Array], values: Sequence[Array]) -> Array:
    """One query's answer over the given keys: sum of softmax(q . k / sqrt(E)) v."""
    scores = [float(np.dot(query, key)) / math.sqrt(len(query)) for key in keys]
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    mixed = np.zeros(len(values[0]))
    for weight, value in zip(weights, values, strict=True):
        mixed = mixed + weight / sum(weights) * value
    return mixed


def attention(state: Mapping[str, Array], prefix: str, config: ModelConfig, document: Sequence[Array]) -> list[Array]:
    """Causal grouped-query attention over one document: one vector (D,) in and out per token."""
    width, shared = config.head_width, config.heads // config.kv_head_count

    def heads(name: str, x: Array, count: int, position: int | None) -> list[Array]:
        flat = state[f"{prefix}.{name}.weight"] @ x
        parts = [flat[index * width : (index + 1) * width] for index in range(count)]
        if position is not None:
            if config.attention.qk_norm:
                gain = state[f"{prefix}.{name}_norm.weight"]
                parts = [rms_norm(part, gain, config.norm_eps) for part in parts]
            parts = [rope(part, position, config.attention.rope_theta) for part in parts]
        return parts

    keys = [heads("k", x, config.kv_head_count, position) for position, x in enumerate(document)]
    values = [heads("v", x, config.kv_head_count, None) for x in document]
    answers = []
    for position, x in enumerate(document):
        mixed = []
        for head, query in enumerate(heads("q", x, config.heads, position)):
            group = head // shared
            seen = range(position + 1)
            mixed.append(softmax_mix(query, [keys[j][group] for j in seen], [values[j][group] for j in seen]))
        answers.append(state[f"{prefix}.out.weight"] @ np.concatenate(mixed))
    return answers


def feed_forward(state: Mapping[str, Array], prefix: str, x: Array) -> Array:
    """down(silu(gate x) * up x) for one vector."""
    gate, up = state[f"{prefix}.gate.weight"] @ x, state[f"{prefix}.up.weight"] @ x
    inner = np.array([g / (1.0 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)])
    return np.asarray(state[f"{prefix}.down.weight"] @ inner)


def logits(state: Mapping[str, Array], config: ModelConfig, input_ids: Sequence[int]) -> Array:
    """(T, V) logits of one document.

    Args:
        state: canonical name -> float64 array.
    """
    stream = [state["embedding.weight"][token] for token in input_ids]
    scale = 1.0
    if config.residual == "scaled" or (config.residual == "auto" and config.layers > config.base_layers):
        scale = min(1.0, config.base_layers / config.layers)
    for layer in range(config.layers):
        name = f"layers.{layer}"
        gain = state[f"{name}.attention_norm.weight"]
        branch = attention(state, f"{name}.attention", config, [rms_norm(x, gain, config.norm_eps) for x in stream])
        stream = [x + scale * b for x, b in zip(stream, branch, strict=True)]
        gain = state[f"{name}.feed_forward_norm.weight"]
        stream = [
            x + scale * feed_forward(state, f"{name}.feed_forward", rms_norm(x, gain, config.norm_eps)) for x in stream
        ]
    head = state["embedding.weight" if config.tie_embeddings else "head.weight"]
    return np.stack([head @ rms_norm(x, state["final_norm.weight"], config.norm_eps) for x in stream])


def cross_entropy(row: Array, label: int) -> float:
    """-ln softmax(row)[label]."""
    top = float(max(row))
    return math.log(sum(math.exp(float(value) - top) for value in row)) + top - float(row[label])


def naive_newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """What five steps of the iteration make of a matrix in float64, by what they make of its singular values."""
    u, values, vt = torch.linalg.svd(matrix.double() / torch.linalg.matrix_norm(matrix.double()), full_matrices=False)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return u @ torch.diag(values) @ vt
