"""A document: one unit of text, its stable name, and the keyed hashes that place it.

Where a document goes (train or held-out, which shard) follows from the order of these hashes: from names and
seed, never from the order in which files were read or from who read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import xxhash
from numpy.typing import NDArray

TABLE_DTYPE: Final = np.dtype(
    [
        ("file", "<u4"),
        ("index", "<u8"),
        ("offset", "<u8"),
        ("size", "<u8"),
        ("text_bytes", "<u8"),
        ("order", "<u8"),
        ("split", "<u8"),
    ]
)
"""One record a document: number of its input file in the source, its index within the file, the byte range
that holds it there, the UTF-8 bytes of its normalised text, and its two keyed hashes."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document as a reader yields it.

    Attributes:
        index: line number (0-based) in line-wise formats, else the ordinal within the file.
        offset: first byte of the document in the file.
        size: bytes of the file that hold the document (with JSON syntax, where it is JSON).
        text: normalised text, never blank.
    """

    index: int
    offset: int
    size: int
    text: str


def document_id(source: str, path: str, index: int) -> bytes:
    """The document's name: source, path below the source's root, index within the file."""
    return f"{source}\0{path}\0{index}".encode("utf-8", "surrogateescape")


def keyed_hashes(seed: int, source: str, path: str, index: int) -> tuple[int, int]:
    """(order key, split key): two independent xxh3-64 hashes of the document's name under `seed`."""
    name = document_id(source, path, index)
    order = xxhash.xxh3_64_intdigest(b"order\0" + name, seed=seed)
    return order, xxhash.xxh3_64_intdigest(b"split\0" + name, seed=seed)


def provenance(source: str, path: str, index: int, part: int) -> dict[str, str | int]:
    """What a shard keeps of a document's origin; `part` is named only where a document was cut (k > 0)."""
    entry: dict[str, str | int] = {"source": source, "path": path, "index": index}
    if part:
        entry["part"] = part
    return entry


def hash_table(seed: int, source: str, paths: Mapping[int, str], rows: NDArray[Any]) -> None:
    """Fills the two keyed hashes of a table in place; `paths` are the names of its files by number."""
    order, split = rows["order"], rows["split"]
    files, indices = rows["file"].tolist(), rows["index"].tolist()
    for row, (file, index) in enumerate(zip(files, indices, strict=True)):
        order[row], split[row] = keyed_hashes(seed, source, paths[file], index)
