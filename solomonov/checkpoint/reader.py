"""Read tensors from a checkpoint, any range of them, whatever layout they were saved in.

No byte of a tensor is returned before the digest of the stored fragment that holds it was checked, on the
very copy that is returned from.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from solomonov.checkpoint import files, verify
from solomonov.checkpoint.format import Manifest, TensorId, TensorRecord, by_tensor
from solomonov.checkpoint.fragments import DTYPES, host_bytes
from solomonov.errors import ConfigurationError

CACHE_BYTES = 256 << 20
"""Verified fragments that a reader keeps, so that many small reads of one fragment verify it once."""
DIFF_ELEMENTS = 4 << 20


class CheckpointReader:
    """One checkpoint, opened. Not for several threads at once.

    Attributes:
        folder: where it lies.
        manifest: verified in itself.
        digest: xxh3-128 of the bytes of MANIFEST.json: the identity of the checkpoint.
    """

    def __init__(self, folder: Path, manifest: Manifest, digest: str, *, cache_bytes: int = CACHE_BYTES) -> None:
        self.folder, self.manifest, self.digest = folder, manifest, digest
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[tuple[str, str], torch.Tensor] = OrderedDict()
        self._cached = 0
        self._records = by_tensor(manifest.tensors)
        self._shapes = {key: records[0].shape for key, records in self._records.items()}
        self._by_file: dict[str, list[TensorRecord]] = {}
        for record in manifest.tensors:
            self._by_file.setdefault(record.file, []).append(record)
        self._places: dict[str, dict[str, tuple[int, int]]] = {}
        self._document: dict[str, Any] | None = None

    @classmethod
    def open(cls, folder: Path, *, cache_bytes: int = CACHE_BYTES) -> CheckpointReader:
        """Read and verify the manifest; see `verify.open_manifest` for the errors."""
        manifest, raw = verify.open_manifest(folder)
        return cls(folder, manifest, files.digest_bytes(raw), cache_bytes=cache_bytes)

    @property
    def step(self) -> int:
        """Updates done when it was written."""
        return self.manifest.step

    @property
    def state(self) -> dict[str, Any]:
        """What `Header.state` was, after the digest of state.json was checked."""
        state: dict[str, Any] = self._state_document()["state"]
        return state

    @property
    def scalars(self) -> dict[str, Any]:
        """What `Header.scalars` was, after the digest of state.json was checked."""
        scalars: dict[str, Any] = self._state_document()["scalars"]
        return scalars

    def _state_document(self) -> dict[str, Any]:
        if self._document is None:
            self._document = verify.read_state(self.folder, self.manifest)
        return self._document

    def kinds(self) -> list[str]:
        """Kinds of tensors that it holds, sorted."""
        return sorted({kind for _, kind in self._records})

    def names(self, kind: str) -> list[str]:
        """Names of the tensors of one kind, sorted."""
        return sorted(name for name, stored in self._records if stored == kind)

    def require_model(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that it holds the masters of a model.

        Args:
            shapes: canonical name -> shape, of parameters that will be read.

        Raises:
            ConfigurationError: it holds other parameters or shapes.
        """
        for name, shape in shapes.items():
            stored = self.shapes().get((name, "master"))
            if stored != shape:
                raise ConfigurationError(
                    "the checkpoint was written by another model",
                    got=f"{name}: {stored} in the checkpoint, {shape} in the configuration",
                    rule="a run resumes with the model that it was started with",
                    remedy="use the configuration of the run, or another run.name",
                )

    def shapes(self) -> Mapping[TensorId, tuple[int, ...]]:
        """(name, kind) -> shape of every tensor."""
        return self._shapes

    def shape(self, name: str, kind: str) -> tuple[int, ...]:
        """Shape of one tensor. KeyError where it holds none such."""
        return self._of(name, kind)[0].shape

    def dtype(self, name: str, kind: str) -> torch.dtype:
        """Dtype of one tensor. KeyError where it holds none such."""
        return DTYPES[self._of(name, kind)[0].dtype]

    def _of(self, name: str, kind: str) -> list[TensorRecord]:
        try:
            return self._records[name, kind]
        except KeyError:
            raise KeyError(f"{self.folder} holds no {kind} of {name}") from None

    def share(self, rank: int, size: int) -> list[str]:
        """The files that rank `rank` of `size` verifies: together the ranks verify each once."""
        return sorted(self.manifest.files)[rank::size]

    def verify(self, names: Iterable[str] | None = None) -> int:
        """Digests of whole files (all of them by default); see `verify.verify_files`."""
        return verify.verify_files(self.folder, self.manifest, names)

    def read(self, name: str, kind: str, start: int = 0, end: int | None = None) -> torch.Tensor:
        """Elements [start, end) of the flattened tensor, a new 1-D tensor on the host.

        Raises:
            KeyError: no such tensor.
            ValueError: the range does not lie within it.
            DamagedCheckpointError: a stored fragment that is needed has other bytes than were committed.
        """
        records = self._of(name, kind)
        numel = math.prod(records[0].shape)
        stop = numel if end is None else end
        if not 0 <= start <= stop <= numel:
            raise ValueError(f"[{start}, {stop}) does not lie within {kind}/{name} of {numel} elements")
        out = torch.empty(stop - start, dtype=DTYPES[records[0].dtype])
        for record in records:
            low, high = max(start, record.start), min(stop, record.end)
            if low < high:
                data = self._fragment(record)
                out[low - start : high - start] = data[low - record.start : high - record.start]
        return out

    def read_tensor(self, name: str, kind: str) -> torch.Tensor:
        """A whole tensor in its shape, on the host."""
        return self.read(name, kind).reshape(self.shape(name, kind))

    def fragments(self, name: str, kind: str) -> Iterator[torch.Tensor]:
        """The stored fragments of one tensor in order, each verified; do not write to them."""
        for record in self._of(name, kind):
            yield self._fragment(record)

    def _fragment(self, record: TensorRecord) -> torch.Tensor:
        """One stored fragment, verified, from the cache where it is there."""
        key = (record.file, record.key)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        if record.file not in self._places:
            self._places[record.file] = verify.tensor_table(self.folder, record.file, self._by_file[record.file])
        offset, nbytes = self._places[record.file][record.key]
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        verify.read_fragment(self.folder, record, offset, host_bytes(buffer))
        data = buffer.view(DTYPES[record.dtype])
        self._cache[key] = data
        self._cached += nbytes
        # The newest one stays even if it is larger than the cache: else small reads of it were quadratic.
        while self._cached > self._cache_bytes and len(self._cache) > 1:
            _, dropped = self._cache.popitem(last=False)
            self._cached -= dropped.numel() * dropped.element_size()
        return data


def digest(folder: Path, kinds: Iterable[str] | None = None) -> str:
    """xxh3-128 of the state itself: equal for equal tensors, whatever layout they were saved in.

    The digest runs, over (kind, name) in sorted order, over `kind NUL name NUL dtype NUL shape NUL` (shape in
    decimal, separated by commas) and then the bytes of the flattened tensor.

    Args:
        folder: a checkpoint.
        kinds: kinds to include; None is all.
    """
    reader = CheckpointReader.open(folder, cache_bytes=0)
    hasher = xxhash.xxh3_128()
    for kind in reader.kinds() if kinds is None else sorted(set(kinds)):
        for name in reader.names(kind):
            record = reader._records[name, kind][0]
            shape = ",".join(str(size) for size in record.shape)
            hasher.update("\0".join((kind, name, record.dtype, shape, "")).encode("ascii"))
            for fragment in reader.fragments(name, kind):
                hasher.update(host_bytes(fragment))
    return hasher.hexdigest()


@dataclass(frozen=True)
class DiffRow:
    """How one tensor differs between two checkpoints a and b."""

    kind: str
    name: str
    equal: bool
    """Same dtype, shape and bytes."""
    relative: float | None
    """||a - b|| / ||b|| in float64; None where the shapes differ, one lacks it, or a number is not finite."""
    note: str = ""


def diff(folder_a: Path, folder_b: Path, kinds: Iterable[str] | None = None) -> list[DiffRow]:
    """One row for every tensor of either checkpoint, by kind and name; every byte is verified on the way."""
    a, b = CheckpointReader.open(folder_a), CheckpointReader.open(folder_b)
    wanted = None if kinds is None else set(kinds)
    keys = sorted((kind, name) for name, kind in a.shapes().keys() | b.shapes().keys())
    return [_diff_row(a, b, name, kind) for kind, name in keys if wanted is None or kind in wanted]


def _diff_row(a: CheckpointReader, b: CheckpointReader, name: str, kind: str) -> DiffRow:
    shape_a, shape_b = a.shapes().get((name, kind)), b.shapes().get((name, kind))
    if shape_a is None or shape_b is None:
        return DiffRow(kind, name, False, None, "only in the second" if shape_a is None else "only in the first")
    if shape_a != shape_b:
        return DiffRow(kind, name, False, None, f"shapes {shape_a} and {shape_b}")
    equal, difference, norm = a.dtype(name, kind) == b.dtype(name, kind), 0.0, 0.0
    note = "" if equal else f"dtypes {a.dtype(name, kind)} and {b.dtype(name, kind)}"
    for start in range(0, math.prod(shape_a), DIFF_ELEMENTS):
        end = min(start + DIFF_ELEMENTS, math.prod(shape_a))
        x, y = a.read(name, kind, start, end), b.read(name, kind, start, end)
        equal = equal and host_bytes(x) == host_bytes(y)
        wide_x, wide_y = x.to(torch.float64), y.to(torch.float64)
        difference += float((wide_x - wide_y).square().sum())
        norm += float(wide_y.square().sum())
    if equal:
        return DiffRow(kind, name, True, 0.0)
    if not math.isfinite(difference) or not math.isfinite(norm):
        return DiffRow(kind, name, False, None, note or "not finite")
    return DiffRow(kind, name, False, math.sqrt(difference / norm) if norm else None, note)
