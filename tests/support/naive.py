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


def grid_rope(x: Array, row: int, column: int, theta: float) -> Array:
    """One head's vector on a grid: the first half of its pairs turned by the row, the second one by the column, each as
    if they were all (Qwen2-VL, arXiv 2409.12191)."""
    first, second = np.split(x.reshape(2, 2, -1), 2, axis=1)
    by_row, by_column = rope(first.ravel(), row, theta), rope(second.ravel(), column, theta)
    return np.stack((by_row.reshape(2, -1), by_column.reshape(2, -1)), axis=1).ravel()


def softmax_mix(logits: Sequence[float], values: Sequence[Array], sink: float | None = None) -> Array:
    """One query's answer over the keys it sees: sum of softmax(logits) v.

    Args:
        sink: one more logit, which takes its part and adds nothing (gpt-oss, arXiv 2508.10925).
    """
    everything = [*logits] if sink is None else [*logits, sink]
    top = max(everything)
    total = sum(math.exp(logit - top) for logit in everything)
    mixed = np.zeros(len(values[0]))
    for logit, value in zip(logits, values, strict=True):
        mixed = mixed + math.exp(logit - top) / total * value
    return mixed


def sees_all(config: ModelConfig, layer: int) -> bool:
    """Whether a layer has no window: where its letter is G, of as many last letters as there are layers at most."""
    flags = config.attention
    if flags.window_tokens is None:
        return True
    letters = list(flags.pattern or "L")
    while len(letters) > config.layers:
        letters.pop(0)
    return (letters * config.layers)[layer] == "G"


def order_of(config: ModelConfig, layer: int) -> tuple[str, float]:
    """How a layer tells order, and the base of its rotation."""
    flags = config.attention
    position, theta = flags.position, flags.rope_theta
    if flags.window_tokens is not None and sees_all(config, layer):
        position = flags.global_position or position
        theta = flags.global_rope_theta or theta
    return position, theta


def alibi_slope(head: int, heads: int) -> float:
    """ "A geometric sequence that starts at 2^(-8/n) and uses that same value as its ratio", n a power of 2 (arXiv
    2108.12409, section 3); for other n as `get_slopes` of the authors' code: those of the power of 2 below, then every
    second one of the power above."""
    below = 2 ** math.floor(math.log2(heads))
    if head < below:
        return (2 ** (-8 / below)) ** (head + 1)
    return (2 ** (-8 / (2 * below))) ** (2 * (head - below) + 1)


def sinusoid(position: int, width: int) -> Array:
    """sin(pos / 10000^(2i/d)) at 2i, cos of the same at 2i + 1 (arXiv 1706.03762, section 3.5)."""
    angles = [position / 10_000 ** (2 * (channel // 2) / width) for channel in range(width)]
    return np.array([math.cos(angle) if channel % 2 else math.sin(angle) for channel, angle in enumerate(angles)])


def linear(state: Mapping[str, Array], name: str, x: Array) -> Array:
    """W x, plus b where there is one."""
    found = state[f"{name}.weight"] @ x
    return np.asarray(found + state[f"{name}.bias"] if f"{name}.bias" in state else found)


def gates(state: Mapping[str, Array], prefix: str, config: ModelConfig, x: Array) -> Array:
    """(H * E,) numbers that the mixed values are multiplied by: sigmoid(W x + b) (arXiv 2505.06708)."""
    if not config.attention.output_gate:
        return np.ones(config.heads * config.head_width)
    found = linear(state, f"{prefix}.gate", x)
    opened = np.array([1.0 / (1.0 + math.exp(-float(value))) for value in found])
    return opened if config.attention.output_gate is True else np.repeat(opened, config.head_width)


def attention(
    state: Mapping[str, Array],
    prefix: str,
    config: ModelConfig,
    document: Sequence[Array],
    layer: int = 0,
    mixed_values: Sequence[Array] | None = None,
) -> list[Array]:
    """Causal grouped-query attention of a layer over one document: one vector (D,) in and out per token.

    Args:
        mixed_values: (K * E,) of each token, in the place of its own.
    """
    flags, width, shared = config.attention, config.head_width, config.heads // config.kv_head_count
    order, theta = order_of(config, layer)
    to_all = sees_all(config, layer)

    def heads(name: str, x: Array, count: int, position: int | None) -> list[Array]:
        flat = linear(state, f"{prefix}.{name}", x)
        if position is not None and flags.qk_norm and flags.qk_norm_over == "all":
            flat = rms_norm(flat, state[f"{prefix}.{name}_norm.weight"], config.norm_eps)
        parts = [flat[index * width : (index + 1) * width] for index in range(count)]
        if position is not None:
            if flags.qk_norm and flags.qk_norm_over == "head":
                gain = state[f"{prefix}.{name}_norm.weight"]
                parts = [rms_norm(part, gain, config.norm_eps) for part in parts]
            if order == "rope":
                parts = [rope(part, position, theta) for part in parts]
        return parts

    keys = [heads("k", x, config.kv_head_count, position) for position, x in enumerate(document)]
    values = [heads("v", x, config.kv_head_count, None) for x in document]
    if mixed_values is not None:
        values = [[flat[begin : begin + width] for begin in range(0, len(flat), width)] for flat in mixed_values]
    answers = []
    for position, x in enumerate(document):
        mixed = []
        first = 0 if to_all or flags.window_tokens is None else max(0, position - flags.window_tokens + 1)
        seen = range(first, position + 1)
        for head, query in enumerate(heads("q", x, config.heads, position)):
            logits = [float(np.dot(query, keys[j][head // shared])) / math.sqrt(width) for j in seen]
            if flags.log_n_scale and to_all:  # SSMax, arXiv 2501.19399
                factor = float(state[f"{prefix}.log_scale"][head]) * math.log(len(seen))
                logits = [factor * logit for logit in logits]
            if order == "alibi":
                slope = alibi_slope(head, config.heads)
                logits = [logit - slope * (position - j) for logit, j in zip(logits, seen, strict=True)]
            sink = float(state[f"{prefix}.sink"][head]) if flags.sink else None
            mixed.append(softmax_mix(logits, [values[j][head // shared] for j in seen], sink))
        answers.append(linear(state, f"{prefix}.out", np.concatenate(mixed) * gates(state, prefix, config, x)))
    return answers


def attention_to_all(
    state: Mapping[str, Array],
    prefix: str,
    config: ModelConfig,
    asking: Sequence[Array],
    asked: Sequence[Array],
    mixed_values: Sequence[Array] | None = None,
) -> list[Array]:
    """What each of `asking` finds among all of `asked`: in an encoder, where both are one document, with its rotation,
    on patches by row and column; in cross-attention without positions. Nothing is found in a source of no tokens."""
    width, shared = config.head_width, config.heads // config.kv_head_count
    rotates = config.attention.position == "rope" and not prefix.endswith("cross_attention")

    def heads(name: str, x: Array, position: int) -> list[Array]:
        flat = linear(state, f"{prefix}.{name}", x)
        normed = config.attention.qk_norm and name != "v"
        if normed and config.attention.qk_norm_over == "all":
            flat = rms_norm(flat, state[f"{prefix}.{name}_norm.weight"], config.norm_eps)
        parts = [flat[begin : begin + width] for begin in range(0, len(flat), width)]
        if normed and config.attention.qk_norm_over == "head":
            parts = [rms_norm(part, state[f"{prefix}.{name}_norm.weight"], config.norm_eps) for part in parts]
        if rotates and name != "v":
            theta, columns = config.attention.rope_theta, config.front.image_size[1] // config.front.patch_size
            if config.front.kind == "patches":
                parts = [grid_rope(part, position // columns, position % columns, theta) for part in parts]
            else:
                parts = [rope(part, position, theta) for part in parts]
        return parts

    keys = [heads("k", x, position) for position, x in enumerate(asked)]
    values = [heads("v", x, position) for position, x in enumerate(asked)]
    if mixed_values is not None:
        values = [[flat[begin : begin + width] for begin in range(0, len(flat), width)] for flat in mixed_values]
    answers = []
    for position, x in enumerate(asking):
        mixed = [np.zeros(width) for _ in range(config.heads)]
        for head, query in enumerate(heads("q", x, position)):
            logits = [float(np.dot(query, key[head // shared])) / math.sqrt(width) for key in keys]
            if logits:
                mixed[head] = softmax_mix(logits, [value[head // shared] for value in values])
        answers.append(linear(state, f"{prefix}.out", np.concatenate(mixed) * gates(state, prefix, config, x)))
    return answers


def dense_attention(
    state: Mapping[str, torch.Tensor], config: ModelConfig, x: torch.Tensor, layer: int
) -> torch.Tensor:
    """`attention` in float64 torch over whole T x T matrices of one document, for its gradients.

    Args:
        state: the attention's own names -> float64 tensors.
        x: (T, D) float64.
    """
    flags, width, tokens = config.attention, config.head_width, len(x)
    order, theta = order_of(config, layer)
    to_all = sees_all(config, layer)

    def heads(name: str) -> torch.Tensor:
        return (x @ state[f"{name}.weight"].T).view(tokens, -1, width).transpose(0, 1)

    def placed(name: str) -> torch.Tensor:
        parts = heads(name)
        if flags.qk_norm:
            over = -1 if flags.qk_norm_over == "head" else (0, -1)
            parts = parts / (parts.square().mean(over, keepdim=True) + config.norm_eps).sqrt()
            parts = parts * state[f"{name}_norm.weight"].view(-1, 1, width)
        if order == "rope":
            angles = torch.outer(torch.arange(tokens).double(), theta ** (-torch.arange(0, width, 2).double() / width))
            turned = torch.complex(parts[..., : width // 2], parts[..., width // 2 :]) * torch.polar(
                torch.ones_like(angles), angles
            )
            parts = torch.cat((turned.real, turned.imag), -1)
        return parts

    shared = config.heads // config.kv_head_count
    query, key, value = placed("q"), placed("k").repeat_interleave(shared, 0), heads("v").repeat_interleave(shared, 0)
    logits = query @ key.transpose(1, 2) / math.sqrt(width)
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    if flags.log_n_scale and to_all:
        logits = logits * state["log_scale"][:, None, None] * torch.arange(1, tokens + 1).double().log()[:, None]
    if order == "alibi":
        slopes = torch.tensor([alibi_slope(head, config.heads) for head in range(config.heads)]).double()
        logits = logits - slopes[:, None, None] * distance
    hidden = distance < 0
    if not to_all and flags.window_tokens is not None:
        hidden = hidden | (distance >= flags.window_tokens)
    logits = logits.masked_fill(hidden, -math.inf)
    if flags.sink:
        logits = torch.cat((logits, state["sink"][:, None, None].expand(-1, tokens, 1)), -1)
    mixed = logits.softmax(-1)[..., :tokens] @ value
    if flags.output_gate:
        opened = (x @ state["gate.weight"].T + state["gate.bias"]).sigmoid()
        mixed = mixed * opened.view(tokens, config.heads, -1).transpose(0, 1)
    return mixed.transpose(0, 1).reshape(tokens, -1) @ state["out.weight"].T


def feed_forward(state: Mapping[str, Array], prefix: str, config: ModelConfig, x: Array) -> Array:
    """down(silu(gate x) * up x), likewise with gelu by tanh, and down(f(up x)) with others, for one vector."""
    inner = linear(state, f"{prefix}.up", x)
    if config.feed_forward in ("swiglu", "geglu"):
        inner = bent(config, linear(state, f"{prefix}.gate", x)) * inner
    else:
        inner = bent(config, inner)
    return linear(state, f"{prefix}.down", inner)


def bent(config: ModelConfig, x: Array) -> Array:
    """The function of the feed-forward, of each number."""
    bend = math.sqrt(2.0 / math.pi)
    of_kind = {
        "swiglu": lambda g: g / (1.0 + math.exp(-g)),
        "silu": lambda g: g / (1.0 + math.exp(-g)),
        "geglu": lambda g: 0.5 * g * (1.0 + math.tanh(bend * (g + 0.044715 * g**3))),
        "gelu": lambda g: 0.5 * g * (1.0 + math.erf(g / math.sqrt(2.0))),
        "relu": lambda g: max(0.0, g),
        "relu2": lambda g: max(0.0, g) ** 2,
    }
    return np.array([of_kind[config.feed_forward](float(value)) for value in x])


def logits(
    state: Mapping[str, Array],
    config: ModelConfig,
    input_ids: Sequence[int],
    source_ids: Sequence[int] = (),
    factors: Mapping[str, float] | None = None,
) -> Array:
    """(T, V) logits of one document, in an encoder_decoder behind its source.

    Args:
        state: canonical name -> float64 array.
        factors: b / p of each block, by its name; None: they are 1.
    """
    memory: list[Array] = []
    if config.architecture == "encoder_decoder":
        memory = through(state, config, "encoder.", embedded(state, config, source_ids), [], factors)
    stream = through(state, config, "", embedded(state, config, input_ids), memory, factors)
    head = state["embedding.weight" if config.tie_embeddings else "head.weight"]
    if config.output_head == "transform":  # arXiv 1810.04805, the authors' get_masked_lm_output
        stream = [bent(config, linear(state, "head.transform.dense", x)) for x in stream]
        stream = [norm(state, "head.transform.norm", config, x) for x in stream]
    return np.stack([head @ x + state.get("head.bias", 0.0) for x in stream])


def embedded(state: Mapping[str, Array], config: ModelConfig, input_ids: Sequence[int]) -> list[Array]:
    """The stream as it begins."""
    stream = [state["embedding.weight"][token] for token in input_ids]
    if config.attention.position == "sinusoidal":  # arXiv 1706.03762, section 3.4: a shared matrix times sqrt(d)
        factor = math.sqrt(config.d_model) if config.tie_embeddings else 1.0
        stream = [factor * x + sinusoid(position, config.d_model) for position, x in enumerate(stream)]
    if config.attention.position == "learned":
        stream = [x + state["embedding.positions"][position] for position, x in enumerate(stream)]
    return [norm(state, "embedding.norm", config, x) for x in stream] if config.embedding_norm else stream


def depth_and_branches(config: ModelConfig, name: str) -> tuple[int, int]:
    """Layers of the stack that a name belongs to, and branches of each."""
    if name.startswith("encoder."):
        return config.encoder_layers or config.layers, 2
    return config.layers, 3 if config.architecture == "encoder_decoder" else 2


def through(
    state: Mapping[str, Array],
    config: ModelConfig,
    prefix: str,
    stream: list[Array],
    memory: list[Array],
    factors: Mapping[str, float] | None = None,
) -> list[Array]:
    """What a stack, with its final norm, makes of one document."""
    depth, branches = depth_and_branches(config, prefix)
    first: list[Array] = []
    for layer in range(depth):
        for kind in (
            ["attention", "cross_attention", "feed_forward"] if branches == 3 else ["attention", "feed_forward"]
        ):
            block = f"{prefix}layers.{layer}"
            name = f"{block}.{kind}"
            read = [reads(state, name, config, layer, x) for x in stream]
            if kind == "feed_forward":
                found = [feed_forward(state, name, config, x) for x in read]
            elif kind == "cross_attention":
                found = attention_to_all(state, name, config, read, memory)
            else:
                values = [linear(state, f"{name}.v", x) for x in read]
                if layer == 0:
                    first = values
                elif config.value_residual:  # arXiv 2410.17897
                    own, of_first = (float(number) for number in state[f"{block}.attention_value_mix"])
                    values = [own * v + of_first * v1 for v, v1 in zip(values, first, strict=True)]
                if prefix or config.architecture == "encoder":
                    found = attention_to_all(state, name, config, read, read, values)
                else:
                    found = attention(state, name, config, read, layer, values)
            factor = 1.0 if factors is None else factors[block]
            stream = [added(state, name, config, layer, x, b, factor) for x, b in zip(stream, found, strict=True)]
    if residual(config) not in ("postnorm", "deepnorm") and (residual(config) != "keel" or depth == 1):
        stream = [norm(state, f"{prefix}final_norm", config, x) for x in stream]
    return stream


def residual(config: ModelConfig) -> str:
    """The mode, `auto` by depth."""
    if config.residual != "auto":
        return config.residual
    assert config.architecture == "decoder", "of others the tests say which"
    return "scaled" if config.layers > config.base_layers else "prenorm"


def norm(state: Mapping[str, Array], name: str, config: ModelConfig, x: Array) -> Array:
    """A norm of the stream on one vector."""
    if config.norm == "rmsnorm":
        return rms_norm(x, state[f"{name}.weight"], config.norm_eps)
    mean = float(sum(x)) / len(x)
    variance = sum((float(value) - mean) ** 2 for value in x) / len(x)
    normed = np.array([(float(value) - mean) / math.sqrt(variance + config.norm_eps) for value in x])
    return np.asarray(normed * state[f"{name}.weight"] + state[f"{name}.bias"])


def reads(state: Mapping[str, Array], branch: str, config: ModelConfig, layer: int, x: Array) -> Array:
    """What a branch reads of the stream."""
    mode = residual(config)
    if mode in ("postnorm", "outnorm", "deepnorm"):
        return x
    normed = norm(state, f"{branch}_norm", config, x)
    return normed / math.sqrt(layer + 1) if mode == "lns" else normed


def added(
    state: Mapping[str, Array], branch: str, config: ModelConfig, layer: int, x: Array, b: Array, factor: float
) -> Array:
    """The stream x with `factor` times what a branch gave, b, each mode as its paper writes it."""
    mode, (depth, branches) = residual(config), depth_and_branches(config, branch)
    if mode == "scaled":
        return x + factor * min(1.0, config.base_layers / depth) * b
    if mode in ("layerscale", "rezero"):
        return x + factor * state[f"{branch}_scale"] * b
    if mode in ("peri", "outnorm"):
        return x + factor * norm(state, f"{branch}_out_norm", config, b)
    b = factor * b
    if mode == "postnorm":
        return norm(state, f"{branch}_post_norm", config, x + b)
    if mode == "deepnorm":
        alpha = (branches * depth) ** 0.25
        if branch.startswith("encoder."):
            alpha = 0.81 * depth**0.25 * config.layers**0.0625
        return norm(state, f"{branch}_post_norm", config, alpha * x + b)
    if mode == "keel" and layer > 0:
        return norm(state, f"{branch}_post_norm", config, branches * depth * x + b)
    return x + b


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
