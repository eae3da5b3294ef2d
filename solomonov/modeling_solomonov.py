"""A Solomonov model in plain PyTorch, for inference with `transformers`. Needs nothing but torch and transformers.

Load a decoder with AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True), an encoder with
AutoModelForMaskedLM. Letters in shapes: B rows, T new
tokens, S tokens with those in the cache, D width, H query heads, K key-value heads, E width of a head, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput

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


class Attention(nn.Module):
    """Attention of one layer."""

    def __init__(self, config: SolomonovConfig, layer: int) -> None:
        super().__init__()
        self.kind, self.layer = config.blocks[layer], layer
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
        self.log_scale = nn.Parameter(torch.ones(self.heads)) if self.kind["log_n"] else None
        self.sink = nn.Parameter(torch.zeros(self.heads)) if config.sink else None

    def forward(self, x: Tensor, value: Tensor, positions: Tensor, seen: Tensor, cache: Any | None) -> Tensor:
        """(B, T, D) -> (B, T, D).

        Args:
            value: (B, T, K * E), of these tokens.
            positions: (B, T).
            seen: (B, T, S) bool, tokens that are none of the padding, in a decoder earlier ones.
        """
        rows, tokens, _ = x.shape
        query = self._normed(self.q(x).view(rows, tokens, self.heads, self.head_dim), self.q_norm).transpose(1, 2)
        key = self._normed(self.k(x).view(rows, tokens, self.kv_heads, self.head_dim), self.k_norm).transpose(1, 2)
        value = value.view(rows, tokens, self.kv_heads, self.head_dim).transpose(1, 2)
        if self.kind["position"] == "rope":
            query = rotate(query, positions, self.kind["rope_theta"])
            key = rotate(key, positions, self.kind["rope_theta"])
        if self.log_scale is not None:
            visible = (positions[:, None, :, None] + 1).float().log()
            query = (query.float() * self.log_scale.float()[:, None, None] * visible).to(query.dtype)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        shared = self.heads // self.kv_heads
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
        weights = self._weights(query, key, seen).to(value.dtype)
        mixed = (weights @ value).transpose(1, 2)
        if self.gate is not None:
            mixed = mixed * torch.sigmoid(self.gate(x)).view(rows, tokens, self.heads, -1)
        mixed = mixed.reshape(rows, tokens, self.heads * self.head_dim)
        return self.out(mixed)  # type: ignore[no-any-return]

    def _normed(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """(B, T, heads, E) likewise."""
        if norm is None:
            return x
        normed: Tensor = norm(x.flatten(2)).view_as(x) if self.normed_together else norm(x)
        return normed

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
    """Both branches of a layer: x' = norm_post(alpha * x + scale * norm_out(f(inner * norm_pre(x))))."""

    def __init__(self, config: SolomonovConfig, layer: int) -> None:
        super().__init__()
        self.form = form = config.blocks[layer]

        def norm(wanted: bool) -> nn.Module | None:
            return Norm(config.hidden_size, config.norm_eps, with_mean=config.norm == "layernorm") if wanted else None

        def scale() -> nn.Parameter | None:
            size = {"none": 0, "scalar": 1, "channel": config.hidden_size}[form["learned"]]
            return nn.Parameter(torch.ones(size)) if size else None

        self.attention_norm, self.attention_out_norm = norm(form["pre"]), norm(form["out"])
        self.attention_post_norm, self.attention_scale = norm(form["post"]), scale()
        self.attention = Attention(config, layer)
        self.feed_forward_norm, self.feed_forward_out_norm = norm(form["pre"]), norm(form["out"])
        self.feed_forward_post_norm, self.feed_forward_scale = norm(form["post"]), scale()
        self.feed_forward = FeedForward(config)
        mixes = config.value_residual and layer > 0
        self.attention_value_mix = nn.Parameter(torch.full((2,), 0.5)) if mixes else None

    def forward(
        self, hidden: Tensor, first: Tensor | None, positions: Tensor, seen: Tensor, cache: Any | None
    ) -> tuple[Tensor, Tensor]:
        """(B, T, D) -> (B, T, D), and the values of the first layer, (B, T, K * E), which that one is not given."""
        read = hidden if self.attention_norm is None else self.attention_norm(hidden)
        read = self.form["inner"] * read
        value = self.attention.v(read)
        first = value if first is None else first
        if self.attention_value_mix is not None:
            mix = self.attention_value_mix.to(value.dtype)
            value = mix[0] * value + mix[1] * first
        branch = self.attention(read, value, positions, seen, cache)
        hidden = self._add(hidden, branch, self.attention_out_norm, self.attention_scale, self.attention_post_norm)
        read = hidden if self.feed_forward_norm is None else self.feed_forward_norm(hidden)
        branch = self.feed_forward(self.form["inner"] * read)
        norms = self.feed_forward_out_norm, self.feed_forward_post_norm
        return self._add(hidden, branch, norms[0], self.feed_forward_scale, norms[1]), first

    def _add(
        self,
        hidden: Tensor,
        branch: Tensor,
        out: nn.Module | None,
        learned: nn.Parameter | None,
        post: nn.Module | None,
    ) -> Tensor:
        branch = branch if out is None else out(branch)
        branch = self.form["scale"] * branch if learned is None else learned.to(branch.dtype) * branch
        total: Tensor = self.form["alpha"] * hidden + branch
        return total if post is None else post(total)


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


class SolomonovModel(PreTrainedModel):  # type: ignore[misc]
    """What decoder and encoder share."""

    config_class = SolomonovConfig
    base_model_prefix = ""
    _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: SolomonovConfig) -> None:
        super().__init__(config)
        self.embedding = Embedding(config)
        self.layers = nn.ModuleList([Block(config, layer) for layer in range(len(config.blocks))])
        with_mean = config.norm == "layernorm"
        self.final_norm = Norm(config.hidden_size, config.norm_eps, with_mean=with_mean) if config.final_norm else None
        self.head = Head(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.head

    def logits_of(self, input_ids: Tensor, positions: Tensor, seen: Tensor, cache: Any | None = None) -> Tensor:
        """(B, T, V).

        Args:
            positions: (B, T).
            seen: (B, T, S) bool, which tokens each sees.
        """
        hidden, first = self.embedding(input_ids, positions), None
        for block in self.layers:
            hidden, first = block(hidden, first, positions, seen, cache)
        if self.final_norm is not None:
            hidden = self.final_norm(hidden)
        return self.head(hidden)  # type: ignore[no-any-return]


class SolomonovForMaskedLM(SolomonovModel):
    """Encoder: each token sees all."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **rest: Any
    ) -> MaskedLMOutput:
        """Logits (B, T, V), and with labels the loss.

        Args:
            input_ids: (B, T) integers.
            attention_mask: (B, T), 0 on padding; None: there is none.
            labels: (B, T), -100 where nothing is predicted.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        positions = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
        itself = torch.eye(input_ids.shape[1], dtype=torch.bool, device=input_ids.device)
        logits = self.logits_of(input_ids, positions, attention_mask.bool()[:, None] | itself)
        loss = None if labels is None else functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)


class SolomonovForCausalLM(SolomonovModel, GenerationMixin):  # type: ignore[misc]
    """Decoder-only Transformer."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **rest: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), and with labels the loss.

        Args:
            input_ids: (B, T) integers, after the tokens in the cache.
            attention_mask: (B, S), 0 on padding; None: there is none.
            labels: (B, T), -100 where nothing is predicted.
        """
        rows, tokens = input_ids.shape
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache()
        total = tokens + (0 if past_key_values is None else past_key_values.get_seq_length())
        if attention_mask is None:
            attention_mask = torch.ones(rows, total, dtype=torch.long, device=input_ids.device)
        positions = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, total - tokens :]
        index = torch.arange(total, device=input_ids.device)
        earlier, itself = index[total - tokens :, None] >= index, index[total - tokens :, None] == index
        # Padding sees itself, or its softmax would be of nothing.
        seen = (earlier & attention_mask.bool()[:, None]) | itself
        logits = self.logits_of(input_ids, positions, seen, past_key_values)
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
