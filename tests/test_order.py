"""The order of samples: keyed permutations that are whole, well mixed, and the same everywhere."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from minillm.data.order import ROUNDS, epoch_offset, epochs_and_rows, make_key, permute


def order(n, key):
    return permute(np.arange(n), n, key)


@pytest.mark.parametrize("n", [*range(1, 40), 63, 64, 65, 1000, 4097, 65_536, 99_991])
def test_a_permutation_has_every_place_once(n):
    assert np.array_equal(np.sort(order(n, make_key(1, n))), np.arange(n))


def test_part_of_a_permutation_is_that_part_of_the_whole():
    n, key = 10_007, make_key(3, 4)
    whole = order(n, key)
    assert np.array_equal(permute(np.arange(500, 600), n, key), whole[500:600])
    assert permute(np.array(777), n, key) == whole[777]
    assert permute(np.empty(0, np.int64), n, key).shape == (0,)
    assert np.array_equal(permute(np.arange(6).reshape(2, 3), n, key), whole[:6].reshape(2, 3))


def test_a_permutation_of_a_huge_range_needs_no_memory_for_it():
    n = 10**15
    places = permute(np.array([0, 1, n - 1]), n, make_key(0, 0))
    assert len(set(places.tolist())) == 3
    assert places.min() >= 0
    assert places.max() < n


@pytest.mark.parametrize("n", [3, 4, 5])
def test_every_order_of_a_few_rows_is_equally_likely(n):
    expected = 20
    draws = expected * math.factorial(n)
    seen = Counter(tuple(order(n, make_key(7, epoch)).tolist()) for epoch in range(draws))
    assert set(seen) == set(itertools.permutations(range(n)))
    surprise = sum(
        (count - expected) ** 2 / expected for count in seen.values()
    )  # chi-square of n! - 1 degrees of freedom
    freedom = math.factorial(n) - 1
    assert surprise < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [11, 64, 1000])
def test_where_two_rows_go_is_independent(n):
    draws, cells = 1000, 5
    orders = np.stack([order(n, make_key(5, epoch)) for epoch in range(draws)])
    size = np.bincount(np.arange(n) * cells // n, minlength=cells)
    expected = draws * (np.outer(size, size) - np.diag(size)) / (n * (n - 1))
    for i, j in [(0, 1), (0, n - 1), (n // 2, n // 2 + 1), (3, 9)]:
        counts = np.zeros((cells, cells))
        np.add.at(counts, (orders[:, i] * cells // n, orders[:, j] * cells // n), 1)
        possible = expected > 0
        surprise = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
        freedom = possible.sum() - 1
        assert surprise < freedom + 5 * math.sqrt(2 * freedom), (i, j)
    # as in a random order, one row stays in its place on average, and one follows its predecessor
    assert (orders == np.arange(n)).sum(1).mean() == pytest.approx(1, abs=0.1)
    assert (np.diff(orders) == 1).sum(1).mean() == pytest.approx(1 - 1 / n, abs=0.1)


def test_large_orders_are_uncorrelated_with_the_text_and_with_each_other():
    n = 200_003
    first, second = order(n, make_key(0, 0)), order(n, make_key(0, 1))
    for a, b in [(np.arange(n), first), (first[1:], first[:-1]), (first, second)]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(n)


def test_the_order_is_the_same_on_every_machine_and_version():
    assert make_key(0, 0) == 12035550249420947055
    assert make_key(-1, 2**70 + 5) == make_key(2**64 - 1, 5)
    assert order(10, make_key(1, 2)).tolist() == [0, 1, 2, 4, 9, 3, 8, 5, 6, 7]
    assert permute(np.arange(4), 10**12, make_key(1, 2)).tolist() == [
        20010632989,
        915918042267,
        16937536129,
        923391319235,
    ]
    assert epoch_offset(3, 1000, seed=1) == 32


def test_the_vectorised_network_is_the_plain_one():
    def mix(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    def plain(k, n, key):
        a = math.ceil(math.sqrt(n))
        b = math.ceil(n / a)
        while True:
            left, right = divmod(k, b)
            for i in range(1, ROUNDS + 1):
                round_key = mix((key + 0x9E3779B97F4A7C15 * i) % 2**64)
                if i % 2:
                    left = (left + mix((right + round_key) % 2**64)) % a
                else:
                    right = (right + mix((left + round_key) % 2**64)) % b
            k = left * b + right
            if k < n:
                return k

    for n in (1, 2, 3, 17, 1000, 12_345_678):
        key = make_key(9, n)
        some = range(0, n, max(1, n // 50))
        assert permute(np.array(some), n, key).tolist() == [plain(k, n, key) for k in some]


def test_keys_of_other_numbers_or_another_order_of_them_differ():
    keys = [make_key(*numbers) for numbers in itertools.product(range(10), repeat=2)]
    keys += [make_key(*numbers) for numbers in itertools.product(range(4), repeat=3)]
    assert len(set(keys)) == len(keys)


def test_each_epoch_has_each_row_once_wherever_the_steps_fall():
    n, step = 23, 7
    parts = [epochs_and_rows(np.arange(first, first + step), n, seed=1) for first in range(0, n * step, step)]
    epochs, rows = (np.concatenate(arrays) for arrays in zip(*parts))
    assert epochs.tolist() == [k // n for k in range(n * step)]
    orders = [tuple(rows[epochs == epoch].tolist()) for epoch in range(step)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert len(set(orders)) == step


def test_a_step_may_span_several_epochs():
    epochs, rows = epochs_and_rows(np.arange(2, 12), 3, seed=0)
    assert epochs.tolist() == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert sorted(rows[1:4].tolist()) == sorted(rows[4:7].tolist()) == [0, 1, 2]


def test_epochs_begin_at_places_all_over_the_text():
    places = np.array([epoch_offset(epoch, 1000, seed=0) for epoch in range(2000)])
    assert places.min() >= 0
    assert places.max() < 1000
    assert np.histogram(places, bins=10, range=(0, 1000))[0].min() > 130
