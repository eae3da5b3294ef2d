"""Layers of a Solomonov model in plain PyTorch, for `modeling_solomonov`, which stands beside it.

Letters in shapes: B rows, T new tokens, S tokens with those in the cache, or of the source, D width, H query heads, K
key-value heads, E width of a head, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from .configuration_solomonov import SolomonovConfig


class Norm(nn.Module):
    """RMSNorm, or with a bias LayerNorm, computed in fp32."""

    def __init__(self, width: int, eps: float, *, with_mean: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if with_mean else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width) in the dtype of x."""
        wide = x.float()
        if self.bias is not None:
            gain, shift = self.weight.float(), self.bias.float()
            return functional.layer_norm(wide, gain.shape, gain, shift, self.eps).to(x.dtype)
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight.float()).to(x.dtype)


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Turn the pairs (x_i, x_{i + E/2}) by position * theta^(-2i/E).

    Args:
        x: (B, heads, T, E).
        positions: (B, T).
    """
    width = x.shape[-1]
    pairs = torch.arange(0, width, 2, dtype=torch.float32, device=x.device)
    angles = positions[:, None, :, None].float() * (1.0 / theta ** (pairs / width))
    cosine, sine = angles.cos(), angles.sin()
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x.dtype)


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8 (h + 1) / H); for other numbers than powers of 2 those of the next lower one, and then every second one of
    the next higher one."""
    lower = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (head + 1) / lower) for head in range(lower)]
    between = [2.0 ** (-8.0 * (head + 1) / (2 * lower)) for head in range(0, 2 * lower, 2)]
    return (slopes + between)[:heads]


class Projections(nn.Module):
    """What attention and cross-attention have."""

    def __init__(self, config: SolomonovConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q = nn.Linear(config.hidden_size, queries, bias=config.bias)
        self.k = nn.Linear(config.hidden_size, keys, bias=config.bias)
        self.v = nn.Linear(config.hidden_size, keys, bias=config.bias)
        self.out = nn.Linear(queries, config.hidden_size, bias=config.bias)
        self.normed_together = config.qk_norm == "all"
        self.q_norm, self.k_norm, self.gate = None, None, None
        if config.qk_norm != "none":
            self.q_norm = Norm(queries if self.normed_together else self.head_dim, config.norm_eps)
            self.k_norm = Norm(keys if self.normed_together else self.head_dim, config.norm_eps)
        if config.gate != "none":
            self.gate = nn.Linear(config.hidden_size, queries if config.gate == "element" else self.heads)

    def query_of(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, H, T, E), normed."""
        split = self.q(x).view(*x.shape[:2], self.heads, self.head_dim)
        return self._normed(split, self.q_norm).transpose(1, 2)

    def key_of(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, K, S, E), normed."""
        split = self.k(x).view(*x.shape[:2], self.kv_heads, self.head_dim)
        return self._normed(split, self.k_norm).transpose(1, 2)

    def value_of(self, value: Tensor) -> Tensor:
        """(B, S, K * E) -> (B, K, S, E)."""
        return value.view(*value.shape[:2], self.kv_heads, self.head_dim).transpose(1, 2)

    def each(self, shared: Tensor) -> Tensor:
        """(B, K, S, E) -> (B, H, S, E)."""
        return shared.repeat_interleave(self.heads // self.kv_heads, dim=1)

    def joined(self, mixed: Tensor, x: Tensor) -> Tensor:
        """What the heads found, (B, H, T, E) -> (B, T, D)."""
        rows, tokens = x.shape[:2]
        mixed = mixed.transpose(1, 2)
        if self.gate is not None:
            mixed = mixed * torch.sigmoid(self.gate(x)).view(rows, tokens, self.heads, -1)
        return self.out(mixed.reshape(rows, tokens, self.heads * self.head_dim))  # type: ignore[no-any-return]

    def _normed(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """(B, T, heads, E) likewise."""
        if norm is None:
            return x
        normed: Tensor = norm(x.flatten(2)).view_as(x) if self.normed_together else norm(x)
        return normed


class Attention(Projections):
    """Attention of one layer.

    Args:
        kind: what `config.blocks` says of it.
    """

    def __init__(self, config: SolomonovConfig, kind: dict[str, Any], layer: int) -> None:
        super().__init__(config, layer)
        self.kind = kind
        self.log_scale = nn.Parameter(torch.ones(self.heads)) if kind["log_n"] else None
        self.sink = nn.Parameter(torch.zeros(self.heads)) if kind["sink"] else None

    def forward(self, x: Tensor, value: Tensor, positions: Tensor, seen: Tensor, cache: Any | None) -> Tensor:
        """(B, T, D) -> (B, T, D).

        Args:
            value: (B, T, K * E), of these tokens.
            positions: (B, T).
            seen: (B, T, S) bool, tokens that are none of the padding, in a decoder earlier ones.
        """
        query, key, value = self.query_of(x), self.key_of(x), self.value_of(value)
        if self.kind["position"] == "rope":
            query = rotate(query, positions, self.kind["rope_theta"])
            key = rotate(key, positions, self.kind["rope_theta"])
        if self.log_scale is not None:
            visible = (positions[:, None, :, None] + 1).float().log()
            query = (query.float() * self.log_scale.float()[:, None, None] * visible).to(query.dtype)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        weights = self._weights(query, self.each(key), seen).to(value.dtype)
        return self.joined(weights @ self.each(value), x)

    def _weights(self, query: Tensor, key: Tensor, seen: Tensor) -> Tensor:
        """(B, H, T, S) fp32, each row summing up to 1, or to less where a sink takes its part."""
        tokens, total = seen.shape[1:]
        index = torch.arange(total, device=query.device)
        distance = index[total - tokens :, None] - index
        if self.kind["window"] is not None:
            seen = seen & (distance < self.kind["window"])
        logits = (query @ key.transpose(2, 3)).float() / math.sqrt(self.head_dim)
        if self.kind["position"] == "alibi":
            slopes = torch.tensor(alibi_slopes(self.heads), device=query.device)
            logits = logits - slopes[:, None, None] * distance
        logits = logits.masked_fill(~seen[:, None], -torch.inf)
        if self.sink is None:
            return logits.softmax(dim=-1)
        sink = self.sink.float()[None, :, None, None].expand(*logits.shape[:3], 1)
        return torch.cat((logits, sink), dim=-1).softmax(dim=-1)[..., :-1]


class CrossAttention(Projections):
    """Attention to all that the encoder made of the source, without positions."""

    def forward(self, x: Tensor, source: Tensor, mask: Tensor, cache: Any | None) -> Tensor:
        """(B, T, D) -> (B, T, D).

        Args:
            source: (B, S, D).
            mask: (B, S) bool, false on padding; where there is nothing else, nothing is found.
        """
        if cache is not None and cache.is_updated.get(self.layer):
            kept = cache.cross_attention_cache.layers[self.layer]
            key, value = kept.keys, kept.values
        else:
            key, value = self.key_of(source), self.value_of(self.v(source))
            if cache is not None:
                key, value = cache.cross_attention_cache.update(key, value, self.layer)
                cache.is_updated[self.layer] = True
        logits = (self.query_of(x) @ self.each(key).transpose(2, 3)).float() / math.sqrt(self.head_dim)
        seen, any_seen = mask[:, None, None], mask.any(dim=1)[:, None, None, None]
        weights = logits.masked_fill(~(seen | ~any_seen), -torch.inf).softmax(dim=-1).to(value.dtype)
        return self.joined((weights @ self.each(value)).masked_fill(~any_seen, 0.0), x)


def activation(kind: str, x: Tensor) -> Tensor:
    """The function of a feed-forward."""
    if kind in ("swiglu", "silu"):
        return functional.silu(x)
    if kind in ("geglu", "gelu"):
        return functional.gelu(x, approximate="tanh" if kind == "geglu" else "none")
    return functional.relu(x) if kind == "relu" else functional.relu(x).square()


class FeedForward(nn.Module):
    """What each token is mapped to on its own."""

    def __init__(self, config: SolomonovConfig) -> None:
        super().__init__()
        self.kind = config.feed_forward
        gated = self.kind in ("swiglu", "geglu")
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias) if gated else None
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        inner = self.up(x)
        bent = activation(self.kind, inner) if self.gate is None else activation(self.kind, self.gate(x)) * inner
        return self.down(bent)  # type: ignore[no-any-return]


class Block(nn.Module):
    """All branches of a layer: x' = norm_post(alpha * x + scale * norm_out(f(inner * norm_pre(x)))).

    Args:
        form: what `config.blocks` says of it.
        crossed: whether it also looks at a source.
    """

    def __init__(self, config: SolomonovConfig, form: dict[str, Any], layer: int, *, crossed: bool = False) -> None:
        super().__init__()
        self.form = form

        def norm(wanted: bool) -> nn.Module | None:
            return Norm(config.hidden_size, config.norm_eps, with_mean=config.norm == "layernorm") if wanted else None

        def scale() -> nn.Parameter | None:
            size = {"none": 0, "scalar": 1, "channel": config.hidden_size}[form["learned"]]
            return nn.Parameter(torch.ones(size)) if size else None

        for branch in ("attention", *(("cross_attention",) if crossed else ()), "feed_forward"):
            for part, wanted in (("norm", form["pre"]), ("out_norm", form["out"]), ("post_norm", form["post"])):
                setattr(self, f"{branch}_{part}", norm(wanted))
            setattr(self, f"{branch}_scale", scale())
        self.attention = Attention(config, form, layer)
        self.cross_attention = CrossAttention(config, layer) if crossed else None
        self.feed_forward = FeedForward(config)
        mixes = config.value_residual and layer > 0
        self.attention_value_mix = nn.Parameter(torch.full((2,), 0.5)) if mixes else None

    def forward(
        self,
        hidden: Tensor,
        first: Tensor | None,
        positions: Tensor,
        seen: Tensor,
        cache: Any | None,
        memory: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(B, T, D) -> (B, T, D), and the values of the first layer, (B, T, K * E), which that one is not given.

        Args:
            memory: the source (B, S, D), and (B, S) bool what of it is none of the padding.
        """
        read = self._read(hidden, "attention")
        value = self.attention.v(read)
        first = value if first is None else first
        if self.attention_value_mix is not None:
            mix = self.attention_value_mix.to(value.dtype)
            value = mix[0] * value + mix[1] * first
        of_itself = cache.self_attention_cache if cache is not None and memory is not None else cache
        hidden = self._add(hidden, "attention", self.attention(read, value, positions, seen, of_itself))
        if self.cross_attention is not None and memory is not None:
            branch = self.cross_attention(self._read(hidden, "cross_attention"), *memory, cache)
            hidden = self._add(hidden, "cross_attention", branch)
        return self._add(hidden, "feed_forward", self.feed_forward(self._read(hidden, "feed_forward"))), first

    def _read(self, hidden: Tensor, branch: str) -> Tensor:
        pre = getattr(self, f"{branch}_norm")
        read: Tensor = self.form["inner"] * (hidden if pre is None else pre(hidden))
        return read

    def _add(self, hidden: Tensor, name: str, branch: Tensor) -> Tensor:
        out, learned, post = (getattr(self, f"{name}_{part}") for part in ("out_norm", "scale", "post_norm"))
        branch = branch if out is None else out(branch)
        branch = self.form["scale"] * branch if learned is None else learned.to(branch.dtype) * branch
        total: Tensor = self.form["alpha"] * hidden + branch
        if post is not None:
            total = post(total)
        return total


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """(B, T) -> (B, T, D) fp32: sin(position / 10000^(2i/D)) at channel 2i and its cosine at 2i + 1."""
    channels = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device)
    angles = positions[..., None].double() * 10_000.0 ** (-channels / width)
    return torch.stack((angles.sin().float(), angles.cos().float()), dim=-1).flatten(-2)[..., :width]


class Embedding(nn.Embedding):
    """Token ids to vectors; sinusoids or learned positions are added, and the sum may be normed."""

    def __init__(self, config: SolomonovConfig) -> None:
        super().__init__(config.vocab_size, config.hidden_size)
        self.sinusoidal, self.scale, self.positions, self.norm = config.sinusoidal, config.embedding_scale, None, None
        if config.learned_positions:
            self.positions = nn.Parameter(torch.zeros(config.learned_positions, config.hidden_size))
        if config.embedding_norm:
            self.norm = Norm(config.hidden_size, config.norm_eps, with_mean=config.norm == "layernorm")

    def forward(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """(B, T) integers -> (B, T, D).

        Args:
            positions: (B, T).
        """
        vectors: Tensor = super().forward(input_ids)
        if positions is not None and self.positions is not None:
            vectors = (vectors.float() + functional.embedding(positions, self.positions).float()).to(vectors.dtype)
        elif positions is not None and self.sinusoidal:
            places = sinusoids(positions, vectors.shape[-1])
            vectors = (vectors.float() * self.scale + places).to(vectors.dtype)
        return vectors if self.norm is None else self.norm(vectors)


class HeadTransform(nn.Module):
    """norm(f(A h + a)), with the function f of the feed-forward."""

    def __init__(self, config: SolomonovConfig) -> None:
        super().__init__()
        self.kind = config.feed_forward
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = Norm(config.hidden_size, config.norm_eps, with_mean=config.norm == "layernorm")

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.norm(activation(self.kind, self.dense(hidden)))  # type: ignore[no-any-return]


class Head(nn.Linear):
    """Hidden states to logits."""

    def __init__(self, config: SolomonovConfig) -> None:
        super().__init__(config.hidden_size, config.vocab_size, bias=config.output_head != "linear")
        self.transform = HeadTransform(config) if config.output_head == "transform" else None

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return super().forward(hidden if self.transform is None else self.transform(hidden))
