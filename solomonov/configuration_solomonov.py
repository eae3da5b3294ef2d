"""Configuration of a Solomonov model, for `transformers`. Stands beside `modeling_solomonov.py` and the weights."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


class SolomonovConfig(PreTrainedConfig):  # type: ignore[misc]
    """Shape of the model, layer by layer.

    Args:
        blocks: of each layer how it tells order (`position`: rope, nope or alibi; `rope_theta`), how many keys a query
            sees at most (`window`; None: all), whether its logits grow with ln of the number of keys (`log_n`), whether
            a learned logit a head takes part in the softmax (`sink`), and the constants of
            x' = norm_post(alpha * x + scale * norm_out(f(inner * norm_pre(x)))): `pre`, `out`, `post` say which norms
            there are, `learned` whether scale is a parameter (none, channel or scalar).
        encoder_blocks: likewise of the layers that read a source; empty: there is none.
        feed_forward: swiglu, geglu, gelu, relu, silu or relu2.
        bias: whether the matrices of the layers have biases.
        norm: rmsnorm or layernorm.
        qk_norm: none, head, or all heads together.
        gate: of what attention found: none, one a head, or one an element.
        value_residual: whether the values behind the first layer are lam1 * V + lam2 * V_1, of the first one.
        sinusoidal: whether sinusoids are added to the embedding, which is multiplied by `embedding_scale` before.
        learned_positions: for how many positions there are vectors to add to the embedding; 0: none.
        embedding_norm: whether the stream begins with a norm.
        output_head: linear, with a bias, or behind a transform of its own.
        final_norm: whether a norm stands before the head.
        encoder_final_norm: whether one stands behind the layers that read a source.
    """

    model_type = "solomonov"

    def __init__(
        self,
        vocab_size: int = 32,
        hidden_size: int = 16,
        intermediate_size: int = 48,
        num_attention_heads: int = 2,
        num_key_value_heads: int = 2,
        head_dim: int = 8,
        blocks: list[dict[str, Any]] | None = None,
        **rest: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.head_dim, self.blocks = head_dim, blocks or []
        self.num_hidden_layers = len(self.blocks)
        self.encoder_blocks: list[dict[str, Any]] = rest.pop("encoder_blocks", [])
        self.feed_forward = rest.pop("feed_forward", "swiglu")
        self.bias = rest.pop("bias", False)
        self.norm = rest.pop("norm", "rmsnorm")
        self.norm_eps = rest.pop("norm_eps", 1e-6)
        self.qk_norm = rest.pop("qk_norm", "none")
        self.gate = rest.pop("gate", "none")
        self.value_residual = rest.pop("value_residual", False)
        self.sinusoidal = rest.pop("sinusoidal", False)
        self.embedding_scale = rest.pop("embedding_scale", 1.0)
        self.learned_positions = rest.pop("learned_positions", 0)
        self.embedding_norm = rest.pop("embedding_norm", False)
        self.output_head = rest.pop("output_head", "linear")
        self.final_norm = rest.pop("final_norm", True)
        self.encoder_final_norm = rest.pop("encoder_final_norm", True)
        self.max_position_embeddings = rest.pop("max_position_embeddings", 2048)
        rest.pop("num_hidden_layers", None)
        super().__init__(**rest)
