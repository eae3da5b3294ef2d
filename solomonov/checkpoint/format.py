"""What stands in MANIFEST.json and state.json, and the rules that a manifest must obey to be believed.

A checkpoint is a folder `step-00000200` of `rank-00000.safetensors`, ..., `state.json` and `MANIFEST.json`.
The manifest is canonical JSON (sorted keys, no spaces, one newline at the end) and holds the xxh3-128 of
itself without that field: so every bit of it is vouched for.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import xxhash
from pydantic import Field, ValidationError

from solomonov.section import Section

SCHEMA_VERSION = 1
MANIFEST = "MANIFEST.json"
STATE = "state.json"
RANK_FILE = re.compile(r"^rank-[0-9]{5,7}\.safetensors$")
SELF_DIGEST = "manifest_xxh3_128"
MAX_JSON_BYTES = 1 << 30
"""Larger manifests and states are refused unread; a million records take about 300 MB."""
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2} | dict.fromkeys(
    ("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1
)

Count = Annotated[int, Field(ge=0, lt=1 << 62)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Shape = Annotated[tuple[Count, ...], Field(strict=False, max_length=64)]
TensorId = tuple[str, str]
"""(name, kind) of a tensor."""


class TilingError(ValueError):
    """Fragments do not cover the tensors exactly once."""


class FormatError(ValueError):
    """Bytes that are not a manifest or a state of this format."""


class UnsupportedVersionError(ValueError):
    """An intact manifest that a newer release wrote."""


class FileEntry(Section):
    """What one file must be."""

    size: Count
    """Bytes."""
    xxh3_128: Digest
    """Digest of all of its bytes."""


class TensorRecord(Section):
    """One stored fragment: where it belongs, where it lies, and the digest of its bytes."""

    name: Annotated[str, Field(pattern=r"^[!-~]{1,512}$")]
    """Canonical name of the parameter or buffer."""
    kind: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
    """`master`, a moment's name, `ema`, `frozen` or `buffer`."""
    dtype: str
    """Code of the elements' type, as in safetensors."""
    shape: Shape
    """Shape of the whole tensor."""
    start: Count
    """First element in the flattened tensor."""
    end: Count
    """One past the last element."""
    file: str
    """File that holds it."""
    key: Annotated[str, Field(max_length=1024)]
    """Name inside that file."""
    xxh3_128: Digest
    """Digest of the elements' bytes."""
    slices: None = None
    """Reserved for tensor slicing."""

    @property
    def nbytes(self) -> int:
        """Size of the stored bytes."""
        return (self.end - self.start) * ITEM_BYTES[self.dtype]


class RankEntry(Section):
    """What one rank reports of the file that it wrote and read back."""

    rank: Count
    """Who wrote it."""
    file: str
    """Its name."""
    entry: FileEntry
    """Its size and digest."""
    records: Annotated[tuple[TensorRecord, ...], Field(strict=False)]
    """What it holds."""


class Manifest(Section):
    """MANIFEST.json without its own digest."""

    schema_version: Annotated[int, Field(ge=1, le=SCHEMA_VERSION)] = SCHEMA_VERSION
    """Version of this format."""
    run_id: str
    """Identity of the run; checkpoints of another are refused."""
    step: Count
    """Updates done when it was written."""
    parent_step: Count | None
    """Step of the checkpoint that its run went on from, if any."""
    attempt: Count
    """Which start of the run wrote it; see `store.superseded_by`."""
    created: float
    """Wall clock, seconds since 1970; for people, never compared."""
    topology: dict[str, Any]
    """Layout that it was saved in; informative, loading never needs it."""
    files: dict[str, FileEntry]
    """Every other file of the checkpoint, by name."""
    tensors: Annotated[tuple[TensorRecord, ...], Field(strict=False)]
    """Every stored fragment; together they tile each tensor once."""
    ledger: None = None
    """Reserved for consumed and skipped rows."""
    statistics: None = None
    """Reserved for the statistics of loss and gradient norms."""

    @property
    def nbytes(self) -> int:
        """Size of all files that it lists."""
        return sum(entry.size for entry in self.files.values())


def canonical(document: Mapping[str, Any]) -> bytes:
    """JSON bytes that are equal for equal documents. ValueError on NaN or infinity."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return text.encode("ascii") + b"\n"


def parse_canonical(raw: bytes) -> dict[str, Any]:
    """The document whose canonical form is exactly `raw`; else FormatError."""
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not JSON: {error}") from error
    if not isinstance(document, dict):
        raise FormatError(f"a JSON object is needed, got {type(document).__name__}")
    try:
        same = canonical(document) == raw
    except (ValueError, RecursionError) as error:
        raise FormatError(f"not plain JSON: {error}") from error
    if not same:
        raise FormatError("not in the canonical form that is always written")
    return document


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of MANIFEST.json."""
    document = manifest.model_dump(mode="json")
    return canonical(document | {SELF_DIGEST: xxhash.xxh3_128_hexdigest(canonical(document))})


def decode_manifest(raw: bytes) -> Manifest:
    """The manifest in `raw`, every bit of it checked, every number believable.

    Raises:
        FormatError: damaged, or written by someone hostile.
        UnsupportedVersionError: intact, but of a later schema version.
    """
    document = parse_canonical(raw)
    stored = document.pop(SELF_DIGEST, None)
    computed = xxhash.xxh3_128_hexdigest(canonical(document))
    if stored != computed:
        raise FormatError(f"it says xxh3-128 {stored} of itself, its bytes have {computed}")
    version = document.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise UnsupportedVersionError(f"schema version {version}; this release reads up to {SCHEMA_VERSION}")
    try:
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise FormatError(f"field {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    _check_references(manifest)
    return manifest


def _check_references(manifest: Manifest) -> None:
    """Files are plain names of ours, records point to listed files, fragments tile their tensors."""
    strange = [name for name in manifest.files if name != STATE and not RANK_FILE.fullmatch(name)]
    if strange:
        raise FormatError(f"file name {strange[0]!r} is none that a checkpoint has")
    if STATE not in manifest.files:
        raise FormatError(f"{STATE} is not listed")
    payload: dict[str, int] = defaultdict(int)
    keys: set[tuple[str, str]] = set()
    for record in manifest.tensors:
        if record.dtype not in ITEM_BYTES:
            raise FormatError(f"{record.key}: unknown dtype {record.dtype!r}")
        if record.file not in manifest.files or record.file == STATE:
            raise FormatError(f"{record.key}: no tensor file {record.file!r} is listed")
        if (record.file, record.key) in keys:
            raise FormatError(f"key {record.key!r} stands twice in {record.file}")
        keys.add((record.file, record.key))
        payload[record.file] += max(record.nbytes, 0)
    for name, nbytes in payload.items():
        if nbytes > manifest.files[name].size:
            raise FormatError(f"{name} of {manifest.files[name].size} bytes cannot hold {nbytes}")
    try:
        check_tiling(manifest.tensors)
    except TilingError as error:
        raise FormatError(str(error)) from error


def by_tensor(records: Iterable[TensorRecord]) -> dict[TensorId, list[TensorRecord]]:
    """Records by (name, kind), each list in the order of the elements."""
    grouped: dict[TensorId, list[TensorRecord]] = defaultdict(list)
    for record in records:
        grouped[record.name, record.kind].append(record)
    return {key: sorted(group, key=lambda r: (r.start, r.end)) for key, group in grouped.items()}


def check_tiling(records: Iterable[TensorRecord], expected: Mapping[TensorId, tuple[int, ...]] | None = None) -> None:
    """Refuse fragments that do not cover each tensor exactly once.

    Args:
        records: what was written.
        expected: (name, kind) -> shape of all that must be there; None accepts what the records say.

    Raises:
        TilingError: names the tensor and the ranges of the first hole, overlap or stranger.
    """
    grouped = by_tensor(records)
    if expected is not None:
        missing, strange = sorted(expected.keys() - grouped.keys()), sorted(grouped.keys() - expected.keys())
        if missing:
            name, kind = missing[0]
            raise TilingError(f"{len(missing)} tensors were not written, first {kind}/{name}")
        if strange:
            name, kind = strange[0]
            raise TilingError(f"{len(strange)} tensors were not expected, first {kind}/{name}")
    for (name, kind), group in grouped.items():
        label, first = f"{kind}/{name}", group[0]
        shape = first.shape if expected is None else tuple(expected[name, kind])
        for record in group:
            if record.shape != shape or record.dtype != first.dtype:
                raise TilingError(
                    f"{label}: fragments disagree: {record.dtype} {record.shape} at [{record.start}, "
                    f"{record.end}), against {first.dtype} {shape}"
                )
        _check_ranges(label, group, math.prod(shape))


def _check_ranges(label: str, group: list[TensorRecord], numel: int) -> None:
    """The ranges of one tensor's fragments follow each other from 0 to `numel`."""
    position = 0
    for record in group:
        here = f"[{record.start}, {record.end})"
        if record.end < record.start or record.end > numel:
            raise TilingError(f"{label}: {here} does not lie within [0, {numel})")
        if record.start > position:
            raise TilingError(f"{label}: hole [{position}, {record.start}) of [0, {numel})")
        if record.start < position or (numel and record.start == record.end):
            raise TilingError(f"{label}: {here} overlaps what covers [0, {position})")
        position = record.end
    if position != numel:
        raise TilingError(f"{label}: hole [{position}, {numel}) of [0, {numel})")
    if not numel and len(group) != 1:
        raise TilingError(f"{label}: {len(group)} fragments of a tensor without elements, one is needed")
