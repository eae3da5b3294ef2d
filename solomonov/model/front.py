"""What stands before a stack that reads no token ids: patches of images, or log-mel frames, to vectors.

Documents stay apart from the first product on. Patches are in rows of the image, from left to right, and all images of
a model are equally wide, so that a patch's number in its document tells its row and column.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from solomonov.model.attention import Linear, token_positions
from solomonov.model.config import ModelConfig
from solomonov.model.front_config import KERNEL, FrontConfig
from solomonov.model.positions import grid_sinusoids, sinusoids

_NO_DOCUMENT = -2
"""Of what is before and behind a row: that of padding in rows is -1."""


class Affine(Linear):
    """y = x W^T + b, of data as it comes, in the parameters' type."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) of any type of floats -> (..., outputs)."""
        # Autocast's product is narrower, and the stream that begins here is not.
        dtype = self.weight.dtype
        return super().forward(x.to(dtype)).to(dtype)


class Front(nn.Module):
    """Patches or frames to vectors; with sinusoidal positions these are added.

    Patches: y = W x + b, a convolution whose stride is its kernel (ViT, arXiv 2010.11929, equation 1). Frames:
    gelu(conv(gelu(conv(x)))) with kernels of 3 and zeros beside a document (Whisper, arXiv 2212.04356, section 2.2), as
    products of three frames side by side. W is in both what the weight of torch's convolution is, (D, inputs, kernel),
    with its last dimensions as one.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config.front
        self.sinusoidal = config.attention.position == "sinusoidal"
        for name, matrix in self.config.matrices(config.d_model).items():
            self.add_module(name, Affine(matrix.inputs, matrix.outputs))

    def forward(self, x: Tensor, document_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors, and the documents that they belong to.

        Args:
            x: floats. Patches (B, N, C * P * P), each channel by channel and row by row, or images (B, C, height,
                width) as wide as the configuration's and of any whole number of patches high. Frames (B, T, mels).
            document_ids: integers of the patches, (B, N), or frames, (B, T): equal within a document, -1 on padding.
                Documents of frames begin at multiples of the stride, with padding before the next one.

        Returns:
            (B, N, D) and (B, N); of frames, (B, ceil(T / stride), D) and (B, ceil(T / stride)).

        Raises:
            ValueError: x is no such thing.
        """
        self._refuse(x)
        if self.config.kind == "patches":
            patches = patches_of(x, self.config.patch_size) if x.dim() == 4 else x
            hidden = self.get_submodule("projection")(patches)
        else:
            hidden = x
            for name, stride in zip(("first", "second"), self.config.strides, strict=True):
                taps, document_ids = _side_by_side(hidden, document_ids, stride)
                hidden = functional.gelu(self.get_submodule(name)(taps))
        if self.sinusoidal:
            hidden = (hidden.float() + self._sinusoids(document_ids, hidden.shape[-1])).to(hidden.dtype)
        return hidden, document_ids

    def _sinusoids(self, document_ids: Tensor, width: int) -> Tensor:
        positions = token_positions(document_ids)
        if self.config.kind == "patches":
            return grid_sinusoids(positions, self.config.columns, width)
        return sinusoids(positions, width)

    def _refuse(self, x: Tensor) -> None:
        """Refuse what is not the front's input."""
        wanted = self.config
        image = wanted.kind == "patches" and x.dim() == 4
        fits = (
            x.shape[1] == wanted.channels and x.shape[3] == wanted.image_size[1] and not x.shape[2] % wanted.patch_size
            if image
            else x.dim() == 3 and x.shape[2] == wanted.features
        )
        if not fits or not x.is_floating_point():
            images = f", or images (B, {wanted.channels}, a multiple of {wanted.patch_size}, {wanted.image_size[1]})"
            raise ValueError(
                f"a front of {wanted.kind} got {x.dtype} of shape {tuple(x.shape)}: it reads floats (B, N, "
                f"{wanted.features}){images if wanted.kind == 'patches' else ''}. Cut, pad or resize the data, or set "
                "model.front"
            )


def patches_of(images: Tensor, patch_size: int) -> Tensor:
    """(B, C, height, width) -> (B, N, C * P * P), row by row, each patch channel by channel and row by row."""
    rows = images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)
    return rows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def _side_by_side(x: Tensor, document_ids: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """What a convolution with zeros beside each document multiplies with its weight.

    Args:
        x: (B, T, C); `document_ids` (B, T).

    Returns:
        (B, ceil(T / stride), C * 3), channel by channel; and the documents, (B, ceil(T / stride)).
    """
    tokens, centre = x.shape[1], document_ids[:, ::stride]
    beside = functional.pad(document_ids, (1, 1), value=_NO_DOCUMENT)
    padded = functional.pad(x, (0, 0, 1, 1))
    taps = []
    for place in range(KERNEL):
        here = slice(place, place + tokens, stride)
        taps.append(padded[:, here].masked_fill((beside[:, here] != centre)[..., None], 0.0))
    return torch.stack(taps, dim=-1).flatten(2), centre


def example(front: FrontConfig, rows: int, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers of size 1, fp32 as data comes, such as become so many tokens a row, of one document: (rows, N or T,
    features) and ids."""
    inputs = tokens * front.inputs_per_token
    x = torch.randn(rows, inputs, front.features, dtype=torch.float32, generator=generator)
    return x, torch.zeros(rows, inputs, dtype=torch.int32)
