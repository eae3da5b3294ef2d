"""The one normalisation that text goes through before it is stored.

It is small on purpose: what the model sees is what the file says, except where two byte sequences mean the
same (line ends) or where a character cannot be carried (see `normalize`). No Unicode normal form is applied.
"""

from __future__ import annotations

import re
from typing import Final

SPACE_MARK: Final = "\u2581"
"""The character by which SentencePiece stands for a space inside its pieces; text cannot contain it."""

BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
"""UTF-8 byte order mark; readers drop it at the start of a file, and only there."""

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def normalize(text: str) -> str:
    """Returns `text` as it is stored; idempotent.

    * CRLF and CR become LF;
    * U+2581, which SentencePiece keeps for itself, becomes a space;
    * lone surrogates, which JSON escapes can spell but UTF-8 cannot, become U+FFFD.
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if SPACE_MARK in text:
        text = text.replace(SPACE_MARK, " ")
    return _LONE_SURROGATE.sub("\ufffd", text)
