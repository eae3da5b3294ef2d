"""Where documents go: held-out or train, in which order, in which block, in which shard. Pure functions.

All of it follows from the documents' keyed hashes and lengths, so any process that knows those arrives at the
same layout, and a lost shard can be made again alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

MIN_BLOCKS: Final = 8
"""A train split has at least this many blocks: one for each of the 8 lanes that there are at least."""
GOOD_BLOCKS: Final = 64
"""Blocks are made smaller until a source has this many: 8 lanes of 8 blocks."""
MAX_LANES: Final = 1024
WINDOW_BYTES: Final = 128 << 20
BLOCK_ROWS: Final = (256, 128, 64, 32, 16, 8, 4, 2, 1)
"""Rows of a block to choose from, the best first: from 256 rows on, packing wastes little."""
GOOD_BLOCK_ROWS: Final = 4
"""Blocks get smaller than this many rows only where the corpus is tiny."""

# What a member costs in a tar beside its bytes: the header, padding to 512 bytes.
_TAR_MEMBER_BYTES: Final = 1024
_TAR_END_BYTES: Final = 10240

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen documents of a source, as row numbers of its table, each split in shuffled order."""

    train: Integers
    held_out: Integers


def select(table: NDArray[Any], fraction: float, max_bytes: int | None) -> Selection:
    """Shuffles the documents of a table, takes at most about `max_bytes` of text, and splits them.

    The documents with the smallest split keys are held out: `fraction` of them, but at least one and not all.
    """
    order = np.lexsort((table["index"], table["file"], table["order"]))
    if max_bytes is not None:
        before = np.cumsum(table["text_bytes"][order]) - table["text_bytes"][order]
        order = order[before < max_bytes]
    # Exactly the share, not each document by its own hash: of 700 documents 2 % would be 14 +- 4.
    count = min(max(round(fraction * len(order)), 1), len(order) - 1) if fraction > 0 else 0
    held = np.zeros(len(order), dtype=bool)
    held[np.argsort(table["split"][order], kind="stable")[:count]] = True
    return Selection(train=order[~held].astype(np.int64), held_out=order[held].astype(np.int64))


def sample_cap(text_bytes: NDArray[Any], budget: int) -> tuple[int, int]:
    """(documents, bytes of each) whose beginnings fill `budget`, taken from the front of `text_bytes`.

    Each document gives its first `bytes` at most, so that one long document does not fill the sample alone;
    the limit starts at 64 KiB and doubles until the budget is reached or no document is cut.
    """
    cap = 64 << 10
    largest = int(text_bytes.max(initial=0))
    while int(np.minimum(text_bytes, cap).sum()) < budget and cap < largest:
        cap *= 2
    taken = np.cumsum(np.minimum(text_bytes, cap))
    count = int(np.searchsorted(taken, budget, side="right"))
    return (count, cap) if count else (1, budget)


@dataclass(frozen=True, slots=True)
class Entries:
    """What blocks consist of: whole documents, or parts of documents longer than a block, E in all.

    A part overlaps the next one by a token: n tokens give n-1 labels, and each label stays in one part.
    """

    document: Integers
    """(E,): number of the document in shuffled order."""
    part: Integers
    """(E,): number of the part within its document."""
    start: Integers
    """(E,): first token within the document."""
    tokens: Integers
    """(E,): tokens."""

    def take(self, chosen: NDArray[np.bool_]) -> Entries:
        """The entries where `chosen` is true."""
        return Entries(self.document[chosen], self.part[chosen], self.start[chosen], self.tokens[chosen])


def cut_documents(lengths: Integers, block_tokens: int) -> Entries:
    """Cuts documents of more than `block_tokens` tokens into parts of that many (the last is shorter)."""
    step = block_tokens - 1
    parts = np.maximum(-(-(lengths - 1) // step), 1)
    document = np.repeat(np.arange(len(lengths), dtype=np.int64), parts)
    first = np.cumsum(parts) - parts
    part = np.arange(len(document), dtype=np.int64) - first[document]
    start = part * step
    return Entries(document, part, start, np.minimum(lengths[document] - start, block_tokens))


def part_bytes(entries: Entries, lengths: Integers, text_bytes: Integers) -> Integers:
    """(E,): text bytes of each entry; the parts of a document share its bytes by positions, without loss.

    Args:
        entries: E documents or parts.
        lengths: tokens of each document.
        text_bytes: UTF-8 bytes of each document's text.
    """
    positions = np.maximum(lengths - 1, 1)[entries.document]
    total = text_bytes[entries.document]
    last = np.minimum(entries.start + np.maximum(entries.tokens - 1, 1), positions)
    # Documents have at most 2**28 bytes, hence about as many positions: the products stay under 2**57.
    return total * last // positions - total * entries.start // positions


def cut_blocks(tokens: Integers, block_tokens: int) -> Integers:
    """Offsets (blocks + 1,) of blocks in a list of entries: a block ends before the entry that exceeds it."""
    ends = np.cumsum(tokens)
    offsets = [0]
    while offsets[-1] < len(tokens):
        first = offsets[-1]
        limit = (ends[first - 1] if first else 0) + block_tokens
        offsets.append(max(int(np.searchsorted(ends, limit, side="right")), first + 1))
    return np.array(offsets, dtype=np.int64)


def choose_block_tokens(lengths: Integers, sequence_tokens: int) -> int | None:
    """Tokens of a block for a train split; None where even blocks of one row are fewer than MIN_BLOCKS."""
    chosen = None
    for rows in BLOCK_ROWS:
        block_tokens = rows * sequence_tokens + 1
        blocks = len(cut_blocks(cut_documents(lengths, block_tokens).tokens, block_tokens)) - 1
        if blocks >= MIN_BLOCKS:
            chosen = block_tokens
        if blocks >= GOOD_BLOCKS or (chosen is not None and rows <= GOOD_BLOCK_ROWS):
            return chosen
    return chosen


def choose_lanes(blocks: int) -> int:
    """The largest power of two, 8 to 1,024, that gives each lane 8 of the smallest source's `blocks`."""
    lanes = MIN_BLOCKS
    while lanes < MAX_LANES and blocks >= 2 * lanes * MIN_BLOCKS:
        lanes *= 2
    return lanes


def choose_window_blocks(lanes: int, block_bytes: int) -> int:
    """Blocks of a window: 4 (at 256 rows a block, rows move among a thousand), fewer where memory asks for it.

    A reader of all lanes holds a window of each; the choice keeps that under WINDOW_BYTES while it can.

    Args:
        lanes: lanes of every source.
        block_bytes: bytes of a block of each source, added up.
    """
    return next((blocks for blocks in (4, 2) if lanes * blocks * block_bytes <= WINDOW_BYTES), 1)


def cut_shards(block_offsets: Integers, entry_bytes: Integers, shard_bytes: int) -> Integers:
    """Offsets (shards + 1,) of shards in a list of blocks, each at most `shard_bytes` unless it is one block.

    Args:
        block_offsets: (blocks + 1,) offsets of blocks in the entries.
        entry_bytes: (entries,) bytes that each entry takes in a shard's members.
        shard_bytes: limit on the tar file.
    """
    before = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(entry_bytes)])
    block_bytes = np.diff(before[block_offsets]) + 3 * _TAR_MEMBER_BYTES
    return cut_blocks(block_bytes, shard_bytes - _TAR_END_BYTES)
