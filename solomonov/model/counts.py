"""How many parameters a model has and what a token costs, from its configuration alone. Imports no torch."""

from __future__ import annotations

from math import prod

from solomonov.model.config import ModelConfig
from solomonov.model.naming import layer_names
from solomonov.model.residual import branch_form


def parameter_shapes(config: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every parameter, in the order of the stack; a tied head has none."""
    width, inner = config.d_model, config.feed_forward_width
    queries = config.heads * config.head_width
    keys = config.kv_head_count * config.head_width
    attention: dict[str, tuple[int, ...]] = {
        **_head_scalars(config),
        "attention.q.weight": (queries, width),
        "attention.k.weight": (keys, width),
        "attention.v.weight": (keys, width),
        "attention.out.weight": (width, queries),
        **_flag_shapes(config),
    }
    gate: dict[str, tuple[int, ...]] = {"feed_forward.gate.weight": (inner, width)} if config.gated else {}
    feed_forward = gate | {"feed_forward.up.weight": (inner, width), "feed_forward.down.weight": (width, inner)}
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in layer_names(config):
        if layer.startswith("layers."):
            index = int(layer.partition(".")[2])
            block = _scale_shapes(config, index)
            block |= _branch_norms(config, index, "attention") | attention
            block |= _branch_norms(config, index, "feed_forward") | feed_forward
            if not config.layer_attention(index).log_n:
                block.pop("attention.log_scale", None)
            shapes |= {f"{layer}.{name}": shape for name, shape in block.items()}
        elif layer == "final_norm":
            shapes |= _norm_shapes(config, "final_norm")
        elif layer == "embedding" or not config.tie_embeddings:
            shapes[f"{layer}.weight"] = (vocab_size, width)
    return shapes


def _scale_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Of the learned factors of a layer's branches."""
    size = {"none": 0, "scalar": 1, "channel": config.d_model}[branch_form(config, layer).learned]
    return dict.fromkeys(("attention_scale", "feed_forward_scale"), (size,)) if size else {}


def _branch_norms(config: ModelConfig, layer: int, branch: str) -> dict[str, tuple[int, ...]]:
    """Of the norms of the stream around one branch of a layer."""
    form, shapes = branch_form(config, layer), dict[str, tuple[int, ...]]()
    for place, wanted in (("norm", form.pre), ("out_norm", form.out), ("post_norm", form.post)):
        if wanted:
            shapes |= _norm_shapes(config, f"{branch}_{place}")
    return shapes


def _norm_shapes(config: ModelConfig, name: str) -> dict[str, tuple[int, ...]]:
    """Of a norm of the stream."""
    parameters = ("weight", "bias") if config.norm == "layernorm" else ("weight",)
    return {f"{name}.{parameter}": (config.d_model,) for parameter in parameters}


def _flag_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The modules that the attention's flags add to a block."""
    flags, shapes = config.attention, dict[str, tuple[int, ...]]()
    if flags.qk_norm:
        at_once = (config.heads, config.kv_head_count) if flags.qk_norm_over == "all" else (1, 1)
        for name, heads in zip("qk", at_once, strict=True):
            shapes[f"attention.{name}_norm.weight"] = (heads * config.head_width,)
    if flags.gate != "none":
        gates = config.heads * (config.head_width if flags.gate == "element" else 1)
        shapes |= {"attention.gate.weight": (gates, config.d_model), "attention.gate.bias": (gates,)}
    return shapes


def _head_scalars(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """What the attention's flags add to a block, one number a head; not all blocks have `log_scale`."""
    wanted = {"log_scale": config.attention.logit_scale == "log_n", "sink": config.attention.sink}
    return {f"attention.{name}": (config.heads,) for name, is_there in wanted.items() if is_there}


def visible_keys(sequence_tokens: int, window: int | None) -> float:
    """Keys that a query of a row of one document sees on average: (T + 1) / 2, in a window w of a longer row
    w - w (w - 1) / 2T."""
    if window is None or window >= sequence_tokens:
        return (sequence_tokens + 1) / 2
    return window - window * (window - 1) / (2 * sequence_tokens)


def parameter_count(config: ModelConfig, vocab_size: int) -> int:
    """Number of trained values; a tied matrix counts once."""
    return sum(prod(shape) for shape in parameter_shapes(config, vocab_size).values())


def layer_flops(config: ModelConfig, vocab_size: int, sequence_tokens: int) -> dict[str, int]:
    """Layer -> floating-point operations of its forward pass on one token, in the order of the stack.

    Two a value of each matrix that multiplies (the head, tied or not; not the embedding look-up, not the norms), and in
    a block the two attention products, each 2 * H * E operations per visible key, over the keys that a causal row shows
    on average, in local layers of the window. Rows of several documents show fewer: the figure is an upper bound.
    Source: Kaplan et al. (arXiv 2001.08361) and PaLM appendix B (arXiv 2204.02311), which counts all T keys.
    """
    costs = dict.fromkeys(layer_names(config), 0)
    for name, shape in parameter_shapes(config, vocab_size).items():
        if len(shape) == 2 and name.startswith("layers."):
            costs[".".join(name.split(".")[:2])] += 2 * prod(shape)
    for layer in costs:
        if layer.startswith("layers."):
            window = config.layer_attention(int(layer.partition(".")[2])).window
            keys = visible_keys(sequence_tokens, window)
            costs[layer] += round(4 * config.heads * config.head_width * keys)
    costs["head"] = 2 * vocab_size * config.d_model
    return costs


def flops_per_token(config: ModelConfig, vocab_size: int, sequence_tokens: int) -> float:
    """Floating-point operations to train on one token: those of `layer_flops` forward, twice as many backward, none
    computed again."""
    return 3.0 * sum(layer_flops(config, vocab_size, sequence_tokens).values())
