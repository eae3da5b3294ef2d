"""The order of rows once more, slowly: lists and Python integers, nothing shared with data_pipeline.

Written from the description of the order alone, row by row from the start, without prefix sums or seeking.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import xxhash

MASK = 2**64 - 1


def naive_permutation(key: bytes, n: int) -> list[int]:
    """Six Feistel rounds on the power of two above n (16 at least), and again while outside [0, n)."""
    bits = max(4, (n - 1).bit_length())
    keys: list[int] = [xxhash.xxh3_64_intdigest(key, seed=number) for number in range(6)]

    def once(value: int) -> int:
        widths = (bits // 2, bits - bits // 2)
        left, right = value >> widths[1], value % 2 ** widths[1]
        for round_key in keys:
            mixed = (right + round_key) * 0x9E3779B97F4A7C15 & MASK
            mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & MASK
            mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & MASK
            mixed ^= mixed >> 31
            left, right = right, left ^ mixed % 2 ** widths[0]
            widths = (widths[1], widths[0])
        return int(left * 2 ** widths[1] + right)

    images = []
    for index in range(n):
        image = once(index)
        while image >= n:
            image = once(image)
        images.append(image)
    return images


def naive_lane(
    name: str, rows_per_block: Sequence[int], *, lane: int, lanes: int, window_blocks: int, seed: int
) -> Iterator[tuple[int, int, int]]:
    """(epoch, block, row in block) of a lane's rows without end."""
    n = len(rows_per_block)
    mine = list(range(lane * n // lanes, (lane + 1) * n // lanes))
    epoch = 0
    while True:
        order = naive_permutation(f"blocks\0{seed}\0{lane}\0{epoch}\0{name}".encode(), len(mine))
        blocks = [mine[place] for place in order]
        for window in range(-(-len(blocks) // window_blocks)):
            rows = [
                (epoch, block, row)
                for block in blocks[window * window_blocks : (window + 1) * window_blocks]
                for row in range(rows_per_block[block])
            ]
            if rows:
                key = f"rows\0{seed}\0{lane}\0{epoch}\0{window}\0{name}".encode()
                yield from (rows[place] for place in naive_permutation(key, len(rows)))
        epoch += 1


def naive_source(
    name: str, rows_per_block: Sequence[int], *, lanes: int, window_blocks: int, seed: int
) -> Iterator[tuple[int, int, int, int]]:
    """(lane, epoch, block, row in block) of a source's rows without end: lane after lane, one row each."""
    all_lanes = [
        naive_lane(name, rows_per_block, lane=lane, lanes=lanes, window_blocks=window_blocks, seed=seed)
        for lane in range(lanes)
    ]
    while True:
        for lane, rows in enumerate(all_lanes):
            yield (lane, *next(rows))


def naive_mixture(parts: Sequence[int], count: int) -> list[int]:
    """Source of the first rows: of the sources that stay under their upper bound, the one most in need."""
    total, given, table = sum(parts), [0] * len(parts), []
    for k in range(1, count + 1):
        open_sources = [s for s, part in enumerate(parts) if given[s] * total < k * part]
        # In need first: the earliest step by which one more row is due, whole steps; ties to the earlier source.
        chosen = min(open_sources, key=lambda s: (-(-(given[s] + 1) * total // parts[s]), s))
        given[chosen] += 1
        table.append(chosen)
    return table
