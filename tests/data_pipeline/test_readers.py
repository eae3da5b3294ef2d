"""Readers: documents and their byte ranges against texts written by hand, and every mistake named by its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline import readers
from data_pipeline.config import SourceConfig
from data_pipeline.errors import DataConfigurationError
from data_pipeline.readers import InputFile, find_inputs, read_documents, text_extractor


def source(path: str = "*", **changes: object) -> SourceConfig:
    return SourceConfig.model_validate({"name": "own", "path": path, **changes})


def write(folder: Path, name: str, content: bytes | str) -> InputFile:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return InputFile(str(path), name, path.stat().st_size, path.stat().st_mtime_ns)


def found(folder: Path, config: SourceConfig, dataset: str = "dataset") -> list[str]:
    return [file.name for file in find_inputs(config, folder, folder / dataset)]


def texts(file: InputFile, config: SourceConfig) -> list[tuple[int, str]]:
    """(index, text) of all documents, after checking that each can be read again from its byte range."""
    raw = Path(file.path).read_bytes()
    extract = text_extractor(file, config)
    documents = list(read_documents(file, config))
    for each in documents:
        assert extract(each.index, each.offset, raw[each.offset : each.offset + each.size]) == each.text
    return [(each.index, each.text) for each in documents]


def test_globs_folders_and_single_files_are_found_in_byte_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "a/x.jsonl", "a.py", ".hidden.txt", "dataset/own.txt", "Z.txt"):
        write(tmp_path, name, "text")
    assert found(tmp_path, source("**/*.txt")) == ["Z.txt", "a/b/c.txt", "a/z.txt", "b.txt"]
    assert found(tmp_path, source("a")) == ["b/c.txt", "x.jsonl", "z.txt"]
    assert found(tmp_path, source(str(tmp_path / "a" / "*.txt"))) == ["z.txt"]
    assert found(tmp_path, source("a/**/*.txt")) == ["b/c.txt", "z.txt"]
    assert found(tmp_path, source("a.py")) == ["a.py"]
    assert found(tmp_path, source("**/*.txt", exclude=["a/*", "Z*"])) == ["b.txt"]


def test_a_file_whose_name_looks_like_a_glob_is_found(tmp_path: Path) -> None:
    write(tmp_path, "a[1].txt", "text")
    assert found(tmp_path, source("a[1].txt")) == ["a[1].txt"]


@pytest.mark.parametrize("path", ["none/**/*.txt", "nowhere", "missing.txt"])
def test_a_source_without_files_is_refused(tmp_path: Path, path: str) -> None:
    write(tmp_path, "empty/readme.md", "no format of ours")
    with pytest.raises(DataConfigurationError, match="has no files") as caught:
        found(tmp_path, source(path))
    assert path in caught.value.got
    with pytest.raises(DataConfigurationError, match="has no files"):
        found(tmp_path, source("empty"))


def test_a_compressed_file_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl.gz", b"\x1f\x8b")
    with pytest.raises(DataConfigurationError, match="not supported") as caught:
        found(tmp_path, source("*.gz"))
    assert "a.jsonl.gz" in caught.value.got


def test_a_file_is_one_document_without_its_byte_order_mark(tmp_path: Path) -> None:
    file = write(tmp_path, "a.txt", b"\xef\xbb\xbfone\r\n\r\ntwo \xef\xbb\xbf\n")
    assert texts(file, source()) == [(0, "one\n\ntwo \ufeff\n")]


def test_lines_keep_their_numbers_and_blank_ones_are_left_out(tmp_path: Path) -> None:
    file = write(tmp_path, "a.txt", "\ufeffone\r\n\n  \n two\r\nthré")
    assert texts(file, source(documents="line")) == [(0, "one"), (3, " two"), (4, "thré")]


def test_paragraphs_end_at_blank_lines(tmp_path: Path) -> None:
    file = write(tmp_path, "a.txt", "\n\none\r\n  more\r\n \t \r\ntwo\n\n\nthré\nlast\n")
    expected = [(0, "one\n  more"), (1, "two"), (2, "thré\nlast")]
    assert texts(file, source(documents="blank_line")) == expected


def test_json_lines_give_the_text_field(tmp_path: Path) -> None:
    rows = [{"text": "one\ntwo"}, {"text": "  "}, {"text": "th\ud800ré", "other": 1}]
    lines = "\ufeff" + "\n\n".join(json.dumps(row) for row in rows) + "\n"
    file = write(tmp_path, "a.jsonl", lines)
    assert texts(file, source()) == [(0, "one\ntwo"), (4, "th\ufffdré")]
    body = write(tmp_path, "b.ndjson", '{"body": "hé"}')
    assert texts(body, source(text_field="body")) == [(0, "hé")]


@pytest.mark.parametrize("documents", ["file", "line", "blank_line"])
def test_a_byte_that_is_not_utf8_is_named_by_its_offset(tmp_path: Path, documents: str) -> None:
    content = b"\xef\xbb\xbfgood line\n\nbad \xe9t\xe9\n"
    file = write(tmp_path, "latin.txt", content)
    with pytest.raises(DataConfigurationError, match="is not UTF-8") as caught:
        list(read_documents(file, source(documents=documents)))
    assert "latin.txt" in caught.value.what
    assert f"offset {content.index(0xE9)}" in caught.value.got
    assert "iconv" in caught.value.remedy


@pytest.mark.parametrize(
    ("line", "got"),
    [
        ("{not json", "Expecting property name"),
        ('"a string"', "a JSON str"),
        ('{"body": 1, "title": 2}', "keys body, title"),
        ('{"text": 5}', '"text" is a int'),
        ("[" * 200_000, "recursion"),
    ],
)
def test_a_bad_json_line_is_named_by_file_and_number(tmp_path: Path, line: str, got: str) -> None:
    file = write(tmp_path, "a.jsonl", '{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(DataConfigurationError, match=r"a\.jsonl, line 3,") as caught:
        list(read_documents(file, source()))
    assert got in caught.value.got


def test_a_document_above_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_DOCUMENT_BYTES", 40)
    file = write(tmp_path, "a.txt", "short line\n" * 4)
    assert len(list(read_documents(file, source(documents="line")))) == 4
    for documents in ("file", "blank_line"):
        with pytest.raises(DataConfigurationError, match="too large"):
            list(read_documents(file, source(documents=documents)))
    long = write(tmp_path, "b.txt", "x" * 50)
    with pytest.raises(DataConfigurationError, match="too large"):
        list(read_documents(long, source(documents="line")))
