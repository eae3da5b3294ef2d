"""How many parameters a model has and what a token costs, from its configuration alone. Imports no torch."""

from __future__ import annotations

from math import prod

from solomonov.model.config import ModelConfig
from solomonov.model.naming import layer_names


def parameter_shapes(config: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every parameter, in the order of the stack; a tied head has none."""
    width, inner = config.d_model, config.feed_forward_width
    queries = config.heads * config.head_width
    keys = config.kv_head_count * config.head_width
    block: dict[str, tuple[int, ...]] = {
        "attention_norm.weight": (width,),
        "attention.q.weight": (queries, width),
        "attention.k.weight": (keys, width),
        "attention.v.weight": (keys, width),
        "attention.out.weight": (width, queries),
    }
    if config.attention.qk_norm:
        block |= {
            "attention.q_norm.weight": (config.head_width,),
            "attention.k_norm.weight": (config.head_width,),
        }
    block |= {
        "feed_forward_norm.weight": (width,),
        "feed_forward.gate.weight": (inner, width),
        "feed_forward.up.weight": (inner, width),
        "feed_forward.down.weight": (width, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in layer_names(config):
        if layer.startswith("layers."):
            shapes |= {f"{layer}.{name}": shape for name, shape in block.items()}
        elif layer == "final_norm":
            shapes["final_norm.weight"] = (width,)
        elif layer == "embedding" or not config.tie_embeddings:
            shapes[f"{layer}.weight"] = (vocab_size, width)
    return shapes


def parameter_count(config: ModelConfig, vocab_size: int) -> int:
    """Number of trained values; a tied matrix counts once."""
    return sum(prod(shape) for shape in parameter_shapes(config, vocab_size).values())


def flops_per_token(config: ModelConfig, vocab_size: int, sequence_tokens: int) -> float:
    """Floating-point operations to train on one token, forward and backward, without recomputation.

        6 * M  +  6 * L * H * E * (T + 1)

    M counts the values of all matrices that multiply (the head, tied or not; not the embedding look-up, not
    the norms): two operations forward, four backward. The second term is the two attention products, each
    2 * H * E operations per visible key forward and twice that backward, over the (T + 1) / 2 keys that a
    causal row shows on average. Rows that hold several documents show fewer: the figure is an upper bound.
    Source: Kaplan et al. (arXiv 2001.08361) and PaLM appendix B (arXiv 2204.02311), which counts all T keys.
    """
    shapes = parameter_shapes(config, vocab_size)
    matrices = sum(prod(shape) for name, shape in shapes.items() if len(shape) == 2 and name.startswith("layers."))
    matrices += vocab_size * config.d_model
    attention = config.layers * config.heads * config.head_width * (sequence_tokens + 1)
    return 6.0 * (matrices + attention)
