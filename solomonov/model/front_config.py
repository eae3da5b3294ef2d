"""The `model.front` section: what the first stack reads, and what stands before it. Imports no torch."""

from __future__ import annotations

from typing import Literal, NamedTuple, Self

from pydantic import Field, model_validator

from data_pipeline.log_mel import mel_filters
from solomonov.section import Section

FrontKind = Literal["tokens", "patches", "frames"]

KERNEL = 3
"""Frames that a convolution looks at."""


class Matrix(NamedTuple):
    """One product of a front."""

    outputs: int
    inputs: int
    times: int
    """How often it is computed for one token."""


class FrontConfig(Section):
    """What the first stack reads: token ids, or the patches of images or frames of sound, each patch, or each few
    frames, becoming what a token is. `attention.position` tells their order. Keys of another kind stay at their
    defaults."""

    kind: FrontKind = "tokens"
    """`tokens`: ids, looked up in the embedding. `patches`: squares of an image, each mapped by one matrix (ViT, arXiv
    2010.11929), with positions by row and column (rotary ones with an attention.rope_theta of 100 in arXiv 2403.13298).
    `frames`: log-mel frames, through two convolutions (Whisper, arXiv 2212.04356). An encoder alone, or the one of an
    encoder_decoder, whose decoder reads tokens."""

    image_size: tuple[int, int] = Field(default=(224, 224), strict=False)
    """With patches: height and width of an image in pixels, multiples of patch_size. Images may be of another height,
    in patches that are cut already; the width gives the number of columns."""

    patch_size: int = Field(default=16, ge=1)
    """With patches: side of one in pixels."""

    channels: int = Field(default=3, ge=1)
    """With patches: numbers a pixel."""

    sample_rate: int = Field(default=16_000, ge=1000)
    """With frames: samples a second."""

    mels: int = Field(default=80, ge=1)
    """With frames: numbers a frame, the powers in bands of equal width in mel."""

    window_milliseconds: int = Field(default=25, ge=5)
    """With frames: sound that one is made of."""

    hop_milliseconds: int = Field(default=10, ge=1)
    """With frames: from one to the next."""

    stride: Literal[2, 4] = 4
    """With frames: how many become one token. 2: only the second convolution leaves out every other one, as in Whisper;
    4: both do, as in fairseq's S2T (arXiv 2010.05171)."""

    @model_validator(mode="after")
    def _keys_are_of_the_kind(self) -> Self:
        for kind, names in _KEYS.items():
            odd = [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
            if odd and kind != self.kind:
                raise ValueError(
                    f"{', '.join(odd)} with kind {self.kind}: that is of {kind}, and nothing would follow it here. "
                    f"Set kind to {kind}, or leave out {', '.join(odd)}"
                )
        return self

    @model_validator(mode="after")
    def _patches_fill_the_image(self) -> Self:
        if self.kind == "patches" and (
            min(self.image_size) < 1 or any(side % self.patch_size for side in self.image_size)
        ):
            height, width = (max(1, round(side / self.patch_size)) * self.patch_size for side in self.image_size)
            raise ValueError(
                f"image_size {list(self.image_size)} with patch_size {self.patch_size}: patches are whole, so height "
                f"and width are multiples of patch_size. The nearest is [{height}, {width}]"
            )
        return self

    @model_validator(mode="after")
    def _filters_hear_something(self) -> Self:
        if self.kind == "frames":
            mel_filters(self.sample_rate, self.mels, self.window_milliseconds)
        return self

    @property
    def features(self) -> int:
        """Numbers a patch, or a frame."""
        return self.channels * self.patch_size**2 if self.kind == "patches" else self.mels

    @property
    def columns(self) -> int:
        """Patches side by side."""
        return self.image_size[1] // self.patch_size

    @property
    def inputs_per_token(self) -> int:
        """How many ids, patches or frames become one token; the last one may be of fewer."""
        return self.stride if self.kind == "frames" else 1

    @property
    def strides(self) -> tuple[int, int]:
        """Of the two convolutions."""
        return self.stride // 2, 2

    def tokens_of(self, inputs: int) -> int:
        """Tokens that become of a document of so many ids, patches or frames."""
        return -(-inputs // self.inputs_per_token)

    def matrices(self, d_model: int) -> dict[str, Matrix]:
        """Name -> each matrix of the front, which has a bias as well.

        Args:
            d_model: D.
        """
        if self.kind == "tokens":
            return {}
        if self.kind == "patches":
            return {"projection": Matrix(d_model, self.features, 1)}
        return {
            "first": Matrix(d_model, KERNEL * self.mels, self.strides[1]),
            "second": Matrix(d_model, KERNEL * d_model, 1),
        }


_KEYS: dict[FrontKind, tuple[str, ...]] = {
    "patches": ("image_size", "patch_size", "channels"),
    "frames": ("sample_rate", "mels", "window_milliseconds", "hop_milliseconds", "stride"),
}
"""What is of one kind alone."""
