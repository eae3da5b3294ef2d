"""Property: for any text, decode(encode(text)) is the normalised text, and lines can be encoded one by one."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.normalize import normalize
from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from tests.support import corpus

TEXT = st.text(st.characters() | st.sampled_from(" \n\r\t\u2581\u2585aeé漢0"), max_size=200)


@cache
def trained(kind: str) -> Tokenizer:
    return Tokenizer(train_tokenizer([corpus.text(seed) for seed in range(40)], kind=kind, vocab_size=340))


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@settings(deadline=None, max_examples=150)
@given(text=TEXT)
def test_round_trip(kind: str, text: str) -> None:
    tokenizer = trained(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == normalize(text)
    assert all(tokenizer.pad < token < tokenizer.vocab_size for token in ids)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@settings(deadline=None, max_examples=100)
@given(lines=st.lists(TEXT, max_size=5))
def test_a_text_is_encoded_as_its_lines(kind: str, lines: list[str]) -> None:
    tokenizer = trained(kind)
    whole = [normalize(line).replace("\n", " ") + "\n" for line in lines]
    assert tokenizer.encode("".join(whole)) == [token for line in whole for token in tokenizer.encode(line)]


@settings(deadline=None, max_examples=200)
@given(text=TEXT)
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalize(normalize(text)) == normalize(text)
