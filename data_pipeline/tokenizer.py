"""SentencePiece: training, encoding, decoding. The only module that imports `sentencepiece`.

Every setting serves one property: `decode(encode(text)) == normalize(text)` for any text. Bytes stand in
for characters without a piece, nothing is normalised, stripped or prefixed. The newline is a piece of its
own that no other piece can contain, so text is encoded line by line: the ids of a document are those of its
lines in order, whatever stands before or after. (SentencePiece sums scores in 32 bits; over a whole document
they round, and equal lines would get different ids depending on where they stand.)
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_pipeline.errors import DamagedDataError, DataConfigurationError
from data_pipeline.manifest import BOS_ID, EOS_ID, PAD_ID, UNK_ID
from data_pipeline.normalize import normalize

NEWLINE: Final = "\n"
SEGMENT_CHARACTERS: Final = 16384
"""A line longer than this is encoded in pieces of this many characters: bounds memory and rounding."""
SAMPLE_LINE_CHARACTERS: Final = 1024
"""Lines for the trainer are cut here: at four bytes a character they stay under its limit of 4,192."""
# Training splits its sums by thread: a constant makes the pieces independent of the machine.
_TRAINER_THREADS: Final = 2
_BATCH_SEGMENTS: Final = 8192
# The trainer uses U+2585 as a mark of its own and drops lines that contain it.
_TRAINER_MARK: Final = "\u2585"
_SEGMENT = re.compile(rf"[^\n]{{0,{SEGMENT_CHARACTERS}}}\n|[^\n]{{1,{SEGMENT_CHARACTERS}}}")
_TOO_LARGE = re.compile(r"Vocabulary size too high \(\d+\)\. Please set it to a value <= (\d+)")
_TOO_SMALL = re.compile(r"Vocabulary size is smaller than required_chars\. \d+ vs (\d+)")


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary; `kind` is normal, unknown, control, user_defined, byte or unused."""

    text: str
    score: float
    kind: str


class Tokenizer:
    """A trained SentencePiece model."""

    unk: Final = UNK_ID
    bos: Final = BOS_ID
    eos: Final = EOS_ID
    pad: Final = PAD_ID

    def __init__(self, model: bytes, *, name: str = "tokenizer model") -> None:
        """Takes the bytes of a model; `name` is only said in errors.

        Raises:
            DamagedDataError: the bytes are not a SentencePiece model that `prepare` made.
        """
        import sentencepiece

        sentencepiece.set_min_log_level(2)
        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise _damaged(name, str(error)) from error
        self.model = model
        """The bytes of the model."""
        self.vocab_size = int(self._processor.vocab_size())
        """Number of ids."""
        self.newline = int(self._processor.piece_to_id(NEWLINE))
        """Id of the newline."""
        found = tuple(int(getattr(self._processor, f"{name}_id")()) for name in ("unk", "bos", "eos", "pad"))
        if found != (UNK_ID, BOS_ID, EOS_ID, PAD_ID) or self.newline == UNK_ID:
            raise _damaged(name, f"unk, bos, eos, pad = {found}, newline = {self.newline}")

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Reads a tokenizer.model file.

        Raises:
            DamagedDataError: the file is missing or not such a model.
        """
        try:
            model = Path(path).read_bytes()
        except FileNotFoundError as error:
            raise _damaged(str(path), "no such file") from error
        return cls(model, name=str(path))

    @property
    def digest(self) -> str:
        """xxh3-128 of the model's bytes."""
        return xxhash.xxh3_128_hexdigest(self.model)

    def encode(self, text: str) -> list[int]:
        """Token ids of `normalize(text)`, without BOS and EOS."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def encode_array(self, text: str) -> NDArray[np.int32]:
        """`encode` as an array; about 15 MB of text a second on one core."""
        segments = (match.group() for match in _SEGMENT.finditer(normalize(text)))
        parts: list[NDArray[np.int32]] = []
        while batch := list(islice(segments, _BATCH_SEGMENTS)):
            # num_threads: the default would start a thread per core for every call.
            encoded = self._processor.encode(batch, num_threads=1)
            parts.append(np.fromiter(chain.from_iterable(encoded), dtype=np.int32))
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Text of token ids; BOS, EOS and padding give nothing.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        numbers = [int(token) for token in ids]
        if numbers and not 0 <= min(numbers) <= max(numbers) < self.vocab_size:
            raise ValueError(f"token ids span {min(numbers)}..{max(numbers)}, vocabulary is {self.vocab_size}")
        return str(self._processor.decode(numbers))

    def pieces(self) -> Iterator[Piece]:
        """The vocabulary in the order of ids."""
        processor = self._processor
        tests = {
            "unknown": processor.is_unknown,
            "control": processor.is_control,
            "byte": processor.is_byte,
            "unused": processor.is_unused,
        }
        for token in range(self.vocab_size):
            text = str(processor.id_to_piece(token))
            kind = next((kind for kind, test in tests.items() if test(token)), "normal")
            # SentencePiece has no test for user-defined pieces; the newline is the only one.
            yield Piece(text, float(processor.get_score(token)), "user_defined" if text == NEWLINE else kind)


def sample_lines(texts: Iterable[str]) -> Iterator[str]:
    """What the trainer sees of the sampled texts: lines, normalised, long ones cut, empty ones left out."""
    for text in texts:
        for line in normalize(text).replace(_TRAINER_MARK, " ").split(NEWLINE):
            for start in range(0, len(line), SAMPLE_LINE_CHARACTERS):
                yield line[start : start + SAMPLE_LINE_CHARACTERS]


def train_tokenizer(texts: Iterable[str], *, kind: str, vocab_size: int) -> bytes:
    """Trains a SentencePiece model on `texts`; a pure function of them and the settings.

    Returns:
        The model's bytes. Ids: 0 unknown, 1 BOS, 2 EOS, 3 padding, 4 newline, 5-260 bytes, then pieces.

    Raises:
        DataConfigurationError: the sample cannot give `vocab_size` pieces.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sample_lines(texts),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=[NEWLINE],
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
            num_threads=_TRAINER_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _untrainable(str(error), kind, vocab_size) from error
    return model.getvalue() if kind == "bpe" else round_scores(model.getvalue())


def round_scores(model: bytes) -> bytes:
    """The model with every score rounded to a multiple of 1/256 nat: sums up to 65,536 are then exact in fp32.

    So splits of equal likelihood ("   " as 1 + 2 or 2 + 1 spaces) tie whatever stands before them, here as in
    any implementation that adds in another precision; unrounded, one line in 600 of source text has a tie that
    rounding decides. The number of tokens stays the same (31 MB of source text). Only fixed-width fields are
    rewritten: ModelProto.pieces (1) holds SentencePiece messages, whose score (2) is a 32-bit float.
    """
    rounded = bytearray(model)
    for number, start, end in _fields(model, 0, len(model)):
        if number == 1:
            for inner, at, stop in _fields(model, start, end):
                if inner == 2 and stop - at == 4:
                    score = struct.unpack_from("<f", model, at)[0]
                    struct.pack_into("<f", rounded, at, round(score * 256) / 256)
    return bytes(rounded)


def _fields(message: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, first byte and end of each field of a serialised protobuf message."""
    while start < end:
        key, start = _varint(message, start)
        kind = key & 7
        if kind == 0:
            stop = _varint(message, start)[1]
        elif kind == 2:
            size, start = _varint(message, start)
            stop = start + size
        else:
            stop = start + {1: 8, 5: 4}[kind]
        yield key >> 3, start, stop
        start = stop


def _varint(message: bytes, start: int) -> tuple[int, int]:
    """A variable-length integer, and where the next byte stands."""
    value = shift = 0
    while message[start] & 128:
        value |= (message[start] & 127) << shift
        start, shift = start + 1, shift + 7
    return value | message[start] << shift, start + 1


def _untrainable(message: str, kind: str, vocab_size: int) -> DataConfigurationError:
    what = f"The tokenizer cannot be trained with tokenizer.vocab_size {vocab_size}."
    got = f"{vocab_size} ({kind})"
    if match := _TOO_LARGE.search(message):
        return DataConfigurationError(
            what,
            got=got,
            rule=f"at most {match.group(1)} for this corpus: it has too little text for more pieces",
            remedy=f"set tokenizer.vocab_size to {match.group(1)} or less, add text, or raise "
            "data.prepare.tokenizer_sample_bytes if the corpus is larger",
        )
    if match := _TOO_SMALL.search(message):
        return DataConfigurationError(
            what,
            got=got,
            rule=f"at least {match.group(1)} for this corpus: it has that many common characters",
            remedy=f"set tokenizer.vocab_size to {match.group(1)} or more",
        )
    return DataConfigurationError(
        what,
        got=f"{got}; SentencePiece says: {message}",
        rule="a sample with text from which pieces can be learned",
        remedy="look at the source files, and at tokenizer.vocab_size",
    )


def _damaged(name: str, got: str) -> DamagedDataError:
    return DamagedDataError(
        f"{name} is not a tokenizer that `prepare` made.",
        got=got,
        rule="a SentencePiece model with unk 0, bos 1, eos 2, pad 3 and a newline piece",
        remedy="run `solomonov prepare` again: it rebuilds a damaged tokenizer",
    )
