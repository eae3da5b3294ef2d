"""normalize: the four changes that it makes, and that it makes no others."""

from __future__ import annotations

import pytest

from data_pipeline.normalize import normalize


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\r\nb\rc\n\r\n", "a\nb\nc\n\n"),
        ("a\u2581b", "a b"),
        ("a\ud800b\udfff", "a\ufffdb\ufffd"),
        ("  \t trailing  \n\n", "  \t trailing  \n\n"),
        ("e\u0301 \u00e9 \ufb01 \u3000 \ufeff \x00", "e\u0301 \u00e9 \ufb01 \u3000 \ufeff \x00"),
        ("", ""),
    ],
)
def test_only_what_is_documented_changes(text: str, expected: str) -> None:
    assert normalize(text) == expected
    assert normalize(expected) == expected
