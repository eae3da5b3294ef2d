"""The `model` section of the configuration: the shape of the Transformer. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from solomonov.model.attention_config import ENCODER_PRESET, AttentionConfig, LayerAttention
from solomonov.model.front_config import FrontConfig
from solomonov.model.residual import ResidualMode
from solomonov.model.stacks import Architecture, Stack, stacks_of
from solomonov.section import Section

RecomputeMode = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Recompute:
    """What the backward pass computes again instead of finding it kept."""

    mode: RecomputeMode = "none"
    """`selective`: all of a block but its products; `full`: all of it."""
    every: int = 1
    """With `full`: how many consecutive blocks are run again together, from the input of the first."""


DEEPNORM_LAYERS = 100
"""From which depth on `auto` takes deepnorm for an encoder_decoder: what was published for it at 100 to 1,000 layers
(arXiv 2203.00555), where `scaled` is known of decoders alone."""

NOTHING_AGAIN = Recompute()
"""All that the backward pass needs is kept."""


class ModelConfig(Section):
    """Shape of the model. The vocabulary is the tokenizer's and stands there."""

    architecture: Architecture = "decoder"
    """`decoder`: one causal stack that predicts the next token. `encoder`: one stack in which every token sees all of
    its document. `encoder_decoder`: an encoder reads a source, and a causal stack that also looks at what the encoder
    made of it (cross-attention) predicts a target."""

    front: FrontConfig = FrontConfig()
    """What the first stack reads: token ids, patches of images, or frames of sound."""

    layers: int = Field(default=12, ge=1)
    """Number of blocks (one attention and one feed-forward branch each); of an encoder_decoder those of its decoder,
    which have a cross-attention branch as well."""

    encoder_layers: int | None = Field(default=None, ge=1)
    """Number of blocks of the encoder of an encoder_decoder; null: as many as `layers`."""

    d_model: int = Field(default=256, ge=2)
    """Width of the residual stream."""

    heads: int = Field(default=8, ge=1)
    """Query heads."""

    kv_heads: int | None = Field(default=None, ge=1)
    """Key and value heads, each shared by heads / kv_heads query heads; null: as many as heads."""

    head_dim: int | None = Field(default=None, ge=2)
    """Width of one head, even where it is rotated; null: d_model / heads."""

    d_ff: int | None = Field(default=None, ge=1)
    """Inner width of the feed-forward; null: 8/3 of d_model, rounded up to a multiple of 16, and 4 times d_model where
    there is no gate: as many parameters."""

    residual: Literal["auto"] | ResidualMode = "auto"
    """How a branch is added to the stream (`solomonov/model/residual.py` has all as one form).

    `prenorm`: x + f(norm(x)), output projections start smaller by sqrt(2 * layers). `scaled`: x + s * f(norm(x)) with
    s = base_layers / layers (at most 1), so that one learning rate serves every depth. `lns`: the norm shrinks with
    depth. `layerscale`, `rezero`: s is learned. `peri`: the branch is normed too. `outnorm`: only what it gives is.
    `postnorm`, `deepnorm`, `keel`: the sum is normed. `auto`: prenorm up to base_layers, else scaled; in an
    encoder_decoder, of which the deeper stack counts, deepnorm from 100 layers on. What follows depth follows that of a
    block's own stack.
    """

    value_residual: bool = False
    """Whether the values of self-attention behind the first block of a stack are lam1 * V + lam2 * V_1, with V_1 those
    of the stack's first block and both numbers learned (ResFormer, arXiv 2410.17897)."""

    stochastic_depth: float = Field(default=0.0, ge=0.0, lt=1.0)
    """In which share of the updates the last block of a stack is passed by; the first never is, and those between them
    in proportion (`solomonov/model/stochastic_depth.py`)."""

    base_layers: int = Field(default=12, ge=1)
    """Depth at which `scaled` has s = 1: the depth at which the learning rate was found."""

    parameterization: Literal["sp", "mup", "completep"] = "sp"
    """How initial values, learning rates, decay and eps follow the shape (`solomonov/model/parameterization.py` has the
    table). `sp`: one rate for all parameters. `mup`: what was found at width base_d_model holds for every width.
    `completep`: that, and what was found at base_layers holds for every depth; its branches are `scaled`."""

    base_d_model: int | None = Field(default=None, ge=2)
    """With mup and completep: width at which the learning rate was found; null: this width."""

    attention: AttentionConfig = AttentionConfig()
    """How tokens look at each other."""

    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """`rmsnorm`: divided by the root of the mean square, with gains; `layernorm`: the mean is taken off before, and a
    bias is added."""

    norm_eps: float = Field(default=1e-6, gt=0.0, lt=1.0)
    """Added to the mean square, or the variance, in every norm."""

    feed_forward: Literal["swiglu", "geglu", "gelu", "relu", "silu", "relu2"] = "swiglu"
    """`swiglu`: down(silu(gate(x)) * up(x)); `geglu`: down(gelu(gate(x)) * up(x)); `gelu`: down(gelu(up(x))), and
    `relu` (as in 2017) and `silu` likewise; `relu2`: down(relu(up(x))^2)."""

    bias: bool = False
    """Whether all matrices of the blocks, of attention as of the feed-forward, add a bias."""

    embedding_norm: bool = False
    """Whether the stream of a stack that reads tokens begins with a norm: of the embedded token, positions that are
    added to it included."""

    output_head: Literal["linear", "bias", "transform"] = "linear"
    """What the last hidden state h becomes: `linear`: logits W h; `bias`: W h + b, a number a token of the vocabulary;
    `transform`: W norm(f(A h + a)) + b, with the function f of the feed-forward (as in BERT, arXiv 1810.04805)."""

    tie_embeddings: bool = False
    """Whether the output head shares the embedding's matrix W."""

    @model_validator(mode="before")
    @classmethod
    def _an_encoder_sees_all(cls, given: Any) -> Any:
        """Its preset where none is given; what is no mapping is refused by its own field."""
        if not isinstance(given, Mapping) or given.get("architecture") != "encoder":
            return given
        attention = given.get("attention", {})
        if not isinstance(attention, Mapping) or "preset" in attention:
            return given
        return {**given, "attention": {"preset": ENCODER_PRESET, **attention}}

    @model_validator(mode="after")
    def _shapes_agree(self) -> Self:
        if self.head_dim is None and self.d_model % self.heads:
            raise ValueError(
                f"d_model {self.d_model} does not divide into {self.heads} heads: give a d_model that is a "
                "multiple of heads, or set head_dim"
            )
        if self.heads % self.kv_head_count:
            raise ValueError(
                f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}: "
                "every key-value head serves the same number of query heads"
            )
        if self.head_width % 2 and any(
            self.layer_attention(layer, stack).position == "rope"
            for stack in self.stacks
            for layer in range(stack.layers)
        ):
            raise ValueError(
                f"a head is {self.head_width} wide, but rotary positions turn pairs: "
                f"give a d_model / heads (or head_dim) that is even, say head_dim {self.head_width + 1}, "
                "or set attention.position to nope or alibi"
            )
        return self

    @model_validator(mode="after")
    def _architecture_agrees(self) -> Self:
        if self.architecture != "encoder_decoder" and self.encoder_layers is not None:
            raise ValueError(
                f"encoder_layers {self.encoder_layers} with architecture {self.architecture}: there is one stack, "
                "whose depth is layers. Set encoder_layers to null, or architecture to encoder_decoder"
            )
        refusal = None if self.architecture == "decoder" else self.attention.encoder_refusal(self.architecture)
        if refusal is not None:
            raise ValueError(refusal)
        return self

    @model_validator(mode="after")
    def _front_agrees(self) -> Self:
        kind = self.front.kind
        if kind == "tokens":
            return self
        if self.architecture == "decoder":
            raise ValueError(
                f"front.kind {kind} with architecture decoder: what is predicted from what came before are tokens. Set "
                "architecture to encoder or encoder_decoder, or front.kind to tokens"
            )
        if self.tie_embeddings and not self.reads_tokens:
            raise ValueError(
                f"tie_embeddings with front.kind {kind} and architecture {self.architecture}: nothing reads tokens, "
                "and there is no embedding to share. Set tie_embeddings to false, or architecture to encoder_decoder"
            )
        if self.embedding_norm and not self.reads_tokens:
            raise ValueError(
                f"embedding_norm with front.kind {kind} and architecture {self.architecture}: nothing reads tokens, "
                "and there is no embedding to norm. Set embedding_norm to false, or architecture to encoder_decoder"
            )
        if self.attention.position == "learned":
            raise ValueError(
                f"attention.position learned with front.kind {kind}: learned positions are added to embedded tokens, "
                f"and {kind} would have none. Set attention.position to sinusoidal or rope"
            )
        if kind == "patches" and self.attention.position == "rope" and self.head_width % 4:
            raise ValueError(
                f"a head is {self.head_width} wide, but on patches rotary positions turn pairs by row and as many by "
                f"column: give a d_model / heads (or head_dim) that is a multiple of 4, say head_dim "
                f"{-(-self.head_width // 4) * 4}, or set attention.position to sinusoidal or nope"
            )
        return self

    @model_validator(mode="after")
    def _parameterization_agrees(self) -> Self:
        if self.parameterization == "completep" and self.residual_mode != "scaled":
            raise ValueError(
                f"parameterization completep with residual {self.residual}: its branches are scaled by base_layers / "
                "layers. Set residual to auto or scaled, or parameterization to mup"
            )
        if self.parameterization != "sp" and self.tie_embeddings:
            raise ValueError(
                f"parameterization {self.parameterization} with tie_embeddings: the head's values and rate follow the "
                "width, the embedding's do not. Set tie_embeddings to false, or parameterization to sp"
            )
        if self.parameterization == "sp" and self.base_d_model is not None:
            raise ValueError(
                f"base_d_model {self.base_d_model} with parameterization sp: nothing follows the width there. Set "
                "parameterization to mup or completep, or base_d_model to null"
            )
        return self

    @property
    def kv_head_count(self) -> int:
        """K, with the default filled in."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_width(self) -> int:
        """E, with the default filled in."""
        return self.d_model // self.heads if self.head_dim is None else self.head_dim

    @property
    def encoder_depth(self) -> int:
        """Blocks of the encoder of an encoder_decoder, with the default filled in."""
        return self.layers if self.encoder_layers is None else self.encoder_layers

    @property
    def depth(self) -> int:
        """Blocks of the deepest stack."""
        return max(stack.layers for stack in self.stacks)

    @property
    def block_count(self) -> int:
        """Blocks of all stacks."""
        return sum(stack.layers for stack in self.stacks)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The stacks of blocks in the order in which they run."""
        return stacks_of(self)

    @property
    def reads_tokens(self) -> bool:
        """Whether a stack reads token ids, for which there is an embedding."""
        return self.front.kind == "tokens" or self.architecture == "encoder_decoder"

    def grid_columns(self, stack: Stack | None = None) -> int | None:
        """Columns of the grid on which the tokens of a stack (None: the last one) stand; None: they stand in a row."""
        stack = self.stacks[-1] if stack is None else stack
        return self.front.columns if self.front.kind == "patches" and not stack.causal else None

    def layer_attention(self, layer: int, stack: Stack | None = None) -> LayerAttention:
        """What the attention of layer number `layer` of a stack does, from 0; None: of the last stack."""
        stack = self.stacks[-1] if stack is None else stack
        return self.attention.of_layer(layer, stack.layers) if stack.causal else self.attention.of_encoder()

    @property
    def feed_forward_width(self) -> int:
        """F, with the default filled in."""
        if self.d_ff is not None:
            return self.d_ff
        return -(-8 * self.d_model // (3 * 16)) * 16 if self.gated else 4 * self.d_model

    @property
    def longest_tokens(self) -> int | None:
        """Tokens of the longest row that learned positions reach; None: the positions of any row are known."""
        return self.attention.row_tokens if self.attention.position == "learned" else None

    @property
    def gated(self) -> bool:
        """Whether the feed-forward has a gate."""
        return self.feed_forward in ("swiglu", "geglu")

    @property
    def residual_mode(self) -> ResidualMode:
        """`residual` with `auto` decided by depth."""
        if self.residual == "auto" and self.parameterization == "completep":
            return "scaled"
        if self.residual != "auto":
            return self.residual
        if self.depth <= self.base_layers:
            return "prenorm"
        return "deepnorm" if self.architecture == "encoder_decoder" and self.depth >= DEEPNORM_LAYERS else "scaled"
