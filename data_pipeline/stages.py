"""The tasks of a preparation: each reads what earlier ones wrote, and writes its own files atomically.

read_table    input files      -> one record a document
train         sampled texts    -> tokenizer
tokenise      documents        -> token spill in file order
make_shard    spills, layout   -> one shard and its index
remake_shard  input files      -> the same shard, when it was lost later
make_blocks   indexes          -> the block array of a split
make_rows     shards           -> rows per block for one row length and packing
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import SourceConfig
from data_pipeline.document import TABLE_DTYPE, hash_table, provenance
from data_pipeline.errors import DamagedDataError, DataConfigurationError
from data_pipeline.files import open_array, write_array, write_atomically, write_bytes, write_json
from data_pipeline.layout import Entries, cut_blocks, cut_documents, part_bytes
from data_pipeline.manifest import BOS_ID, EOS_ID, PAD_ID, UNK_ID, digest_pair
from data_pipeline.packing import rows_per_block
from data_pipeline.readers import InputFile, read_documents, text_extractor
from data_pipeline.shards import (
    LENGTH_DTYPE,
    Block,
    block_records,
    file_record,
    index_name,
    write_shard,
)
from data_pipeline.tasks import WORK, Result
from data_pipeline.tokenizer import Tokenizer, train_tokenizer

MODEL_FILE: Final = "tokenizer/tokenizer.model"
REPORT_FILE: Final = "tokenizer/tokenizer.json"

ENTRY_DTYPE: Final = np.dtype(
    [
        ("row", "<u8"),
        ("part", "<u4"),
        ("tokens", "<u8"),
        ("text_bytes", "<u8"),
        ("spill", "<u4"),
        ("offset", "<u8"),
    ]
)
"""One document or part in the order of the shards: row of its document in the selection, part number, tokens,
text bytes, and where its tokens lie: spill, and token offset in the spill."""


def selection_file(source: str) -> str:
    """The table of a source's chosen documents in file order."""
    return f"{WORK}/selection/{source}.npy"


def paths_file(source: str) -> str:
    """The names of a source's files, by number."""
    return f"{WORK}/selection/{source}.paths.json"


@dataclass(frozen=True, slots=True)
class Documents:
    """Some documents of one source, to be read again from their byte ranges.

    Attributes:
        source: the source.
        files: the input files that `rows` refer to, by number.
        rows: (documents,) records of TABLE_DTYPE.
    """

    source: SourceConfig
    files: dict[int, InputFile]
    rows: NDArray[Any]

    @classmethod
    def of(cls, source: SourceConfig, files: list[InputFile], rows: NDArray[Any]) -> Documents:
        """Keeps of `files` those that are needed."""
        return cls(source, {int(number): files[number] for number in np.unique(rows["file"])}, rows)

    def texts(self) -> Iterator[str]:
        """The normalised texts, in the order of `rows`.

        Raises:
            DataConfigurationError: a file was changed since it was found.
        """
        columns = self.rows[["file", "index", "offset", "size"]].tolist()
        for number, group in groupby(columns, key=itemgetter(0)):
            extract = text_extractor(self.files[number], self.source)
            with Path(self.files[number].path).open("rb") as stream:
                _check_unchanged(stream, self.files[number])
                for _, index, offset, size in group:
                    yield extract(index, offset, os.pread(stream.fileno(), size, offset))


def _check_unchanged(stream: IO[bytes], file: InputFile) -> None:
    status = os.fstat(stream.fileno())
    if (status.st_size, status.st_mtime_ns) == (file.size, file.mtime_ns):
        return
    raise DataConfigurationError(
        f"{file.path} was changed while the dataset was being prepared.",
        got=f"{status.st_size} bytes, modified since",
        rule=f"{file.size} bytes, as when the preparation began",
        remedy="run the same command again when the inputs are at rest",
    )


def read_table(
    folder: Path, source: SourceConfig, files: list[tuple[int, InputFile]], seed: int, output: str
) -> Result:
    """Task: reads some files of a source and writes one record a document (all but hashes from the file)."""
    records = []
    for number, file in files:
        for document in read_documents(file, source):
            size = len(document.text.encode())
            records.append((number, document.index, document.offset, document.size, size, 0, 0))
    table = np.array(records, dtype=TABLE_DTYPE)
    names = {number: file.name for number, file in files}
    hash_table(seed, source.name, names, table)
    write_array(folder / output, folder / WORK / "tmp", table)
    return {"files": [_work_record(folder, output)], "documents": len(table)}


def train(folder: Path, samples: list[tuple[Documents, int]], kind: str, vocab_size: int) -> Result:
    """Task: trains the tokenizer on the beginnings of sampled documents and reports on it.

    Args:
        folder: the dataset folder.
        samples: for each source its sampled documents, and the bytes to take of each.
        kind: SentencePiece model type.
        vocab_size: number of ids.
    """
    texts = [_beginning(text, size) for documents, size in samples for text in documents.texts()]
    model = train_tokenizer(texts, kind=kind, vocab_size=vocab_size)
    tokenizer = Tokenizer(model)
    text_bytes = tokens = words = fallback = 0
    byte_ids = np.array([piece.kind == "byte" for piece in tokenizer.pieces()])
    for text in texts:
        ids = tokenizer.encode_array(text)
        assert tokenizer.decode(ids) == text, "the tokenizer does not round-trip its own sample"
        text_bytes += len(text.encode())
        words += len(text.split())
        tokens += len(ids)
        fallback += int(byte_ids[ids].sum())
    report = {
        "schema_version": 1,
        "kind": kind,
        "vocab_size": tokenizer.vocab_size,
        "xxh3_128": tokenizer.digest,
        "special_ids": {"unk": UNK_ID, "bos": BOS_ID, "eos": EOS_ID, "pad": PAD_ID},
        "newline_id": tokenizer.newline,
        "sample": {
            "documents": len(texts),
            "text_bytes": text_bytes,
            "tokens": tokens,
            "words": words,
            "fertility_tokens_per_word": round(tokens / max(words, 1), 6),
            "bytes_per_token": round(text_bytes / max(tokens, 1), 6),
            "byte_token_fraction": round(fallback / max(tokens, 1), 6),
            "round_trip_documents": len(texts),
        },
    }
    aside = folder / WORK / "tmp"
    write_bytes(folder / MODEL_FILE, aside, model)
    write_json(folder / REPORT_FILE, aside, report)
    return {"files": [file_record(folder, MODEL_FILE), file_record(folder, REPORT_FILE)]}


def _beginning(text: str, size: int) -> str:
    """The whole characters in the first `size` bytes."""
    return text if 4 * len(text) <= size else text.encode()[:size].decode("utf-8", errors="ignore")


def tokenise(folder: Path, documents: Documents, token_dtype: str, output: str) -> Result:
    """Task: writes the tokens of some documents (BOS, ids, EOS each) and how many each has."""
    tokenizer = Tokenizer.load(folder / MODEL_FILE)
    lengths: list[int] = []

    def write(file: IO[bytes]) -> None:
        for tokens in _tokens(tokenizer, documents, token_dtype):
            lengths.append(len(tokens))
            file.write(tokens.tobytes())

    aside = folder / WORK / "tmp"
    write_atomically(folder / f"{output}.bin", aside, write)
    write_array(folder / f"{output}.lengths.npy", aside, np.array(lengths, dtype="<u8"))
    files = [_work_record(folder, f"{output}.bin"), _work_record(folder, f"{output}.lengths.npy")]
    return {"files": files, "tokens": sum(lengths)}


def _tokens(tokenizer: Tokenizer, documents: Documents, token_dtype: str) -> Iterator[NDArray[Any]]:
    for text in documents.texts():
        ids = tokenizer.encode_array(text)
        tokens = np.empty(len(ids) + 2, dtype=np.dtype(token_dtype).newbyteorder("<"))
        tokens[0], tokens[1:-1], tokens[-1] = BOS_ID, ids, EOS_ID
        yield tokens


def make_shard(
    folder: Path, shard: str, source: str, layout: tuple[str, list[int]], spills: list[str], token_dtype: str
) -> Result:
    """Task: writes one shard from the spills.

    Args:
        folder: the dataset folder.
        shard: its path below the folder.
        source: name of the source.
        layout: the split's array of ENTRY_DTYPE, and the offsets of this shard's blocks in it.
        spills: the source's spills (without suffix), in order.
        token_dtype: uint16 or uint32.
    """
    entries, offsets = open_array(folder / layout[0]), layout[1]
    selection = open_array(folder / selection_file(source))
    paths = json.loads((folder / paths_file(source)).read_bytes())
    mapped: dict[int, NDArray[Any]] = {}

    def tokens_of(entry: Any) -> NDArray[Any]:
        spill, offset = int(entry["spill"]), int(entry["offset"])
        if spill not in mapped:
            name = folder / f"{spills[spill]}.bin"
            mapped[spill] = np.memmap(name, dtype=np.dtype(token_dtype).newbyteorder("<"), mode="r")
        return mapped[spill][offset : offset + int(entry["tokens"])]

    def blocks() -> Iterator[Block]:
        for first, end in pairwise(offsets):
            members = entries[first:end]
            rows = selection[members["row"]]
            origins = zip(rows["file"].tolist(), rows["index"].tolist(), members["part"].tolist(), strict=True)
            yield Block(
                tokens=np.concatenate([tokens_of(entry) for entry in members]),
                lengths=members["tokens"].astype(np.int64),
                documents=[provenance(source, paths[file], index, part) for file, index, part in origins],
                text_bytes=int(members["text_bytes"].sum()),
            )

    return _shard_result(folder, shard, blocks())


def remake_shard(
    folder: Path,
    shard: str,
    documents: Documents,
    bounds: tuple[int, int],
    block_tokens: int,
    token_dtype: str,
) -> Result:
    """Task: writes one lost shard again from the input files, tokenising only its own documents.

    Args:
        folder: the dataset folder.
        shard: its path below the folder.
        documents: the shard's documents in shuffled order.
        bounds: first token that it holds of its first document, and of its last one the first token that
            belongs to the next shard (0: the last document is whole).
        block_tokens: as the source's blocks were cut.
        token_dtype: uint16 or uint32.
    """
    tokenizer = Tokenizer.load(folder / MODEL_FILE)
    tokens = list(_tokens(tokenizer, documents, token_dtype))
    lengths = np.array([len(each) for each in tokens], dtype=np.int64)
    entries = cut_documents(lengths, block_tokens)
    text_bytes = part_bytes(entries, lengths, documents.rows["text_bytes"].astype(np.int64))
    start, end = bounds
    here = ~((entries.document == 0) & (entries.start < start))
    if end:
        here &= ~((entries.document == len(lengths) - 1) & (entries.start >= end))
    entries, text_bytes = entries.take(here), text_bytes[here]
    offsets = cut_blocks(entries.tokens, block_tokens).tolist()

    def blocks() -> Iterator[Block]:
        for first, stop in pairwise(offsets):
            yield _block(documents, tokens, entries, text_bytes, range(first, stop))

    return _shard_result(folder, shard, blocks())


def _block(
    documents: Documents,
    tokens: list[NDArray[Any]],
    entries: Entries,
    text_bytes: NDArray[np.int64],
    members: range,
) -> Block:
    parts, origins = [], []
    for entry in members:
        document, start = int(entries.document[entry]), int(entries.start[entry])
        parts.append(tokens[document][start : start + int(entries.tokens[entry])])
        row = documents.rows[document]
        name = documents.files[int(row["file"])].name
        origins.append(provenance(documents.source.name, name, int(row["index"]), int(entries.part[entry])))
    span = slice(members.start, members.stop)
    return Block(np.concatenate(parts), entries.tokens[span], origins, int(text_bytes[span].sum()))


def _shard_result(folder: Path, shard: str, blocks: Iterator[Block]) -> Result:
    count = write_shard(folder, folder / WORK / "tmp", shard, blocks)
    files = [file_record(folder, shard), file_record(folder, index_name(shard))]
    return {"files": files, "blocks": count}


def make_blocks(folder: Path, shards: list[str], output: str) -> Result:
    """Task: writes the block array of a split from its shards' indexes."""
    records = block_records(folder, shards)
    write_array(folder / output, folder / WORK / "tmp", records)
    return {
        "files": [file_record(folder, output)],
        "blocks": len(records),
        "tokens": int(records["tokens"].sum()),
        "text_bytes": int(records["text_bytes"].sum()),
    }


def make_rows(folder: Path, shards: list[str], blocks: str, rows: tuple[int, str], output: str) -> Result:
    """Task: writes how many rows each block of a split gives for one (sequence_tokens, packing).

    Raises:
        DamagedDataError: the lengths in a shard are not those that the block array vouches for.
    """
    records = open_array(folder / blocks)
    counts = np.zeros(len(records), dtype="<i8")
    done = 0
    for number, group in groupby(records, key=lambda record: int(record["shard"])):
        with (folder / shards[number]).open("rb") as stream:
            for record in group:
                raw = os.pread(stream.fileno(), int(record["lengths_size"]), int(record["lengths_offset"]))
                if digest_pair(raw) != tuple(int(word) for word in record["digest_lengths"]):
                    raise DamagedDataError(
                        f"{shards[number]} was changed after it was prepared.",
                        got=f"other document lengths in block {done} of the split",
                        rule=f"the digests in {blocks}",
                        remedy="run `solomonov prepare` again: it rebuilds the shard",
                    )
                counts[done] = rows_per_block(np.frombuffer(raw, dtype=LENGTH_DTYPE), *rows)
                done += 1
    write_array(folder / output, folder / WORK / "tmp", counts)
    return {"files": [file_record(folder, output)], "rows": int(counts.sum())}


def _work_record(folder: Path, file: str) -> dict[str, str | int]:
    return {"file": file, "size": (folder / file).stat().st_size}
