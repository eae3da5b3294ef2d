"""The unit of a checkpoint: a range of one flattened tensor, by canonical name and kind."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

KIND_PATTERN = r"[a-z][a-z0-9_]{0,63}"
NAME_PATTERN = r"[!-~]{1,512}"

DTYPE_CODES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The safetensors codes of the dtypes that a checkpoint holds."""

DTYPES: dict[str, torch.dtype] = {code: dtype for dtype, code in DTYPE_CODES.items()}


@dataclass(frozen=True, eq=False)
class Fragment:
    """Elements [start, end) of one flattened tensor, as owned by one rank.

    Raises:
        ValueError: on a name, kind, range, dtype or shape that no checkpoint can hold.
    """

    name: str
    """Canonical name of the parameter or buffer."""
    kind: str
    """`master`, a moment's name (`exp_avg`, `exp_avg_sq`, ...), `ema`, `frozen` or `buffer`."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    start: int
    end: int
    data: torch.Tensor
    """(end - start,) on any device; copied to the host one fragment at a time while writing."""
    slices: None = None
    """Reserved for tensor slicing; nothing but None is accepted."""

    def __post_init__(self) -> None:
        where = f"fragment {self.kind}/{self.name}[{self.start}:{self.end}]"
        if not re.fullmatch(NAME_PATTERN, self.name) or not re.fullmatch(KIND_PATTERN, self.kind):
            raise ValueError(f"{where}: a name is 1-512 printable ASCII characters, a kind [a-z][a-z0-9_]*")
        if self.slices is not None:
            raise ValueError(f"{where}: slices are reserved, got {self.slices!r}")
        if any(size < 0 for size in self.shape) or not 0 <= self.start <= self.end <= math.prod(self.shape):
            raise ValueError(f"{where} does not lie within a tensor of shape {self.shape}")
        if self.data.dim() != 1 or self.data.numel() != self.end - self.start:
            raise ValueError(f"{where} needs {self.end - self.start} elements in 1-D, got {self.data.shape}")
        if self.data.dtype not in DTYPE_CODES:
            raise ValueError(f"{where}: dtype {self.data.dtype} has no place in a checkpoint")

    @property
    def key(self) -> str:
        """Name inside the safetensors file; the same whichever rank writes it."""
        return f"{self.kind}/{self.name}/{self.start}"

    @property
    def dtype(self) -> str:
        """The safetensors code of the elements' dtype."""
        return DTYPE_CODES[self.data.dtype]

    @property
    def nbytes(self) -> int:
        """Size of the elements in bytes."""
        return self.data.numel() * self.data.element_size()

    @property
    def empty(self) -> bool:
        """Whether it says nothing: no elements of a tensor that has some (padding ranks own such)."""
        return self.start == self.end and math.prod(self.shape) > 0


def host_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a 1-D tensor, without a copy where it is contiguous on the host already."""
    flat = tensor.detach().to("cpu").contiguous()
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def whole(name: str, kind: str, tensor: torch.Tensor) -> Fragment:
    """A fragment that holds all of one tensor."""
    flat = tensor.detach().reshape(-1)
    return Fragment(name, kind, tuple(tensor.shape), 0, flat.numel(), flat)


def expected_shapes(fragments: Iterable[Fragment]) -> dict[tuple[str, str], tuple[int, ...]]:
    """(name, kind) -> shape of the tensors that the fragments speak of."""
    return {(fragment.name, fragment.kind): fragment.shape for fragment in fragments}
