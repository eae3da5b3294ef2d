"""prepare: the dataset against its input texts, byte-identity under workers, reruns, damage and kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from data_pipeline.build import PrepareReport, prepare
from data_pipeline.config import DataConfig, SourceConfig, TokenizerConfig
from data_pipeline.dataset import Dataset
from data_pipeline.errors import DamagedDataError, DataConfigurationError
from data_pipeline.manifest import MANIFEST_FILE, Manifest
from data_pipeline.tasks import work_lock
from data_pipeline.tokenizer import Tokenizer
from tests.support import corpus
from tests.support.processes import Program

SHARD = "shards/own-train-000001.tar"


def run(base: Path, data: DataConfig | None = None, tokenizer: TokenizerConfig = corpus.TOKENIZER) -> PrepareReport:
    return prepare(data or corpus.data_config(), tokenizer, base_folder=base, show_progress=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder with texts and their dataset, prepared without disturbance; read only."""
    base = tmp_path_factory.mktemp("whole")
    corpus.write_texts(base / "text")
    report = run(base)
    assert report.redone > 5
    return base


@pytest.fixture
def base(whole: Path, tmp_path: Path) -> Path:
    """A copy of the undisturbed base folder that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "base"))


def stored_texts(folder: Path) -> tuple[dict[tuple[str, int], str], dict[str, set[str]]]:
    """Every stored document by (path, index), its parts joined, and the paths of each split."""
    tokenizer = Tokenizer.load(folder / "tokenizer" / "tokenizer.model")
    texts: dict[tuple[str, int], list[int]] = {}
    splits: dict[str, set[str]] = {}
    with Dataset.open(folder) as dataset:
        for source in dataset.manifest.sources:
            for split, entry in source.splits():
                for block in range(entry.block_count):
                    content = dataset.read_block(source.name, split, block)
                    origins = dataset._provenance(source.name, split, block)
                    pieces = np.split(content.tokens, np.cumsum(content.lengths)[:-1])
                    for origin, piece in zip(origins, pieces, strict=True):
                        key = (origin["path"], origin["index"])
                        joined = texts.setdefault(key, [])
                        assert bool(joined) == ("part" in origin)
                        if joined:
                            assert joined[-1] == piece[0], "parts overlap by one token"
                        joined += piece[1 if joined else 0 :].tolist()
                        splits.setdefault(split, set()).add(origin["path"])
    for tokens in texts.values():
        assert (tokens[0], tokens[-1]) == (tokenizer.bos, tokenizer.eos)
        assert Counter(tokens)[tokenizer.bos] == Counter(tokens)[tokenizer.eos] == 1
    return {key: tokenizer.decode(tokens) for key, tokens in texts.items()}, splits


def test_every_document_is_stored_once_and_whole(whole: Path) -> None:
    texts, splits = stored_texts(whole / "dataset")
    expected = {
        (path.relative_to(whole / "text").as_posix(), 0): path.read_text(encoding="utf-8")
        for path in (whole / "text").rglob("*.txt")
    }
    assert texts == expected
    assert len(splits["held_out"]) == 4
    assert len(splits["train"]) == 36
    assert not splits["held_out"] & splits["train"]


def test_the_manifest_counts_what_is_there_and_says_nothing_of_this_machine(whole: Path) -> None:
    folder = whole / "dataset"
    manifest = Manifest.load(folder)
    manifest.verify()
    [source] = manifest.sources
    assert source.inputs.files == source.inputs.documents == 40
    sizes = sum(path.stat().st_size for path in (whole / "text").rglob("*.txt"))
    assert source.inputs.bytes == sizes
    splits = dict(source.splits())
    assert sum(split.text_bytes for split in splits.values()) == sizes
    for name, split in splits.items():
        blocks = np.load(folder / split.blocks.file)
        assert split.block_count == len(blocks)
        assert split.tokens == blocks["tokens"].sum()
        record = split.rows_record(32, "best_fit")
        assert record is not None
        rows = np.load(folder / record.file)
        assert (len(rows), rows.sum()) == (len(blocks), record.rows)
        assert record.file == f"rows/own-{name}-T32-best_fit.npy"
    assert len(source.train.shards) > 2
    assert source.train.block_count >= 64
    assert manifest.lanes == 8
    for path in folder.rglob("*.json"):
        assert str(whole) not in path.read_text()
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST_FILE, "blocks", "rows", "shards", "tokenizer"]


def test_the_tokenizer_report_tells_its_quality(whole: Path) -> None:
    report = json.loads((whole / "dataset" / "tokenizer" / "tokenizer.json").read_bytes())
    assert report["special_ids"] == {"unk": 0, "bos": 1, "eos": 2, "pad": 3}
    assert report["vocab_size"] == 320
    sample = report["sample"]
    assert sample["documents"] == sample["round_trip_documents"] == 36
    assert 1 < sample["bytes_per_token"] < 6
    assert sample["text_bytes"] / sample["tokens"] == pytest.approx(sample["bytes_per_token"], rel=1e-5)
    assert report["xxh3_128"] == Manifest.load(whole / "dataset").tokenizer_digest


def test_the_tokenizers_sample_stays_within_its_bytes(tmp_path: Path) -> None:
    for number in range(4):
        path = tmp_path / "text" / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("漢字 été " * 500 + corpus.text(number, lines=150))
    run(tmp_path, corpus.data_config(prepare={"tokenizer_sample_bytes": 8_000}))
    sample = json.loads((tmp_path / "dataset" / "tokenizer" / "tokenizer.json").read_bytes())["sample"]
    # The beginning of one document, cut at a character of up to three bytes.
    assert sample["documents"] == 1
    assert 7_998 <= sample["text_bytes"] <= 8_000


def test_a_second_run_does_nothing_and_says_so(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (whole / "dataset").rglob("*")}
    report = run(whole)
    assert report.redone == 0
    assert {path: path.stat().st_mtime_ns for path in (whole / "dataset").rglob("*")} == before
    lines = dict(report.summary())
    assert lines["tasks run"].startswith("0 ")
    assert lines["manifest digest"] == report.manifest.digest


def test_work_left_by_a_kill_after_the_manifest_is_cleared(base: Path, whole: Path) -> None:
    (base / "dataset" / ".work" / "tmp").mkdir(parents=True)
    (base / "dataset" / ".work" / "tmp" / "unfinished").touch()
    assert run(base).redone == 0
    assert corpus.contents(base / "dataset") == corpus.contents(whole / "dataset")
    assert not (base / "dataset" / ".work").exists()


def test_bytes_do_not_depend_on_workers_nor_on_where_the_text_lies(whole: Path, tmp_path: Path) -> None:
    texts = corpus.write_texts(tmp_path / "elsewhere" / "mine")
    data = corpus.data_config(
        sources=[SourceConfig(name="own", path=str(texts / "**" / "*.txt"))], prepare={"workers": 2}
    )
    run(tmp_path, data)
    assert corpus.contents(tmp_path / "dataset") == corpus.contents(whole / "dataset")


@pytest.mark.parametrize("prepare_changes", [{"seed": 4}, {"held_out_fraction": 0.2}, {"tokenizer_sample_bytes": 4096}])
def test_each_setting_matters(whole: Path, tmp_path: Path, prepare_changes: dict[str, Any]) -> None:
    corpus.write_texts(tmp_path / "text")
    run(tmp_path, corpus.data_config(prepare=prepare_changes))
    ours, theirs = corpus.contents(tmp_path / "dataset"), corpus.contents(whole / "dataset")
    assert ours["shards/own-train-000000.tar"] != theirs["shards/own-train-000000.tar"]


@pytest.mark.parametrize(
    ("files", "tasks"),
    [
        ([SHARD], 1),
        (["shards/own-held_out-000000.tar", SHARD], 2),
        ([SHARD.replace(".tar", ".index.json")], 1),
        (["blocks/own-train.npy"], 1),
        (["rows/own-held_out-T32-best_fit.npy"], 1),
        (["tokenizer/tokenizer.model"], 1),
        (["tokenizer/tokenizer.json", "blocks/own-held_out.npy", SHARD], 3),
    ],
)
@pytest.mark.parametrize("how", ["deleted", "flipped", "cut"])
def test_what_is_missing_or_damaged_is_made_again_and_nothing_else(
    base: Path, whole: Path, files: list[str], tasks: int, how: str
) -> None:
    for name in files:
        path = base / "dataset" / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        if how == "deleted":
            path.unlink()
        else:
            path.write_bytes(content if how == "flipped" else content[:-1])
    assert run(base).redone == tasks
    assert corpus.contents(base / "dataset") == corpus.contents(whole / "dataset")


@pytest.mark.parametrize("number", range(3))
def test_each_shard_of_a_corpus_with_cut_documents_can_be_made_again(
    tmp_path_factory: pytest.TempPathFactory, number: int
) -> None:
    base = tmp_path_factory.getbasetemp() / "cut-documents"
    data = corpus.data_config(prepare={"shard_bytes": 40 << 10, "held_out_fraction": 0.3})
    if not base.exists():
        for file in range(4):
            path = base / "text" / f"{file}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(corpus.text(file, lines=150))
        run(base, data)
        texts, _ = stored_texts(base / "dataset")
        assert texts == {(f"{file}.txt", 0): corpus.text(file, lines=150) for file in range(4)}
    expected = corpus.contents(base / "dataset")
    starts = Manifest.load(base / "dataset").prepare["shard_starts"]["own-train"]
    assert any(token for _, token in starts), "a shard begins within a document"
    (base / "dataset" / f"shards/own-train-{number:06d}.tar").unlink()
    assert run(base, data).redone == 1
    assert corpus.contents(base / "dataset") == expected


def test_a_lost_or_damaged_manifest_is_made_again(base: Path, whole: Path) -> None:
    expected = corpus.contents(whole / "dataset")
    path = base / "dataset" / MANIFEST_FILE
    for damage in (b"{", path.read_bytes().replace(b'"lanes": 8', b'"lanes": 4'), None):
        path.unlink()
        if damage is not None:
            path.write_bytes(damage)
        assert run(base).redone > 1
        assert corpus.contents(base / "dataset") == expected
    path.write_bytes(path.read_bytes().replace(b'"schema_version": 1', b'"schema_version": 99'))
    with pytest.raises(DataConfigurationError, match="schema"):
        run(base)


def test_another_row_length_or_packing_only_adds_row_arrays(base: Path, whole: Path) -> None:
    assert run(base, corpus.data_config(sequence_tokens=16, packing="concat")).redone == 2
    before, after = corpus.contents(whole / "dataset"), corpus.contents(base / "dataset")
    added = {"rows/own-train-T16-concat.npy", "rows/own-held_out-T16-concat.npy"}
    assert set(after) - set(before) == added
    assert {name for name in before if before[name] != after[name]} == {MANIFEST_FILE}
    train = Manifest.load(base / "dataset").sources[0].train
    assert [(row.sequence_tokens, row.packing) for row in train.rows] == [(16, "concat"), (32, "best_fit")]
    assert run(base).redone == 0
    (base / "dataset" / "rows/own-train-T16-concat.npy").unlink()
    assert run(base).redone == 1
    assert corpus.contents(base / "dataset") == after


def test_other_weights_change_the_manifest_alone(base: Path, whole: Path) -> None:
    data = corpus.data_config(sources=[SourceConfig(name="own", path="text/**/*.txt", weight=2.5)])
    assert run(base, data).redone == 0
    assert Manifest.load(base / "dataset").sources[0].weight == 2.5
    before, after = corpus.contents(whole / "dataset"), corpus.contents(base / "dataset")
    assert {name for name in before if before[name] != after[name]} == {MANIFEST_FILE}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("text", "data.sources 'own' files: 40 files"),
        ("file", "41 files"),
        ("seed", "data.prepare.seed: 3 in the dataset, 5 now"),
        ("vocabulary", "tokenizer.vocab_size: 320 in the dataset, 330 now"),
        ("name", "data.sources names: own in the dataset, other now"),
    ],
)
def test_a_folder_of_another_dataset_is_refused_and_left_alone(base: Path, change: str, named: str) -> None:
    data, tokenizer = corpus.data_config(), corpus.TOKENIZER
    if change == "text":
        (base / "text/part0/file000.txt").write_text("other\n")
    elif change == "file":
        (base / "text/new.txt").write_text("new\n")
    elif change == "seed":
        data = corpus.data_config(prepare={"seed": 5})
    elif change == "vocabulary":
        tokenizer = TokenizerConfig(vocab_size=330)
    else:
        data = corpus.data_config(sources=[SourceConfig(name="other", path="text/**/*.txt")])
    before = corpus.contents(base / "dataset")
    with pytest.raises(DataConfigurationError, match="other text or with other settings") as caught:
        run(base, data, tokenizer)
    assert named in caught.value.got
    assert "data.folder" in caught.value.remedy
    assert corpus.contents(base / "dataset") == before


def test_unfinished_work_of_another_plan_is_started_anew(base: Path, whole: Path) -> None:
    shutil.rmtree(base / "dataset")
    with pytest.raises(DataConfigurationError, match="vocab_size 90000"):
        run(base, tokenizer=TokenizerConfig(vocab_size=90_000))
    assert (base / "dataset" / ".work").is_dir()
    run(base)
    assert corpus.contents(base / "dataset") == corpus.contents(whole / "dataset")


def test_a_folder_with_anything_else_in_it_is_refused(base: Path) -> None:
    before = corpus.contents(base / "text")
    with pytest.raises(DataConfigurationError, match="is not a dataset") as caught:
        run(base, corpus.data_config(folder="text/part0", sources=[SourceConfig(name="own", path="text/part1")]))
    assert "file000.txt" in caught.value.got
    assert {name: text for name, text in corpus.contents(base / "text").items() if ".work" not in name} == before


def test_two_preparations_of_one_folder_are_refused(tmp_path: Path) -> None:
    corpus.write_texts(tmp_path / "text")
    with (
        work_lock(tmp_path / "dataset"),
        pytest.raises(DataConfigurationError, match="Another process is preparing"),
    ):
        run(tmp_path)
    assert run(tmp_path).redone > 5


def test_several_sources_and_formats(tmp_path: Path) -> None:
    corpus.write_texts(tmp_path / "text")
    rows = [json.dumps({"body": corpus.text(900 + number)}) for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "lines.txt").write_text("".join(corpus.text(800 + number) for number in range(30)))
    data = corpus.data_config(
        sources=[
            SourceConfig(name="own", path="text", weight=3.0),
            SourceConfig(name="json", path="rows.jsonl", text_field="body"),
            SourceConfig(name="lines", path="lines.txt", documents="line"),
        ],
        prepare={"held_out_fraction": 0.0, "max_source_bytes": 15_000},
    )
    report = run(tmp_path, data)
    assert [source.name for source in report.manifest.sources] == ["own", "json", "lines"]
    for source in report.manifest.sources:
        assert source.held_out is None
        assert 15_000 <= source.train.text_bytes < 16_000
    texts, _ = stored_texts(tmp_path / "dataset")
    lines = (tmp_path / "lines.txt").read_text().split("\n")
    for (path, index), text in texts.items():
        if path == "lines.txt":
            assert text == lines[index]
        elif path == "rows.jsonl":
            assert text == corpus.text(900 + index)
        else:
            assert text == (tmp_path / "text" / path).read_text()


@pytest.mark.parametrize(
    ("texts", "changes", "message"),
    [
        ({}, {}, "has no files"),
        ({"a.txt": " \n", "b.txt": ""}, {}, "has no text"),
        ({"a.txt": "some text\n" * 2000}, {}, "single document"),
        ({"a.txt": "few words", "b.txt": "no more"}, {}, "cannot be trained"),
        ({"a.txt": corpus.text(1, 40), "b.txt": corpus.text(2, 40)}, {"sequence_tokens": 1024}, "corpus is too small"),
        ({"a.txt": "a\xff", "b.txt": "b"}, {}, "is not UTF-8"),
    ],
)
def test_a_corpus_that_cannot_work_is_refused(
    tmp_path: Path, texts: dict[str, str], changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "text").mkdir()
    for name, text in texts.items():
        (tmp_path / "text" / name).write_text(text, encoding="latin-1" if "\xff" in text else "utf-8")
    data = corpus.data_config(**changes, sources=[SourceConfig(name="own", path="text/*.txt")])
    tokenizer = TokenizerConfig(vocab_size=310)
    for workers in (1, 2):
        data = data.model_copy(update={"prepare": data.prepare.model_copy(update={"workers": workers})})
        with pytest.raises(DataConfigurationError, match=message) as caught:
            run(tmp_path, data, tokenizer)
        assert caught.value.remedy
    assert not (tmp_path / "dataset" / MANIFEST_FILE).exists()


def test_finished_tasks_are_kept_when_a_file_has_to_be_corrected(tmp_path: Path) -> None:
    corpus.write_texts(tmp_path / "text")
    rows = [json.dumps({"text": corpus.text(900 + number)}) for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, "{bad"]))
    data = corpus.data_config(
        sources=[SourceConfig(name="own", path="text"), SourceConfig(name="json", path="rows.jsonl")]
    )
    with pytest.raises(DataConfigurationError, match=r"rows\.jsonl, line 41"):
        run(tmp_path, data)
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    run(tmp_path, data)
    texts, _ = stored_texts(tmp_path / "dataset")
    assert len(texts) == 80


@pytest.mark.skipif(sys.platform != "linux", reason="needs a place where even root may not write")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    corpus.write_texts(tmp_path / "text")
    with pytest.raises(DataConfigurationError, match="no permission"):
        run(tmp_path, corpus.data_config(folder="/sys/dataset"))
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataConfigurationError, match="cannot be used as a dataset folder"):
        run(tmp_path, corpus.data_config(folder="file"))


KILLED = """
import os, signal, sys
from pathlib import Path
from data_pipeline.build import prepare
from tests.support import corpus

moment, limit, workers = (int(word) for word in sys.argv[2:5])
renames, replace = 0, Path.replace

def counted(self, target):
    global renames
    renames += 1
    if renames == moment:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)

Path.replace = counted
if limit:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
if __name__ == "__main__":
    data = corpus.data_config(prepare={"workers": workers})
    try:
        prepare(data, corpus.TOKENIZER, base_folder=Path(sys.argv[1]))
    except Exception as error:
        print(type(error).__name__, error)
        raise SystemExit(getattr(error, "exit_code", 1))
"""


def program(base: Path, moment: int = 0, limit: int = 0, workers: int = 1) -> Program:
    script = base / "killed.py"
    script.write_text(KILLED)
    root = Path(__file__).resolve().parents[2]
    # Under a limit nothing is measured: the limit holds for the measurement's own file as well.
    kept = {name: value for name, value in os.environ.items() if not (limit and name.startswith("COVERAGE_"))}
    return Program(
        [sys.executable, script, base, str(moment), str(limit), str(workers)],
        log=base / "log",
        cwd=root,
        env=kept | {"PYTHONPATH": str(root)},
    )


@pytest.mark.parametrize("moment", [1, 3, 8, 14, 17, 21, 26])
@pytest.mark.spare
def test_killed_at_a_rename_and_started_again_gives_the_same_bytes(tmp_path: Path, whole: Path, moment: int) -> None:
    corpus.write_texts(tmp_path / "text")
    with program(tmp_path, moment) as killed:
        assert killed.wait(deadline=120) == -signal.SIGKILL, killed.output()
    assert not (tmp_path / "dataset" / MANIFEST_FILE).exists()
    kept = len(list((tmp_path / "dataset").rglob("done/*.json")))
    # Table, tokenizer and tokens; then each shard, and for each split its blocks and its rows.
    tasks = 3 + len(list((whole / "dataset" / "shards").glob("*.tar"))) + 4
    assert run(tmp_path).redone == tasks - kept
    assert corpus.contents(tmp_path / "dataset") == corpus.contents(whole / "dataset")


@pytest.mark.spare
def test_a_killed_parent_takes_its_workers_along_and_a_rerun_goes_on(tmp_path: Path, whole: Path) -> None:
    corpus.write_texts(tmp_path / "text")
    with program(tmp_path, workers=2) as parent:
        record = tmp_path / "dataset" / ".work" / "done" / "tokenizer.json"
        parent.wait_for(record.exists, deadline=120, what="the tokenizer is trained")
        workers = psutil.Process(parent.pid).children(recursive=True)
        assert len(workers) >= 1
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait(deadline=30)
        _, alive = psutil.wait_procs(workers, timeout=30)
        assert not alive
    assert not (tmp_path / "dataset" / MANIFEST_FILE).exists()
    run(tmp_path, corpus.data_config(prepare={"workers": 2}))
    assert corpus.contents(tmp_path / "dataset") == corpus.contents(whole / "dataset")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_cannot_grow_is_one_clear_message_and_a_rerun_goes_on(
    tmp_path: Path, whole: Path, workers: int
) -> None:
    corpus.write_texts(tmp_path / "text")
    with program(tmp_path, limit=20_000, workers=workers) as full:
        assert full.wait(deadline=120) == 78, full.output()
        assert "The disk is full" in full.output()
        assert "Traceback" not in full.output()
    kept = {path.name for path in (tmp_path / "dataset" / ".work" / "done").iterdir()}
    assert kept >= {"table-own-00000.json", "tokenizer.json"}
    assert not list((tmp_path / "dataset" / ".work" / "tmp").iterdir())
    run(tmp_path)
    assert corpus.contents(tmp_path / "dataset") == corpus.contents(whole / "dataset")


def test_a_shard_that_another_version_would_make_differently_is_not_passed_off(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline import stages

    monkeypatch.setattr(stages, "EOS_ID", 3)
    (base / "dataset" / SHARD).unlink()
    with pytest.raises(DamagedDataError, match="cannot be made again as it was"):
        run(base)
