"""Small datasets in the real format, from token arrays, without tokenizer training and without webdataset.

A document is an array BOS, ids, EOS. Documents keep their order: no shuffle, no split.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.files import json_bytes
from data_pipeline.layout import choose_block_tokens, choose_lanes, cut_blocks, cut_documents
from data_pipeline.manifest import BOS_ID, EOS_ID, FileRecord, Manifest, digest_hex
from data_pipeline.packing import rows_per_block
from data_pipeline.shards import (
    INDEX_SCHEMA_VERSION,
    MEMBERS,
    block_records,
    index_name,
    provenance_bytes,
    shard_name,
)

Documents = Sequence[NDArray[Any]]

WINDOW_BLOCKS = 4
BLOCKS_PER_SHARD = 3


def make_documents(seed: int, count: int, mean_tokens: float, vocab_size: int = 512) -> list[NDArray[np.int64]]:
    """Documents of lognormal length (at least 3 tokens) with uniform ids from 4 on."""
    rng = np.random.default_rng(seed)
    lengths = np.maximum(rng.lognormal(np.log(mean_tokens), 0.8, count).astype(int), 3)
    return [
        np.concatenate([[BOS_ID], rng.integers(4, vocab_size, length - 2), [EOS_ID]]) for length in lengths.tolist()
    ]


def write_dataset(
    folder: Path,
    sources: Mapping[str, Documents],
    *,
    sequence_tokens: int,
    packing: str,
    lanes: int | None = None,
    vocab_size: int = 512,
    block_tokens: int | None = None,
    held_out: Mapping[str, Documents] | None = None,
) -> Manifest:
    """Writes a dataset folder and returns its manifest.

    Args:
        folder: made if missing.
        sources: training documents of each source.
        sequence_tokens, packing: the one row length and packing that rows are counted for.
        lanes, block_tokens: None chooses as `prepare` does.
        held_out: held-out documents of some sources.

    Every weight is 1.0 (`set_weights` changes that), windows have 4 blocks, shards 3.
    """
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    _write(folder / "tokenizer/tokenizer.model", b"a stand-in for a tokenizer")
    entries: list[dict[str, Any]] = []
    chosen: list[int] = []
    for name, documents in sources.items():
        lengths = np.array([len(document) for document in documents], dtype=np.int64)
        size = block_tokens or choose_block_tokens(lengths, sequence_tokens)
        assert size is not None, f"source {name!r} is too small for 8 blocks of {sequence_tokens} tokens"
        chosen.append(size)
        parts = {"train": documents, "held_out": (held_out or {}).get(name, ())}
        splits = {
            split: _write_split(folder, (name, split), part, size, dtype) for split, part in parts.items() if part
        }
        for split, content in splits.items():
            content["rows"] = [_write_rows(folder, (name, split), splits[split], sequence_tokens, packing)]
        for content in splits.values():
            del content["lengths"]
        inputs = {"files": 1, "documents": len(documents), "bytes": 1, "xxh3_128": digest_hex(name.encode())}
        entries.append({"name": name, "weight": 1.0, "inputs": inputs, "held_out": None, **splits})
    tokenizer = FileRecord.of(folder, "tokenizer/tokenizer.model").model_dump()
    smallest = min(entry["train"]["block_count"] for entry in entries)
    manifest = Manifest.model_validate(
        {
            "seed": 0,
            "prepare": {},
            "tokenizer": {**tokenizer, "kind": "unigram", "vocab_size": vocab_size},
            "token_dtype": dtype,
            "block_tokens": max(chosen),
            "lanes": lanes or choose_lanes(smallest),
            "window_blocks": WINDOW_BLOCKS,
            "sources": entries,
        }
    )
    return manifest.write(folder)


def set_weights(manifest: Manifest, weights: Mapping[str, float]) -> Manifest:
    """Writes the manifest again with other weights."""
    content = manifest.model_dump()
    for source in content["sources"]:
        source["weight"] = weights[source["name"]]
    return Manifest.model_validate(content).write(manifest.folder)


def _write_split(
    folder: Path, name: tuple[str, str], documents: Documents, block_tokens: int, dtype: str
) -> dict[str, Any]:
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    parts = cut_documents(lengths, block_tokens)
    bounds = cut_blocks(parts.tokens, block_tokens).tolist()
    blocks = []
    for first, end in pairwise(bounds):
        tokens = []
        origins: list[dict[str, str | int]] = []
        for entry in range(first, end):
            document, start, size = (int(column[entry]) for column in (parts.document, parts.start, parts.tokens))
            tokens.append(np.asarray(documents[document])[start : start + size])
            origins.append({"source": name[0], "path": f"{name[1]}.txt", "index": document})
            if parts.part[entry]:
                origins[-1]["part"] = int(parts.part[entry])
        blocks.append((tokens, origins))
    shards, records = [], []
    for number in range(-(-len(blocks) // BLOCKS_PER_SHARD)):
        shard = shard_name(*name, number)
        here = blocks[number * BLOCKS_PER_SHARD : (number + 1) * BLOCKS_PER_SHARD]
        _write_shard(folder, shard, here, dtype)
        index = FileRecord.of(folder, index_name(shard)).model_dump()
        records.append({**FileRecord.of(folder, shard).model_dump(), "index": index, "blocks": len(here)})
        shards.append(shard)
    file = f"blocks/{name[0]}-{name[1]}.npy"
    _write_array(folder / file, block_records(folder, shards))
    return {
        "shards": records,
        "blocks": FileRecord.of(folder, file).model_dump(),
        "block_count": len(blocks),
        "documents": len(documents),
        "tokens": sum(len(part) for tokens, _ in blocks for part in tokens),
        "text_bytes": 4 * int(lengths.sum()),
        "lengths": [[len(part) for part in tokens] for tokens, _ in blocks],
    }


def _write_rows(
    folder: Path, name: tuple[str, str], split: dict[str, Any], sequence_tokens: int, packing: str
) -> dict[str, Any]:
    rows = np.array([rows_per_block(each, sequence_tokens, packing) for each in split["lengths"]], dtype=np.int64)
    file = f"rows/{name[0]}-{name[1]}-T{sequence_tokens}-{packing}.npy"
    _write_array(folder / file, rows)
    record = FileRecord.of(folder, file).model_dump()
    return {**record, "sequence_tokens": sequence_tokens, "packing": packing, "rows": int(rows.sum())}


def _write_shard(
    folder: Path, shard: str, blocks: list[tuple[list[NDArray[Any]], list[dict[str, str | int]]]], dtype: str
) -> None:
    digests, contents = {}, []
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (tokens, origins) in enumerate(blocks):
            payload = (
                provenance_bytes(origins),
                np.array([len(part) for part in tokens], dtype="<u4").tobytes(),
                np.concatenate(tokens).astype(np.dtype(dtype).newbyteorder("<")).tobytes(),
            )
            for member, data in zip(MEMBERS, payload, strict=True):
                info = tarfile.TarInfo(f"{number:06d}.{member}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                digests[info.name] = digest_hex(data)
            count = sum(len(part) for part in tokens)
            contents.append({"documents": len(tokens), "tokens": count, "bytes": 4 * count})
    _write(folder / shard, file.getvalue())
    with tarfile.open(folder / shard, "r:") as tar:
        members = [
            {"name": each.name, "offset": each.offset_data, "size": each.size, "xxh3_128": digests[each.name]}
            for each in tar
        ]
    index = {"schema_version": INDEX_SCHEMA_VERSION, "shard": shard, "members": members, "blocks": contents}
    _write(folder / index_name(shard), json_bytes(index))


def _write(path: Path, content: bytes) -> None:
    # Without fsync, which costs more here than all the rest.
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _write_array(path: Path, array: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array, allow_pickle=False)
