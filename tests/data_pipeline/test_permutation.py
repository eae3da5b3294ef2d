"""The keyed permutation: a bijection for every n, equal to one in plain integers, with fixed numbers for a key."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.permutation import Permutation
from tests.support.naive_order import naive_permutation

FIXED_10 = [2, 6, 8, 0, 7, 3, 4, 9, 1, 5]
FIXED_LARGE = [623036340053, 106525104357, 542108107712, 14386380875]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 15, 16, 17, 31, 100, 256, 1000, 4097])
def test_it_is_a_bijection(n: int) -> None:
    for key in (b"", b"a", b"b"):
        assert sorted(Permutation(key, n).table().tolist()) == list(range(n))


def test_single_images_are_those_of_the_table() -> None:
    permutation = Permutation(b"key", 777)
    table = permutation.table()
    for index in (0, 1, 500, 776):
        assert permutation(np.array([index])).tolist() == [table[index]]
    assert permutation(np.array([[3, 4], [5, 6]])).tolist() == [[table[3], table[4]], [table[5], table[6]]]
    assert permutation(np.array([], dtype=np.int64)).shape == (0,)


def test_the_order_of_a_key_is_fixed_for_good() -> None:
    # These numbers are the format: to change them is to change the order of every run.
    assert Permutation(b"solomonov", 10).table().tolist() == FIXED_10
    large = Permutation(b"solomonov", 10**12)
    assert large(np.array([0, 1, 2, 10**12 - 1])).tolist() == FIXED_LARGE


@pytest.mark.parametrize("n", [1, 5, 16, 333])
def test_it_is_the_plain_feistel_network_in_python_integers(n: int) -> None:
    assert Permutation(b"plain", n).table().tolist() == naive_permutation(b"plain", n)


def test_keys_give_all_orders_of_a_small_set() -> None:
    seen = {tuple(Permutation(str(key).encode(), 4).table().tolist()) for key in range(600)}
    assert len(seen) == 24


def test_images_are_spread_evenly() -> None:
    # Where index 0 goes under 4,096 keys, in 16 equal parts of the range: chi-square, 15 degrees, p = 1e-6.
    n, keys = 1600, 4096
    images = [int(Permutation(f"k{key}".encode(), n)(np.array([0]))[0]) for key in range(keys)]
    counts = np.bincount(np.array(images) * 16 // n, minlength=16)
    assert float(((counts - keys / 16) ** 2 / (keys / 16)).sum()) < 56.5


def test_neighbours_do_not_stay_neighbours() -> None:
    table = Permutation(b"neighbours", 10_000).table()
    assert int((np.abs(np.diff(table)) == 1).sum()) < 20, "2 are expected of a random order"


@pytest.mark.parametrize("n", [0, -1, 1 << 62])
def test_a_domain_must_be_possible(n: int) -> None:
    with pytest.raises(ValueError, match="permutation needs"):
        Permutation(b"", n)


@pytest.mark.parametrize("index", [-1, 5])
def test_an_index_must_be_in_the_domain(index: int) -> None:
    with pytest.raises(ValueError, match="domain"):
        Permutation(b"", 5)(np.array([index]))
