"""Signatures estimate the Jaccard similarity without bias, and bands find pairs with the probability they should."""

import numpy as np
import pytest

from minillm.data.clean.minhash import (
    EMPTY,
    band_keys,
    candidate_probability,
    choose_bands,
    shingles,
    signatures,
    sketch,
)
from minillm.data.clean.words import Ragged, mix64


def sketch_sets(sets: list[np.ndarray], n_perm: int, seed: int = 0) -> np.ndarray:
    """Signatures of sets of numbers."""
    hashes = mix64(np.concatenate(sets).astype(np.uint64))
    return sketch(Ragged(hashes, np.cumsum([0, *map(len, sets)])), n_perm, seed)


def pair_of_sets(similarity: float, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """Two sets of a size, random numbers in random order, and their exact similarity."""
    shared = round(2 * size * similarity / (1 + similarity))
    numbers = rng.permutation(rng.choice(2**40, 2 * size - shared, replace=False))
    return numbers[:size], numbers[size - shared :], shared / (2 * size - shared)


@pytest.mark.parametrize("size", [1, 20, 400])
@pytest.mark.parametrize("similarity", [0.0, 0.3, 0.5, 0.8, 0.95, 1.0])
def test_the_share_of_equal_places_is_the_similarity(size, similarity):
    rng = np.random.default_rng(0)
    trials, n_perm = 150, 128
    errors = []
    for trial in range(trials):
        a, b, exact = pair_of_sets(similarity, size, rng)
        one, other = sketch_sets([a, b], n_perm, seed=trial)
        errors.append((one == other).mean() - exact)
    deviation = np.sqrt(exact * (1 - exact) / n_perm)
    assert abs(np.mean(errors)) <= 4 * deviation / np.sqrt(trials)
    assert np.std(errors) <= 1.2 * deviation


def test_a_signature_is_the_least_of_each_order_whatever_stands_beside_it():
    rng = np.random.default_rng(1)
    sets = [rng.choice(2**30, n, replace=False) for n in (3, 1, 400, 17)]
    together = sketch_sets(sets, 16)
    for numbers, row in zip(sets, together):
        assert np.array_equal(sketch_sets([numbers], 16)[0], row)
        single = sketch_sets([numbers[i : i + 1] for i in range(len(numbers))], 16)
        assert np.array_equal(single.min(axis=0), row)


def test_signatures_are_equal_exactly_for_the_same_set_of_shingles():
    base = "one two three four five six seven eight"
    texts = [base, "One, two. three\nfour five six seven -- eight!", f"{base} {base}", f"{base} nine", ""]
    found = signatures(texts, n_perm=64)
    for i, a in enumerate(texts):
        for j, b in enumerate(texts):
            same_set = set(shingles([a]).values.tolist()) == set(shingles([b]).values.tolist())
            assert np.array_equal(found[i], found[j]) == same_set, (a, b)
    twice = " ".join([base] * 2)
    assert np.array_equal(signatures([twice], 64), signatures([f"{twice} {base}"], 64))  # the same set, more often


def test_short_and_empty_texts():
    found = signatures(["", "  ...", "hen", "Hen!", "the hen", "hen the", "母鸡"], n_perm=32)
    assert (found[:2] == EMPTY).all()
    assert np.array_equal(found[2], found[3])
    assert len(np.unique(found[2:], axis=0)) == 4
    assert signatures([], 32).shape == (0, 32)


def test_chinese_is_compared_by_characters():
    text = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。"
    changed = text.replace("知", "有")
    one, other, spaced = signatures([text, changed, " ".join(text)], 4096)
    exact = 13 / 19  # 20 characters: 16 runs of five; the change at the 18th is in three of them
    assert abs((one == other).mean() - exact) < 4 * np.sqrt(exact * (1 - exact) / 4096)
    assert np.array_equal(one, spaced)


def test_the_seed_and_n_change_the_signature():
    text = ["one two three four five six"]
    assert not (signatures(text) == signatures(text, seed=1)).any()
    assert not np.array_equal(signatures(text), signatures(text, n=3))
    assert np.array_equal(signatures(text, 128)[:, :16], signatures(text, 16))


def test_signatures_are_the_same_on_every_machine():
    assert signatures(["The hen ran home. 母鸡跑回家了。"], n_perm=4).tolist() == [
        [184145514, 825662318, 226782665, 46183568]
    ]


# --- bands ------------------------------------------------------------------------------------------------------------


def test_keys_are_equal_exactly_where_bands_are():
    rng = np.random.default_rng(0)
    found = rng.integers(0, 2, (200, 12)).astype(np.uint32)
    keys = band_keys(found, 3, 4)
    for band in range(3):
        part = found[:, 4 * band : 4 * band + 4]
        same = (part[:, None] == part[None]).all(axis=2)
        assert np.array_equal(keys[:, band, None] == keys[None, :, band], same)
    with pytest.raises(ValueError, match="need 15 permutations; there are 12"):
        band_keys(found, 5, 3)


@pytest.mark.parametrize(("bands", "rows"), [(9, 13), (20, 5)])
def test_pairs_have_a_band_in_common_as_often_as_the_formula_says(bands, rows):
    rng = np.random.default_rng(2)
    n_pairs, trials = 100, 1000
    for similarity in (0.5, 0.7, 0.8, 0.9):
        *pairs, exact = zip(*(pair_of_sets(similarity, 100, rng) for _ in range(n_pairs)))
        exact = exact[0]
        one, other = (sketch_sets(sets, trials // n_pairs * bands * rows).reshape(trials, -1) for sets in pairs)
        found = (band_keys(one, bands, rows) == band_keys(other, bands, rows)).any(axis=1).mean()
        expected = float(candidate_probability(exact, bands, rows))
        assert expected == pytest.approx(1 - (1 - exact**rows) ** bands)
        assert abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / trials)


def test_chosen_bands_are_those_of_datasketch():
    lsh = pytest.importorskip("datasketch.lsh", reason="datasketch is not installed")
    for threshold, weight in ((0.5, 0.5), (0.8, 0.5), (0.8, 0.9)):
        assert choose_bands(threshold, 64, weight) == lsh._optimal_param(threshold, 64, 1 - weight, weight)


def test_impossible_thresholds_and_weights_are_refused():
    for threshold in (0, 1, 1.5):
        with pytest.raises(ValueError, match="between 0 and 1"):
            choose_bands(threshold)
    with pytest.raises(ValueError, match="false_negative_weight is 2"):
        choose_bands(0.8, false_negative_weight=2)
