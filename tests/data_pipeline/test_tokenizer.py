"""The tokenizer: its layout of ids, round trips of hard texts, determinism, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DamagedDataError, DataConfigurationError
from data_pipeline.normalize import normalize
from data_pipeline.tokenizer import SEGMENT_CHARACTERS, Tokenizer, sample_lines, train_tokenizer
from tests.support import corpus

TEXTS = [corpus.text(seed) for seed in range(40)]
KINDS = ("unigram", "bpe")


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(train_tokenizer(TEXTS, kind=request.param, vocab_size=340))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "\n\n  \n",
        "    def f(x):\n\treturn  x\n",
        "a\r\nb\rc",
        " leading and trailing ",
        "never seen: Ω ≈ 漢 🜚 \x00 \x7f \u2585 \u2581 \ufeff",
        "<s></s><pad><unk><0x0A> ⁇ ",
        "x" * 3 * SEGMENT_CHARACTERS,
        ("word " * SEGMENT_CHARACTERS + "\n") * 2,
    ],
)
def test_decoding_gives_the_normalised_text_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == normalize(text)
    assert not {tokenizer.unk, tokenizer.bos, tokenizer.eos, tokenizer.pad} & set(ids)


def test_ids_of_a_document_are_those_of_its_lines(tokenizer: Tokenizer) -> None:
    text = "".join(TEXTS)
    by_line = [token for line in text.splitlines(keepends=True) for token in tokenizer.encode(line)]
    assert tokenizer.encode(text) == by_line
    assert by_line.count(tokenizer.newline) == text.count("\n")


def test_the_vocabulary_begins_with_specials_newline_and_bytes(tokenizer: Tokenizer) -> None:
    pieces = list(tokenizer.pieces())
    assert len(pieces) == tokenizer.vocab_size == 340
    kinds = [piece.kind for piece in pieces[:6]]
    assert kinds == ["unknown", "control", "control", "control", "user_defined", "byte"]
    assert [piece.text for piece in pieces[5:261]] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert {piece.kind for piece in pieces[261:]} == {"normal"}
    assert not any("\n" in piece.text for piece in pieces[5:])
    assert any(set(piece.text) == {"\u2581"} and len(piece.text) > 1 for piece in pieces), "indentation is cheap"


def test_unigram_scores_are_multiples_of_a_256th_and_keep_their_order() -> None:
    model = train_tokenizer(TEXTS, kind="unigram", vocab_size=340)
    scores = [piece.score for piece in Tokenizer(model).pieces() if piece.kind == "normal"]
    assert len(set(scores)) > 40
    assert all(score < 0 and (score * 256).is_integer() for score in scores)
    assert scores == sorted(scores, reverse=True), "the trainer lists pieces by falling score"


def test_special_ids_decode_to_nothing_and_foreign_ones_are_refused(tokenizer: Tokenizer) -> None:
    ids = np.array([tokenizer.bos, *tokenizer.encode("fox"), tokenizer.eos, tokenizer.pad])
    assert tokenizer.decode(ids) == "fox"
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match="vocabulary is 340"):
            tokenizer.decode([5, bad])


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_a_function_of_the_texts_and_says_nothing(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    models = [train_tokenizer(iter(TEXTS), kind=kind, vocab_size=340) for _ in range(2)]
    assert models[0] == models[1]
    assert models[0] != train_tokenizer(TEXTS[1:], kind=kind, vocab_size=340)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_that_the_text_cannot_fill_names_the_largest_that_it_can(kind: str) -> None:
    with pytest.raises(DataConfigurationError, match="vocab_size 50000") as caught:
        train_tokenizer(TEXTS, kind=kind, vocab_size=50_000)
    largest = int(caught.value.rule.removeprefix("at most ").split()[0])
    assert Tokenizer(train_tokenizer(TEXTS, kind=kind, vocab_size=largest)).vocab_size == largest


def test_a_vocabulary_below_the_characters_of_the_text_names_the_smallest() -> None:
    texts = ["".join(chr(0x4E00 + 7 * row + column) for column in range(7)) for row in range(60)]
    with pytest.raises(DataConfigurationError, match="vocab_size 300") as caught:
        train_tokenizer(texts, kind="unigram", vocab_size=300)
    smallest = int(caught.value.rule.removeprefix("at least ").split()[0])
    assert 300 < smallest < 800
    assert str(smallest) in caught.value.remedy


def test_a_sample_without_text_is_refused() -> None:
    with pytest.raises(DataConfigurationError, match="cannot be trained"):
        train_tokenizer(["\n\n"], kind="unigram", vocab_size=300)


def test_sample_lines_lose_no_line_to_the_trainers_limits() -> None:
    lines = list(sample_lines(["漢" * 3000 + "\r\nmark \u2585 here\n\nx"]))
    assert max(len(line.encode()) for line in lines) <= 4192
    assert "".join(lines) == "漢" * 3000 + "mark   here" + "x"


def test_a_model_that_is_damaged_missing_or_foreign_is_refused(tmp_path: Path) -> None:
    import io

    import sentencepiece

    model = train_tokenizer(TEXTS, kind="bpe", vocab_size=340)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model)
    assert Tokenizer.load(path).digest == Tokenizer(model).digest
    path.write_bytes(model[: len(model) // 2])
    with pytest.raises(DamagedDataError, match="not a tokenizer"):
        Tokenizer.load(path)
    with pytest.raises(DamagedDataError, match="not a tokenizer"):
        Tokenizer.load(tmp_path / "none.model")
    foreign = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=foreign, vocab_size=60, minloglevel=2
    )
    with pytest.raises(DamagedDataError, match="newline"):
        Tokenizer(foreign.getvalue())
