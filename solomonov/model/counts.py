"""How many parameters a model has and what a token costs, from its configuration alone. Imports no torch."""

from __future__ import annotations

from math import prod

from solomonov.model.config import ModelConfig
from solomonov.model.naming import layer_names
from solomonov.model.residual import branch_form, mixes_values
from solomonov.model.stacks import Stack, block_number, stack_of
from solomonov.model.stochastic_depth import drop_rate


def parameter_shapes(config: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every parameter, in the order of the stack; a tied head has none."""
    width = config.d_model
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in layer_names(config):
        index = block_number(layer)
        if index is not None:
            block = _block_shapes(config, index, stack_of(config, layer))
            shapes |= {f"{layer}.{name}": shape for name, shape in block.items()}
        elif layer == "front":
            for name, matrix in config.front.matrices(width).items():
                shapes[f"front.{name}.weight"] = (matrix.outputs, matrix.inputs)
                shapes[f"front.{name}.bias"] = (matrix.outputs,)
        elif layer.endswith("final_norm"):
            shapes |= _norm_shapes(config, layer)
        elif layer == "embedding":
            shapes["embedding.weight"] = (vocab_size, width)
            if config.longest_tokens is not None:
                shapes["embedding.positions"] = (config.longest_tokens, width)
            shapes |= _norm_shapes(config, "embedding.norm") if config.embedding_norm else {}
        else:
            shapes |= _head_shapes(config, vocab_size)
    return shapes


def _head_shapes(config: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Of the head, but for a matrix that is the embedding's."""
    width = config.d_model
    shapes: dict[str, tuple[int, ...]] = {} if config.tie_embeddings else {"head.weight": (vocab_size, width)}
    if config.output_head != "linear":
        shapes["head.bias"] = (vocab_size,)
    if config.output_head == "transform":
        shapes |= {"head.transform.dense.weight": (width, width), "head.transform.dense.bias": (width,)}
        shapes |= _norm_shapes(config, "head.transform.norm")
    return shapes


def _block_shapes(config: ModelConfig, layer: int, stack: Stack) -> dict[str, tuple[int, ...]]:
    """Of one block of a stack, by the names that they have in it."""
    width, inner = config.d_model, config.feed_forward_width
    form, kind = branch_form(config, layer, stack), config.layer_attention(layer, stack)
    of_feed_forward = {"gate": (inner, width)} if config.gated else {}
    of_feed_forward |= {"up": (inner, width), "down": (width, inner)}
    of_branch = {
        "attention": {
            **({"attention.log_scale": (config.heads,)} if kind.log_n else {}),
            **({"attention.sink": (config.heads,)} if kind.sink else {}),
            **_projection_shapes(config, "attention"),
        },
        "cross_attention": _projection_shapes(config, "cross_attention"),
        "feed_forward": _matrix_shapes(config, "feed_forward", of_feed_forward),
    }
    size = {"none": 0, "scalar": 1, "channel": width}[form.learned]
    shapes: dict[str, tuple[int, ...]] = {f"{branch}_scale": (size,) for branch in stack.branches if size}
    shapes |= {"attention_value_mix": (2,)} if mixes_values(config, layer) else {}
    for branch in stack.branches:
        for place, wanted in (("norm", form.pre), ("out_norm", form.out), ("post_norm", form.post)):
            shapes |= _norm_shapes(config, f"{branch}_{place}") if wanted else {}
        shapes |= of_branch[branch]
    return shapes


def _matrix_shapes(
    config: ModelConfig, branch: str, matrices: dict[str, tuple[int, int]]
) -> dict[str, tuple[int, ...]]:
    """Of the matrices of a branch, each with its bias if it has one."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in matrices.items():
        shapes[f"{branch}.{name}.weight"] = shape
        if config.bias:
            shapes[f"{branch}.{name}.bias"] = shape[:1]
    return shapes


def _norm_shapes(config: ModelConfig, name: str) -> dict[str, tuple[int, ...]]:
    """Of a norm of the stream."""
    parameters = ("weight", "bias") if config.norm == "layernorm" else ("weight",)
    return {f"{name}.{parameter}": (config.d_model,) for parameter in parameters}


def _projection_shapes(config: ModelConfig, branch: str) -> dict[str, tuple[int, ...]]:
    """Of what every kind of attention has."""
    flags, width = config.attention, config.d_model
    queries, keys = config.heads * config.head_width, config.kv_head_count * config.head_width
    matrices = {"q": (queries, width), "k": (keys, width), "v": (keys, width), "out": (width, queries)}
    shapes: dict[str, tuple[int, ...]] = {}
    if flags.qk_norm:
        at_once = (config.heads, config.kv_head_count) if flags.qk_norm_over == "all" else (1, 1)
        for name, heads in zip("qk", at_once, strict=True):
            shapes[f"{name}_norm.weight"] = (heads * config.head_width,)
    if flags.output_gate:
        gates = config.heads if flags.output_gate == "head" else queries
        shapes |= {"gate.weight": (gates, width), "gate.bias": (gates,)}
    of_flags = {f"{branch}.{name}": shape for name, shape in shapes.items()}
    return _matrix_shapes(config, branch, matrices) | of_flags


def visible_keys(sequence_tokens: int, window: int | None) -> float:
    """Keys that a query of a row of one document sees on average: (T + 1) / 2, in a window w of a longer row
    w - w (w - 1) / 2T."""
    if window is None or window >= sequence_tokens:
        return (sequence_tokens + 1) / 2
    return window - window * (window - 1) / (2 * sequence_tokens)


def parameter_count(config: ModelConfig, vocab_size: int) -> int:
    """Number of trained values; a tied matrix counts once."""
    return sum(prod(shape) for shape in parameter_shapes(config, vocab_size).values())


def layer_flops(
    config: ModelConfig, vocab_size: int, sequence_tokens: int, source_tokens: int | None = None
) -> dict[str, int]:
    """Layer -> floating-point operations of its forward pass on one token, in the order of the stack; of blocks that
    stochastic depth passes by in some updates those that are expected of an update.

    Two a value of each matrix that multiplies (the head, tied or not, and the front as often as it does so for a token;
    not the embedding look-up, not the norms), and in a block the two attention products, each 2 * H * E operations per
    visible key: the keys that a causal row shows on average, in local layers those of the window, in an encoder all of
    the row, in cross-attention all of the source. Rows of several documents show fewer: the figure is an upper bound.
    Source: Kaplan et al. (arXiv 2001.08361) and PaLM appendix B (arXiv 2204.02311), which counts all T keys.

    Args:
        sequence_tokens: T, of a row.
        source_tokens: of a row of the source of an encoder_decoder (behind its front), where the token is one of the
            target, with its share of what is done once a token of the source; None: as many as `sequence_tokens`.
    """
    of_source = sequence_tokens if source_tokens is None else source_tokens
    costs = dict.fromkeys(layer_names(config), 0)
    for layer in costs:
        index = block_number(layer)
        if index is not None:
            costs[layer] = _block_flops(config, index, stack_of(config, layer), sequence_tokens, of_source)
    if "front" in costs:
        products = config.front.matrices(config.d_model).values()
        share = of_source / sequence_tokens if config.architecture == "encoder_decoder" else 1.0
        costs["front"] = round(2 * share * sum(each.outputs * each.inputs * each.times for each in products))
    costs["head"] = 2 * config.d_model * (vocab_size + (config.d_model if config.output_head == "transform" else 0))
    return costs


def _block_flops(config: ModelConfig, layer: int, stack: Stack, sequence_tokens: int, source_tokens: int) -> int:
    """Of one block, as `layer_flops` says."""
    share = source_tokens / sequence_tokens
    kind, reads_source = config.layer_attention(layer, stack), bool(stack.prefix)
    own = source_tokens if reads_source else sequence_tokens
    keys = visible_keys(own, kind.window) if kind.causal else float(own)
    keys += source_tokens if stack.crossed else 0.0
    cost = 4 * config.heads * config.head_width * keys * (share if reads_source else 1.0)
    for name, shape in _block_shapes(config, layer, stack).items():
        if len(shape) == 2:
            of_source = reads_source or name in ("cross_attention.k.weight", "cross_attention.v.weight")
            cost += 2 * prod(shape) * (share if of_source else 1.0)
    return round(cost * (1.0 - drop_rate(config, layer, stack)))


def flops_per_token(
    config: ModelConfig, vocab_size: int, sequence_tokens: int, source_tokens: int | None = None
) -> float:
    """Floating-point operations to train on one token: those of `layer_flops` forward, twice as many backward, none
    computed again; expected ones with stochastic depth."""
    return 3.0 * sum(layer_flops(config, vocab_size, sequence_tokens, source_tokens).values())
