"""The `model.attention` section: orthogonal flags, presets of them, which combinations are legal. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from solomonov.section import Section

Preset = Literal["vanilla", "rope", "alibi", "local", "hybrid"]
LayerPosition = Literal["rope", "nope", "alibi"]
"""How the attention of one layer tells order."""

IN_THE_STREAM = ("sinusoidal", "learned")
"""Positions that are added to the embedding; attention then has none of its own."""

DEFAULT_PRESET: Preset = "hybrid"
"""What an empty section means; `ModelConfig` gives an encoder, which sees all at once, `ENCODER_PRESET`."""

ENCODER_PRESET: Preset = "rope"
"""What an empty section of an encoder means."""

ASSUMED_TRAIN_TOKENS = 1024
"""Tokens a row in training where `train_tokens` says nothing."""

_WINDOWS: dict[Preset, tuple[int, int]] = {"local": (4, 1024), "hybrid": (4, 1024)}
"""Window of a preset: a row of training divided by the first number, at most the second one, Gemma 3's (arXiv
2503.19786). A layer then sees in training all distances that it ever sees, however long the rows are later on."""

PRESETS: dict[Preset, dict[str, Any]] = {
    # The Transformer of 2017 (arXiv 1706.03762).
    "vanilla": {"position": "sinusoidal", "qk_norm": False},
    # As in Qwen3.
    "rope": {"position": "rope", "qk_norm": True},
    # arXiv 2108.12409
    "alibi": {"position": "alibi", "qk_norm": False},
    # Five local layers to a global one, as in Gemma 3 (arXiv 2503.19786).
    "local": {"position": "rope", "qk_norm": True, "pattern": "LLLLLG", "global_rope_theta": 1e6},
    # Local rotary and global position-free layers (arXiv 2501.18795), gates (2505.06708), SSMax (2501.19399)
    "hybrid": {
        "position": "rope",
        "qk_norm": True,
        "pattern": "LLLG",
        "global_position": "nope",
        "output_gate": True,
        "log_n_scale": True,
    },
}
"""Preset -> the flags that it sets; its window is worked out from the length of a row."""


@dataclass(frozen=True)
class LayerAttention:
    """What the attention of one layer does; layers that are equal in this share masks and tables."""

    position: LayerPosition
    """How it tells order itself; `nope` also where positions are in the stream."""
    rope_theta: float
    """Base of the rotary frequencies."""
    window: int | None
    """Keys that a query sees at most, its own among them; None: all."""
    log_n: bool
    """Its logits grow with ln of the number of keys that a query sees."""
    sink: bool = False
    """A learned logit a head takes part in the softmax."""
    causal: bool = True
    """A token sees only those before it, and itself; else all of its document."""


class AttentionConfig(Section):
    """How tokens look at each other. `preset` fills in what is not given.

    The attention of an encoder takes `position` (but alibi), `rope_theta`, `qk_norm` and `output_gate`, and
    cross-attention `qk_norm` and `output_gate`; all else is of a decoder's own attention.
    """

    preset: Preset = DEFAULT_PRESET
    """Not given: `hybrid`, in an encoder `rope`. `vanilla`: the Transformer of 2017. `rope`: rotary positions, QK norm.
    `alibi`: linear biases. `local`: five layers in six see a window. `hybrid`: three in four see a window and rotate,
    every fourth sees all without positions and with logits that grow with the number of keys; output gates."""

    position: Literal["rope", "nope", "alibi", "sinusoidal", "learned"] = "rope"
    """How order is told: `rope` rotates queries and keys by their position within the document (arXiv 2104.09864);
    `alibi` takes from a logit m_h * distance (arXiv 2108.12409); `nope` tells nothing but what the causal mask does
    (arXiv 2305.19466), in an encoder, which has none, no order at all; `sinusoidal` is added to the embedding (arXiv
    1706.03762), `learned` likewise, a vector a position that is trained, for `train_tokens` of them: no row is longer
    (as in BERT, arXiv 1810.04805)."""

    rope_theta: float = Field(default=10_000.0, gt=1.0)
    """Base of the rotary frequencies theta^(-2i/E); larger reaches further (500,000 for 8k tokens and up)."""

    qk_norm: bool = True
    """RMSNorm over each query and key head before the rotation: keeps attention logits bounded at high rates.

    With the preset `rope`: true exports as Qwen3, false as Llama.
    """

    qk_norm_over: Literal["head", "all"] = "head"
    """What one mean square is taken over: a `head`, as in Qwen3, or `all` heads together, as in OLMo 2 (arXiv
    2501.00656)."""

    window_tokens: int | None = Field(default=None, ge=1)
    """Tokens that a query of a local layer sees, its own and those just before it; null: all layers see all."""

    pattern: str | None = Field(default=None, pattern="^[LG]+$")
    """Which layers are local and see a window (L), and which are global and see all (G), from the first one and over
    again, as in LLLG; a stack of fewer layers has the last of these letters. null: with window_tokens L, else G."""

    global_position: LayerPosition | None = None
    """How global layers tell order; null: as `position` says."""

    global_rope_theta: float | None = Field(default=None, gt=1.0)
    """Base of the rotary frequencies of global layers; null: `rope_theta`."""

    output_gate: bool | Literal["head"] = False
    """What attention found is multiplied by sigmoid(W x + b) before the output projection, x the block's normed input:
    `true`: one gate an element of a head, `head`: one a head, E times as few (arXiv 2505.06708)."""

    log_n_scale: bool = False
    """Logits are multiplied by s_h * ln(keys that the query sees), s_h learned, one a head (SSMax, arXiv
    2501.19399); in global layers alone where there are local ones. What ALiBi takes and a sink are not."""

    sink: bool = False
    """A learned logit a head takes part in the softmax and has no value, so that a head need not look anywhere
    (as in gpt-oss, arXiv 2508.10925)."""

    train_tokens: int | None = Field(default=None, ge=2)
    """Tokens a row in training, from which a preset's window follows, and at which `log_n` starts as no scale
    (s_h = 1 / ln of it), and for which there are learned positions; null: data.sequence_tokens."""

    @model_validator(mode="before")
    @classmethod
    def _preset_fills_in(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        preset = given.get("preset", DEFAULT_PRESET)
        if not isinstance(preset, str) or preset not in PRESETS:  # refused as a field
            return given
        return _fitting(preset, given) | dict(given)

    @model_validator(mode="after")
    def _flags_agree(self) -> Self:
        of_global = self.given_global_keys
        letters = self.letters
        if self.window_tokens is None and ("L" in letters or of_global):
            names = ", ".join((["pattern"] if "L" in letters else []) + of_global)
            raise ValueError(
                f"{names} without window_tokens: without a window every layer sees all, and none is local or the "
                f"global one. Set window_tokens (say {default_window('hybrid', self.train_tokens)}), or {names} to null"
            )
        if self.window_tokens is not None and "L" not in letters:
            raise ValueError(
                f"window_tokens {self.window_tokens} with pattern {letters}: without an L no layer is local. Set "
                "pattern to LLLG, say, or window_tokens to null"
            )
        if of_global and "G" not in letters:
            raise ValueError(
                f"{', '.join(of_global)} with pattern {letters}: without a G all layers are local. Set pattern (say "
                "LLLG), or it to null"
            )
        if self.position in IN_THE_STREAM and self.global_position is not None:
            raise ValueError(
                f"global_position {self.global_position} with position {self.position}: what is added to the embedding "
                "is in all layers. Set global_position to null, or position to rope"
            )
        if self.global_rope_theta is not None and (self.global_position or self.position) != "rope":
            raise ValueError(
                f"global_rope_theta {self.global_rope_theta:g}, but the position of global layers is "
                f"{self.global_position or self.position}: nothing rotates there. Set global_rope_theta to null, or "
                "global_position to rope"
            )
        if self.qk_norm_over == "all" and not self.qk_norm:
            raise ValueError(
                f"qk_norm_over {self.qk_norm_over} with qk_norm false: nothing is normed. Set qk_norm to true, or "
                "qk_norm_over to head"
            )
        if self.log_n_scale and "G" not in letters:
            raise ValueError(
                f"log_n_scale with window_tokens {self.window_tokens} and pattern {letters}: it is for layers that see "
                "all, and there is none. Set pattern (say LLLG), or log_n_scale to false"
            )
        return self

    @property
    def letters(self) -> str:
        """L or G of each layer, over again."""
        return self.pattern if self.pattern is not None else "G" if self.window_tokens is None else "L"

    @property
    def given_global_keys(self) -> list[str]:
        """Names of the keys of global layers that are not null."""
        return [name for name in ("global_position", "global_rope_theta") if getattr(self, name) is not None]

    @property
    def row_tokens(self) -> int:
        """Tokens a row in training, assumed where nothing is known."""
        return ASSUMED_TRAIN_TOKENS if self.train_tokens is None else self.train_tokens

    def is_global(self, layer: int, layers: int) -> bool:
        """Whether a layer sees all tokens of a document.

        Args:
            layer: its number, from 0.
            layers: of the stack.
        """
        letters = self.letters[-layers:]
        return letters[layer % len(letters)] == "G"

    def of_layer(self, layer: int, layers: int) -> LayerAttention:
        """What the attention of layer number `layer` of `layers` does, from 0."""
        sees_all = self.is_global(layer, layers)
        at_global = sees_all and self.window_tokens is not None
        position = self.global_position if at_global and self.global_position is not None else self.position
        theta = self.global_rope_theta if at_global and self.global_rope_theta is not None else self.rope_theta
        return LayerAttention(
            position="nope" if position == "sinusoidal" or position == "learned" else position,
            rope_theta=theta,
            window=None if sees_all else self.window_tokens,
            log_n=self.log_n_scale and sees_all,
            sink=self.sink,
        )

    def of_encoder(self) -> LayerAttention:
        """What the attention of every layer of an encoder does."""
        position: LayerPosition = "rope" if self.position == "rope" else "nope"
        return LayerAttention(position, self.rope_theta, window=None, log_n=False, causal=False)

    def encoder_refusal(self, architecture: Literal["encoder", "encoder_decoder"]) -> str | None:
        """Why an encoder cannot have this attention, and the nearest that it can; None: it can."""
        if self.position == "alibi":
            return (
                f"architecture {architecture} with attention.position alibi: its biases count how far back a key is, "
                "and an encoder looks ahead as well. Set attention.position to rope (or attention.preset, where that "
                "says alibi)"
            )
        wanted = {
            "window_tokens": self.window_tokens is not None,
            "log_n_scale": self.log_n_scale,
            "sink": self.sink,
        }
        if architecture == "encoder" and any(wanted.values()):
            names = ", ".join(f"attention.{name}" for name, is_given in wanted.items() if is_given)
            return (
                f"architecture encoder with {names}: in an encoder all see all of their document, and of these flags "
                "it takes none, but positions, qk_norm and output_gate. Set attention.preset to rope (with "
                "output_gate: true for the gates of hybrid), window_tokens to null, log_n_scale and sink to false"
            )
        return None


def default_window(preset: Preset, train_tokens: int | None) -> int | None:
    """The window that a preset sets for rows of so many tokens (None: not known); None: it sets none."""
    if preset not in _WINDOWS:
        return None
    share, most = _WINDOWS[preset]
    return max(1, min((ASSUMED_TRAIN_TOKENS if train_tokens is None else train_tokens) // share, most))


def _fitting(preset: Preset, given: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of a preset, but for those that mean nothing beside the given ones: who takes the window out of a
    preset need not know what else it sets for its global layers."""
    tokens = given.get("train_tokens")
    flags = dict(PRESETS[preset])
    window = default_window(preset, tokens if type(tokens) is int and tokens > 1 else None)
    if window is not None:
        flags["window_tokens"] = window

    def chosen(name: str) -> Any:
        return given.get(name, flags.get(name))

    if chosen("window_tokens") is None:
        flags.pop("pattern", None)
    letters = str(chosen("pattern") or "L")
    if "L" not in letters:
        flags.pop("window_tokens", None)
    no_global = "G" not in letters or chosen("window_tokens") is None
    if no_global or chosen("position") in IN_THE_STREAM:
        flags.pop("global_position", None)
    if "G" not in letters and chosen("window_tokens") is not None:
        flags.pop("log_n_scale", None)
    if no_global or (chosen("global_position") or chosen("position")) != "rope":
        flags.pop("global_rope_theta", None)
    return flags
