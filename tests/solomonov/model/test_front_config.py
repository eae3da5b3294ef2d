"""The section's arithmetic against the convolutions' own, and what it refuses, with the nearest that is legal."""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as functional
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import zeros

from solomonov.model.front_config import FrontConfig
from tests.solomonov.model.common import tiny_config


def section(**keys: Any) -> FrontConfig:
    return FrontConfig.model_validate(keys)


def test_defaults_are_those_of_vit_b_16_and_of_whisper() -> None:
    patches = section(kind="patches")
    assert (patches.features, patches.columns, patches.inputs_per_token) == (768, 14, 1)
    frames = section(kind="frames")
    assert (frames.features, frames.inputs_per_token, frames.strides) == (80, 4, (2, 2))
    assert section() == FrontConfig(), "an empty section means tokens"
    assert section().inputs_per_token == 1


@pytest.mark.parametrize("stride", [2, 4])
@given(frames=st.integers(1, 60))
def test_tokens_are_as_many_as_two_convolutions_give(stride: int, frames: int) -> None:
    front = section(kind="frames", stride=stride)
    x = zeros(1, 1, frames)
    for each in front.strides:
        x = functional.conv1d(x, zeros(1, 1, 3), stride=each, padding=1)
    assert front.tokens_of(frames) == x.shape[2]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "patches", "image_size": [30, 41]}, r"The nearest is \[32, 48\]"),
        ({"kind": "patches", "image_size": [0, 16]}, r"The nearest is \[16, 16\]"),
        ({"kind": "frames", "patch_size": 8}, "patch_size with kind frames: that is of patches"),
        ({"mels": 40, "stride": 2}, "mels, stride with kind tokens: that is of frames"),
        ({"kind": "frames", "window_milliseconds": 10}, "Set mels to 59 at most"),
        ({"kind": "frames", "stride": 3}, "stride"),
        ({"kind": "patches", "depth": 3}, "depth"),
        ({"kind": "patches", "image_size": [32.5, 32]}, "image_size"),
    ],
    ids=str,
)
def test_what_is_no_front_is_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        section(**keys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "decoder"}, "Set architecture to encoder or encoder_decoder"),
        ({"tie_embeddings": True}, "or architecture to encoder_decoder"),
        ({"embedding_norm": True}, "no embedding to norm. Set embedding_norm to false, or architecture to encoder_de"),
        ({"attention": {"position": "learned"}}, "patches would have none. Set attention.position to sinusoidal"),
        (
            {"architecture": "encoder_decoder", "attention": {"position": "learned"}},
            "attention.position learned with front.kind patches",
        ),
        ({"head_dim": 6}, "say head_dim 8"),
        ({"architecture": "encoder_decoder", "head_dim": 10}, "say head_dim 12"),
    ],
    ids=str,
)
def test_what_does_not_go_with_patches_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        tiny_config(**{"architecture": "encoder", "front": {"kind": "patches"}} | changes)


def test_what_goes_with_patches() -> None:
    front = {"kind": "patches"}
    tiny_config(architecture="encoder", front=front, head_dim=6, attention={"position": "sinusoidal"})
    tiny_config(architecture="encoder", front={"kind": "frames"}, head_dim=6)
    tied = tiny_config(architecture="encoder_decoder", front=front, tie_embeddings=True)
    encoder, decoder = tied.stacks
    assert (tied.reads_tokens, tied.grid_columns(encoder), tied.grid_columns(decoder)) == (True, 14, None)
    assert tied.grid_columns() is None
    alone = tiny_config(architecture="encoder", front=front)
    assert (alone.reads_tokens, alone.grid_columns()) == (False, 14)
