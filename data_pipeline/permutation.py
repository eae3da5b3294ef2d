"""A keyed permutation of [0, n): any image costs O(1), and nothing of size n is stored.

A Feistel network permutes the power-of-two domain just above n; images outside [0, n) are sent through it
again until they fall inside (cycle walking, under 2 passes on average from n = 16 on). The result is a
bijection of [0, n) by construction, whatever the round function is.

Source: Luby and Rackoff 1988 (the network), Black and Rogaway 2002 (cycle walking). The key decides the order
of training rows, it keeps no secret.
"""

from __future__ import annotations

import numpy as np
import xxhash
from numpy.typing import NDArray

ROUNDS = 6
"""Even, so that halves of unequal width are back in their places at the end."""

_MIN_BITS = 4
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Permutation:
    """A bijection of [0, n) chosen by a key.

    Args:
        key: bytes that name this permutation; different keys give unrelated ones.
        n: size of the domain, at least 1 and below 2^62.
    """

    def __init__(self, key: bytes, n: int) -> None:
        if not 1 <= n < 1 << 62:
            raise ValueError(f"a permutation needs 1 <= n < 2^62, got {n}")
        self.n = n
        # Below 4 bits the halves have one bit or none, and few of the orders can be reached.
        bits = max(_MIN_BITS, (n - 1).bit_length())
        self._low_bits = bits - bits // 2
        self._high_bits = bits // 2
        self._round_keys = tuple(
            np.uint64(xxhash.xxh3_64_intdigest(key, seed=round_number)) for round_number in range(ROUNDS)
        )

    def __call__(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Images of indices in [0, n), of any shape."""
        if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < self.n:
            raise ValueError(f"indices span {indices.min()}..{indices.max()}, the domain is [0, {self.n})")
        images = self._network(np.atleast_1d(indices).astype(np.uint64))
        outside = np.flatnonzero(images >= self.n)
        while outside.size:
            images.flat[outside] = self._network(images.flat[outside])
            outside = outside[images.flat[outside] >= self.n]
        return images.astype(np.int64).reshape(indices.shape)

    def table(self) -> NDArray[np.int64]:
        """All n images, in order."""
        return self(np.arange(self.n, dtype=np.int64))

    def _network(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left_bits, right_bits = self._high_bits, self._low_bits
        left = values >> np.uint64(right_bits)
        right = values & np.uint64((1 << right_bits) - 1)
        for key in self._round_keys:
            mixed = (right + key) * _GOLDEN
            mixed = (mixed ^ (mixed >> np.uint64(30))) * _MULTIPLIER_1
            mixed = (mixed ^ (mixed >> np.uint64(27))) * _MULTIPLIER_2
            mixed ^= mixed >> np.uint64(31)
            left, right = right, left ^ (mixed & np.uint64((1 << left_bits) - 1))
            left_bits, right_bits = right_bits, left_bits
        return (left << np.uint64(right_bits)) | right
