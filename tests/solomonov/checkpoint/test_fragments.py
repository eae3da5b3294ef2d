"""Fragments: what they refuse, how they are named, and that host bytes are the tensor's own memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from solomonov.checkpoint.format import ITEM_BYTES
from solomonov.checkpoint.fragments import DTYPE_CODES, Fragment, expected_shapes, host_bytes, whole

GOOD: dict[str, Any] = {
    "name": "layers.3.w",
    "kind": "master",
    "shape": (2, 3),
    "start": 1,
    "end": 4,
    "data": torch.zeros(3),
}


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"name": "a b"},
        {"name": "a\n"},
        {"name": "ä"},
        {"kind": "Master"},
        {"kind": "a/b"},
        {"kind": "master\n"},
        {"slices": []},
        {"start": -1},
        {"start": 4, "end": 1},
        {"start": 4, "end": 7},
        {"end": 5},
        {"shape": (-2, -3)},
        {"data": torch.zeros(1, 3)},
        {"data": torch.zeros(3, dtype=torch.complex64)},
    ],
    ids=str,
)
def test_refuses_what_no_checkpoint_can_hold(change: dict[str, Any]) -> None:
    Fragment(**GOOD)
    with pytest.raises(ValueError, match="fragment"):
        Fragment(**(GOOD | change))


def test_key_says_kind_name_and_start() -> None:
    assert Fragment(**GOOD).key == "master/layers.3.w/1"


def test_whole_tensor_and_expected_shapes() -> None:
    fragment = whole("w", "ema", torch.arange(6.0).reshape(2, 3))
    assert (fragment.start, fragment.end, fragment.shape) == (0, 6, (2, 3))
    assert fragment.data.tolist() == [0, 1, 2, 3, 4, 5]
    assert expected_shapes([fragment]) == {("w", "ema"): (2, 3)}


def test_empty_says_that_a_padding_rank_owns_nothing() -> None:
    assert Fragment("w", "master", (4,), 4, 4, torch.zeros(0)).empty
    assert not Fragment("w", "master", (0, 4), 0, 0, torch.zeros(0)).empty


@pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)
def test_host_bytes_of_every_dtype(dtype: torch.dtype) -> None:
    tensor = torch.tensor([0, 1, 1, 0]).to(dtype)
    assert host_bytes(tensor).nbytes == 4 * ITEM_BYTES[DTYPE_CODES[dtype]]
    assert bytes(host_bytes(tensor)) == bytes(tensor.untyped_storage())


def test_host_bytes_share_the_memory_of_a_contiguous_tensor() -> None:
    tensor = torch.zeros(4)
    view = host_bytes(tensor)
    tensor[2] = 1.0
    assert bytes(view[8:12]) == b"\x00\x00\x80\x3f"
    assert bytes(host_bytes(torch.arange(4, dtype=torch.uint8)[::2])) == b"\x00\x02"
    assert host_bytes(torch.zeros(0)).nbytes == 0
