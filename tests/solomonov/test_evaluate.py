"""Bits per byte against plain float64 loops over the model's formulas, on documents taken from the shards with
`tarfile`; and the compressors' figures against the programs `gzip -9` and `xz -9` themselves."""

from __future__ import annotations

import math
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.tokenizer import Tokenizer
from solomonov.errors import ConfigurationError
from solomonov.evaluate import Evaluation, evaluate
from solomonov.loading import LoadedModel, load_model
from solomonov.runfolder import RunFolder
from tests.support import naive
from tests.support.runs import load, prepared_user
from tests.support.user import User

CPU = torch.device("cpu")
Trained = tuple[User, RunFolder]


@pytest.fixture(scope="module")
def model(trained: Trained) -> LoadedModel:
    return load_model(str(trained[1].path))


@pytest.fixture(scope="module")
def documents(trained: Trained) -> list[list[int]]:
    """The held-out documents as they are stored, put together from the shards' members in order."""
    found: list[list[int]] = []
    for shard in sorted((trained[0].folder / "dataset/shards").glob("own-held_out-*.tar")):
        with tarfile.open(shard) as tar:
            members = {item.name: tar.extractfile(item).read() for item in tar}  # type: ignore[union-attr]
        for key in sorted({name.split(".")[0] for name in members}):
            tokens = np.frombuffer(members[f"{key}.tokens.bin"], dtype="<u2").astype(int).tolist()
            for length in np.frombuffer(members[f"{key}.lengths.bin"], dtype="<u4").astype(int).tolist():
                part, tokens = tokens[:length], tokens[length:]
                if part[0] == 1:  # BOS: a new document; else the rest of the one before, of which one token is repeated
                    found.append(part)
                else:
                    found[-1] += part[1:]
            assert not tokens
    return found


def text_of(model: LoadedModel, documents: list[list[int]]) -> bytes:
    tokenizer = Tokenizer.load(model.tokenizer_model)
    return b"".join(tokenizer.decode(document[1:-1]).encode() for document in documents)


def nats(model: LoadedModel, documents: list[list[int]]) -> tuple[float, int]:
    """Cross-entropy of every token but the first of each document, a row's length at a time, in float64."""
    state = {name: value.double().numpy() for name, value in model.state.items()}
    total, tokens = 0.0, 0
    for document in documents:
        for start in range(0, len(document) - 1, model.sequence_tokens):
            piece = document[start : start + model.sequence_tokens + 1]
            rows = naive.logits(state, model.config, piece[:-1])
            total += sum(naive.cross_entropy(row, label) for row, label in zip(rows, piece[1:], strict=True))
            tokens += len(piece) - 1
    return total, tokens


@pytest.fixture(scope="module")
def all_of_it(trained: Trained, model: LoadedModel) -> Evaluation:
    return evaluate(model, trained[0].folder / "dataset", CPU, max_bytes=1 << 20)


def test_bits_per_byte_are_those_of_plain_float64(
    trained: Trained, model: LoadedModel, documents: list[list[int]]
) -> None:
    first = len(text_of(model, documents[:1]))
    found = evaluate(model, trained[0].folder / "dataset", CPU, max_bytes=first)
    total, tokens = nats(model, documents[:1])
    assert (found.documents, found.tokens, found.text_bytes) == (1, tokens, first)
    assert found.loss == pytest.approx(total / tokens, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / first, rel=1e-5)


def test_all_documents_are_read_and_their_bytes_are_the_files(
    trained: Trained, model: LoadedModel, documents: list[list[int]], all_of_it: Evaluation
) -> None:
    assert all_of_it.documents == len(documents) > 2
    assert all_of_it.tokens == sum(len(document) - 1 for document in documents)
    assert all_of_it.text_bytes == len(text_of(model, documents))
    files = {path.read_bytes() for path in (trained[0].folder / "text").rglob("*.txt")}
    assert {text_of(model, [document]) for document in documents} <= files, "a held-out text is that of a file"


def test_documents_are_taken_whole_up_to_the_limit(
    trained: Trained, model: LoadedModel, documents: list[list[int]]
) -> None:
    sizes = [len(text_of(model, [document])) for document in documents]
    data = trained[0].folder / "dataset"
    assert evaluate(model, data, CPU, max_bytes=0).documents == 1, "at least one"
    assert evaluate(model, data, CPU, max_bytes=sum(sizes[:2])).documents == 2
    assert evaluate(model, data, CPU, max_bytes=sum(sizes[:2]) - 1).documents == 1


@pytest.mark.parametrize(("program", "field"), [("gzip", "gzip_bits_per_byte"), ("xz", "xz_bits_per_byte")])
def test_compressed_sizes_are_those_of_the_programs(
    program: str, field: str, model: LoadedModel, documents: list[list[int]], all_of_it: Evaluation
) -> None:
    """Two implementations of one format differ by some bytes: 1 % and the length of a header are granted."""
    assert shutil.which(program), f"these tests run where {program} is installed"
    text = text_of(model, documents)
    done = subprocess.run([program, "-9", "-c"], input=text, capture_output=True, check=True)
    ours = getattr(all_of_it, field) * len(text) / 8
    assert ours == pytest.approx(len(done.stdout), rel=0.01, abs=20)
    assert ours == round(ours), "whole bytes"


def test_another_tokenizer_is_refused(model: LoadedModel, tmp_path: Path) -> None:
    """The same size, other pieces: the numbers would be meaningless."""
    other = User.begin(tmp_path / "other")
    for path in (other.folder / "text").rglob("*.txt"):
        path.write_text(path.read_text().translate(str.maketrans("aeiou", "uaeio")))
    config = load(other).config
    from data_pipeline.build import prepare

    prepare(config.data, config.tokenizer, base_folder=other.folder, show_progress=False)
    with pytest.raises(ConfigurationError, match="different tokenizers"):
        evaluate(model, other.folder / "dataset", CPU, max_bytes=1000)


def test_a_data_set_that_holds_nothing_out_is_refused(model: LoadedModel, tmp_path: Path) -> None:
    user = prepared_user(tmp_path / "whole", "data.prepare.held_out_fraction=0.0")
    with pytest.raises(ConfigurationError, match="holds nothing out"):
        evaluate(
            LoadedModel(**{**vars(model), "tokenizer_model": user.folder / "dataset/tokenizer/tokenizer.model"}),
            user.folder / "dataset",
            CPU,
            max_bytes=1000,
        )
