"""Our SentencePiece model as a `tokenizers` one, for exports. The only module that imports `tokenizers`.

Both libraries find the likeliest split of a text into pieces, and take the same one of equals: but where two
splits have equal scores ("   " as 1 + 2 or 2 + 1 spaces), SentencePiece's sums in fp32 and those of `tokenizers`
in fp64 round differently. Equal ids on every text need scores whose sums are exact in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data_pipeline.normalize import SPACE_MARK
from data_pipeline.tokenizer import SEGMENT_CHARACTERS, Piece, Tokenizer

_RESERVED_SCORE = -1e4


def build_tokenizer(tokenizer: Tokenizer) -> Any:
    """A `tokenizers.Tokenizer` that gives the ids of `tokenizer.encode`, with BOS in front by its template."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Fast

    pieces = list(tokenizer.pieces())
    ids = {piece.text: index for index, piece in enumerate(pieces)}
    spoken = {piece.text: piece.score for piece in pieces if piece.kind in ("normal", "user_defined")}
    if _is_bpe(pieces):
        splits = [
            (-score, ids[text[:cut]], ids[text[cut:]], text[:cut], text[cut:])
            for text, score in spoken.items()
            for cut in range(1, len(text))
            if text[:cut] in spoken and text[cut:] in spoken
        ]
        merges = [(left, right) for *_, left, right in sorted(splits)]
        core: Any = models.BPE(ids, merges, byte_fallback=True, fuse_unk=True, unk_token=pieces[tokenizer.unk].text)
    else:
        # Text that spells out a reserved piece ("<s>", "<0x0A>") must not become it: at a score of -10,000 any
        # other split is likelier. A character without a piece then costs 10 more than that in every split.
        scored = [(piece.text, spoken.get(piece.text, _RESERVED_SCORE)) for piece in pieces]
        core = models.Unigram(scored, unk_id=tokenizer.unk, byte_fallback=True)
    fast = Fast(core)
    fast.normalizer = normalizers.Sequence(
        [normalizers.Replace(a, b) for a, b in (("\r\n", "\n"), ("\r", "\n"), (" ", SPACE_MARK))]
    )
    segments = pre_tokenizers.Split(Regex(f"[^\n]{{1,{SEGMENT_CHARACTERS}}}"), "isolated")
    # Where one of its characters has no piece, a reserved piece would be the cheapest split of its text after all.
    # Such a character is in no piece, so to cut it out leaves every other split as it is.
    reserved = {character for piece in pieces if piece.text not in spoken for character in piece.text}
    alone = "".join(f"\\x{{{ord(character):x}}}" for character in sorted(reserved.difference(*spoken)))
    fast.pre_tokenizer = segments
    if alone:
        isolated = pre_tokenizers.Split(Regex(f"[{alone}]"), "isolated")
        fast.pre_tokenizer = pre_tokenizers.Sequence([segments, isolated])
    fast.decoder = decoders.Sequence([decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [AddedToken(piece.text, special=True, normalized=False) for piece in pieces[: tokenizer.pad + 1]]
    fast.add_special_tokens(special)
    # Not part of tokenizer.json: the `split_special_tokens` of tokenizer_config.json says it there.
    fast.encode_special_tokens = True
    begin = pieces[tokenizer.bos].text
    fast.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, tokenizer.bos)]
    )
    return fast


def _is_bpe(pieces: Sequence[Piece]) -> bool:
    """Whether the scores are the ranks 0, -1, -2 .. that SentencePiece gives to merges; unigrams have fractions."""
    scores = [piece.score for piece in pieces if piece.kind == "normal"]
    return all(score == -float(rank) for rank, score in enumerate(scores))
