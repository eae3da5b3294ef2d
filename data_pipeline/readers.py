"""Input files: finding those of a source, and reading documents out of them one after the other.

Formats: text (`file`, `line` or `blank_line` documents) and JSON lines. UTF-8 is checked strictly: a byte
that is not UTF-8 is an error that names file and offset, never a silent replacement.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Final

from data_pipeline.config import SourceConfig, resolve_path
from data_pipeline.document import Document
from data_pipeline.errors import DataConfigurationError
from data_pipeline.normalize import BYTE_ORDER_MARK, normalize

MAX_DOCUMENT_BYTES: Final = 256 << 20
"""A document is held in memory whole; larger ones are refused."""

JSON_LINES: Final = (".jsonl", ".ndjson")
FOLDER_FORMATS: Final = (".txt", *JSON_LINES)
UNSUPPORTED: Final = (".gz", ".zst", ".bz2", ".xz", ".zip", ".tar", ".parquet", ".arrow", ".7z", ".json")
"""Refused by name: read as text they would give nonsense or a puzzling UTF-8 error."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """One input file of a source.

    Attributes:
        path: where it is now; stored nowhere in the dataset.
        name: its path below the source's root, with forward slashes: stored, and part of document names.
        size: bytes.
        mtime_ns: modification time when it was found, to notice a change while it is being prepared.
    """

    path: str
    name: str
    size: int
    mtime_ns: int


def find_inputs(source: SourceConfig, base_folder: Path, dataset_folder: Path) -> list[InputFile]:
    """The files of a source, sorted by name, without hidden files and those inside `dataset_folder`.

    Raises:
        DataConfigurationError: nothing matches, or a file has a format that cannot be read.
    """
    pattern = resolve_path(source.path, base_folder)
    root, candidates = _candidates(pattern)
    found = {}
    for path in candidates:
        name = Path(os.path.relpath(path, root)).as_posix()
        outside = not path.is_relative_to(dataset_folder)
        if outside and path.is_file() and not any(fnmatchcase(name, rule) for rule in source.exclude):
            found[name] = path
    if not found:
        raise DataConfigurationError(
            f"Source {source.name!r} has no files.",
            got=f"data.sources path {source.path!r}, which is {pattern}: no file matches",
            rule="a file, a folder with .txt or .jsonl files, or a glob that matches files"
            + (f"; excluded: {', '.join(source.exclude)}" if source.exclude else ""),
            remedy="correct data.sources path (relative paths count from the working directory)",
        )
    inputs = []
    for name in sorted(found, key=os.fsencode):
        path = found[name]
        if path.suffix.lower() in UNSUPPORTED:
            raise DataConfigurationError(
                f"Source {source.name!r} has a file in a format that is not supported.",
                got=str(path),
                rule="plain text, or .jsonl",
                remedy="unpack or convert it, or leave it out with a narrower path or `exclude`",
            )
        status = path.stat()
        inputs.append(InputFile(str(path), name, status.st_size, status.st_mtime_ns))
    return inputs


def _candidates(pattern: Path) -> tuple[Path, list[Path]]:
    """(root that names count from, paths that may be inputs)."""
    if pattern.is_dir():
        matches = glob.glob("**", root_dir=pattern, recursive=True)
        files = [pattern / match for match in matches if Path(match).suffix.lower() in FOLDER_FORMATS]
        return pattern, files
    if pattern.exists() or not glob.has_magic(str(pattern)):
        return pattern.parent, [pattern]
    root = Path(pattern.anchor)
    for part in pattern.parts[1:-1]:
        if glob.has_magic(part):
            break
        root /= part
    return root, [Path(match) for match in glob.glob(str(pattern), recursive=True)]


def is_json_lines(name: str) -> bool:
    """Whether a file of this name is read as JSON lines."""
    return name.lower().endswith(JSON_LINES)


def read_documents(file: InputFile, source: SourceConfig) -> Iterator[Document]:
    """The documents of one file that are not blank, in order; memory is bounded by the largest document.

    Raises:
        DataConfigurationError: bytes that are not UTF-8, a bad JSON line, or a document above the limit.
    """
    with open(file.path, "rb") as stream:
        if is_json_lines(file.name):
            pieces = _lines(stream, file)
        elif source.documents == "file":
            pieces = _whole(stream, file)
        elif source.documents == "line":
            pieces = _lines(stream, file)
        else:
            pieces = _paragraphs(stream, file)
        extract = text_extractor(file, source)
        for index, offset, raw in pieces:
            text = extract(index, offset, raw)
            if text and not text.isspace():
                yield Document(index, offset, len(raw), text)


def text_extractor(file: InputFile, source: SourceConfig) -> Callable[[int, int, bytes], str]:
    """A function (index, offset, raw bytes) -> normalised text of the document in these bytes of `file`."""

    def plain(index: int, offset: int, raw: bytes) -> str:
        return normalize(_decoded(raw, offset, file))

    def json_line(index: int, offset: int, raw: bytes) -> str:
        text = _decoded(raw, offset, file)
        return normalize(_json_text(text, file, index + 1, source.text_field)) if text.strip() else ""

    return json_line if is_json_lines(file.name) else plain


def _whole(stream: IO[bytes], file: InputFile) -> Iterator[tuple[int, int, bytes]]:
    raw = stream.read(MAX_DOCUMENT_BYTES + 1)
    _check_size(len(raw), file, "a file")
    start = len(BYTE_ORDER_MARK) if raw.startswith(BYTE_ORDER_MARK) else 0
    yield 0, start, raw[start:]


def _lines(stream: IO[bytes], file: InputFile) -> Iterator[tuple[int, int, bytes]]:
    """Lines without their ends; index is the line's number."""
    offset = index = 0
    while raw := stream.readline(MAX_DOCUMENT_BYTES + 1):
        _check_size(len(raw), file, f"line {index + 1}")
        start = len(BYTE_ORDER_MARK) if index == 0 and raw.startswith(BYTE_ORDER_MARK) else 0
        yield index, offset + start, raw[start:].rstrip(b"\r\n")
        offset += len(raw)
        index += 1


def _paragraphs(stream: IO[bytes], file: InputFile) -> Iterator[tuple[int, int, bytes]]:
    """Runs of lines that are not blank; index counts the runs."""
    index = first = size = 0
    run: list[bytes] = []
    for _, offset, raw in _lines(stream, file):
        if raw.strip():
            if not run:
                first, size = offset, 0
            run.append(raw)
            size = offset + len(raw) - first
            _check_size(size, file, f"the paragraph at byte {first}")
        elif run:
            yield index, first, _range(stream, first, size)
            index, run = index + 1, []
    if run:
        yield index, first, _range(stream, first, size)


def _range(stream: IO[bytes], offset: int, size: int) -> bytes:
    """A byte range, without moving the stream: line ends inside a paragraph stay as the file has them."""
    return os.pread(stream.fileno(), size, offset)


def _check_size(size: int, file: InputFile, what: str) -> None:
    if size > MAX_DOCUMENT_BYTES:
        raise DataConfigurationError(
            f"A document in {file.path} is too large.",
            got=f"{what} of more than {MAX_DOCUMENT_BYTES} bytes as one document",
            rule=f"at most {MAX_DOCUMENT_BYTES} bytes a document: it is held in memory",
            remedy="cut the text in smaller files, or set the source's documents to line or blank_line",
        )


def _decoded(raw: bytes, offset: int, file: InputFile) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataConfigurationError(
            f"{file.path} is not UTF-8.",
            got=f"byte 0x{raw[error.start]:02x} at offset {offset + error.start}: {error.reason}",
            rule="input text is UTF-8, checked strictly so that nothing is replaced unseen",
            remedy="convert the file (`iconv -f LATIN1 -t UTF-8`), or leave it out with `exclude`; then run "
            "the same command again",
        ) from error


def _json_text(line: str, file: InputFile, number: int, field: str) -> str:
    try:
        # RecursionError: a line of a hundred thousand brackets.
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _bad_line(file, number, f"{error}", "one JSON object a line") from error
    rule = f'a JSON object with the text under "{field}"'
    if not isinstance(content, dict):
        raise _bad_line(file, number, f"a JSON {type(content).__name__}", rule)
    if field not in content:
        raise _bad_line(file, number, f"an object with the keys {', '.join(sorted(content)[:8])}", rule)
    if not isinstance(text := content[field], str):
        raise _bad_line(file, number, f'"{field}" is a {type(text).__name__}', rule)
    return text


def _bad_line(file: InputFile, number: int, got: str, rule: str) -> DataConfigurationError:
    return DataConfigurationError(
        f"{file.path}, line {number}, cannot be read.",
        got=got,
        rule=rule,
        remedy="correct the line, or set the source's text_field; then run the same command again",
    )
