"""Groups of duplicates are those that comparing all pairs would give, in memory or from files, in any order."""

import numpy as np
import pytest

from minillm.data.clean import duplicates
from minillm.data.clean.duplicates import (
    exact_duplicates,
    near_duplicates,
    open_signatures,
    text_hashes,
    unite,
)
from minillm.data.clean.minhash import band_keys, signatures

BANDS, ROWS, THRESHOLD = 14, 9, 0.8


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    """Texts in families: chains of copies, each with some more words replaced, mixed with unrelated and empty texts."""
    rng = np.random.default_rng(0)
    vocabulary = np.array([f"w{i}" for i in range(2000)])
    texts = []
    for _ in range(60):
        words = rng.choice(vocabulary, 200)
        texts.append(" ".join(words))
        for _ in range(rng.integers(0, 8)):
            words = words.copy()
            words[rng.integers(0, 200, rng.integers(0, 10))] = rng.choice(vocabulary)
            texts.append(" ".join(words))
    texts += ["", "...", "", "hen"]
    return [texts[i] for i in rng.permutation(len(texts))]


def groups_of_all_pairs(found: np.ndarray, threshold: float) -> np.ndarray:
    """The first document of each group, from a comparison of all pairs, by walking from neighbour to neighbour."""
    keys = band_keys(found, BANDS, ROWS)
    n = len(found)
    filled = (found != 2**32 - 1).any(axis=1)
    near = [
        [
            j
            for j in range(n)
            if filled[i] and filled[j] and (keys[i] == keys[j]).any() and (found[i] == found[j]).mean() >= threshold
        ]
        for i in range(n)
    ]
    first = np.full(n, -1)
    for i in range(n):
        stack = [i] if first[i] < 0 else []
        while stack:
            one = stack.pop()
            if first[one] < 0:
                first[one] = i
                stack += near[one]
        first[i] = i if first[i] < 0 else first[i]
    return first


def partition(first: np.ndarray, names: np.ndarray) -> set[frozenset]:
    return {frozenset(names[first == one].tolist()) for one in np.unique(first)}


def test_groups_are_those_of_a_comparison_of_all_pairs(corpus):
    found = signatures(corpus)
    first = near_duplicates(found, BANDS, ROWS, THRESHOLD)
    assert np.array_equal(first, groups_of_all_pairs(found, THRESHOLD))
    sizes = np.bincount(first)
    assert (sizes == 1).any()
    assert (sizes > 3).any()


def test_the_order_of_documents_does_not_change_the_groups(corpus):
    found = signatures(corpus)
    expected = partition(near_duplicates(found, BANDS, ROWS, THRESHOLD), np.arange(len(found)))
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(found))
        assert partition(near_duplicates(found[order], BANDS, ROWS, THRESHOLD), order) == expected


def test_from_files_and_in_parts_the_groups_are_the_same(corpus, tmp_path, monkeypatch):
    found = signatures(corpus)
    expected = near_duplicates(found, BANDS, ROWS, THRESHOLD)
    path = tmp_path / "signatures"
    path.write_bytes(found.tobytes())
    for sizes in ({}, {"ROWS": 16, "BLOCK": 7, "SORTED": 50, "PAIRS": 3}):
        for name, size in sizes.items():
            monkeypatch.setattr(duplicates, name, size)
        stored = open_signatures(path, found.shape[1])
        assert np.array_equal(stored[:], found)
        assert np.array_equal(stored[np.array([5, 3])], found[[5, 3]])
        assert np.array_equal(near_duplicates(stored, BANDS, ROWS, THRESHOLD, tmp_path), expected)
        assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    path = tmp_path / "signatures"
    path.write_bytes(bytes(100))
    with pytest.raises(ValueError, match="signatures: 100 bytes are no whole number of signatures of 16"):
        open_signatures(path, 16)
    path.write_bytes(b"")
    assert near_duplicates(open_signatures(path, 128), BANDS, ROWS, THRESHOLD, tmp_path).tolist() == []


def test_a_full_disk_is_one_line(disk):
    place, fill = disk
    fill()
    found = signatures([f"hen {i}" for i in range(2000)])
    with pytest.raises(ValueError, match=r"cannot be written: the (disk is full|file would be larger)"):
        near_duplicates(found, BANDS, ROWS, THRESHOLD, place)


def test_no_documents_and_one():
    for n in (0, 1):
        found = signatures(["hen"] * n)
        assert near_duplicates(found, BANDS, ROWS, THRESHOLD).tolist() == list(range(n))
        assert exact_duplicates(np.zeros(n, np.uint64)).tolist() == list(range(n))


def test_without_duplicates_each_document_is_its_own_group():
    texts = [" ".join(f"w{i}x{j}" for j in range(20)) for i in range(100)]
    assert near_duplicates(signatures(texts), BANDS, ROWS, THRESHOLD).tolist() == list(range(100))
    assert exact_duplicates(text_hashes(texts)).tolist() == list(range(100))


def test_a_large_bucket_of_several_groups_is_searched_in_reach(monkeypatch):
    bases = [" ".join(f"w{i}x{j}" for j in range(50)) for i in range(4)]
    found = signatures([bases[i % 4] for i in range(400)])
    found[:, 0] = 7  # with one row a band, one bucket holds all
    expected = np.arange(400) % 4
    assert np.array_equal(near_duplicates(found, 1, 1, THRESHOLD), expected)
    monkeypatch.setattr(duplicates, "REACH", 4)  # as far as the next copy
    assert np.array_equal(near_duplicates(found, 1, 1, THRESHOLD), expected)
    monkeypatch.setattr(duplicates, "REACH", 3)
    assert np.array_equal(near_duplicates(found, 1, 1, THRESHOLD), np.arange(400))


def test_thousands_of_copies_are_one_group():
    base = " ".join(f"w{i}" for i in range(300))
    texts = [f"{base} {i}" for i in range(3000)] + ["" for _ in range(3000)]
    first = near_duplicates(signatures(texts), BANDS, ROWS, THRESHOLD)
    assert (first[:3000] == 0).all()
    assert np.array_equal(first[3000:], np.arange(3000, 6000))


def test_candidates_that_are_not_similar_enough_stay_apart():
    texts = [" ".join(f"w{i}" for i in range(100)), " ".join(f"w{i}" for i in range(10, 110))]
    found = signatures(texts)
    agree = (found[0] == found[1]).mean()
    assert near_duplicates(found, 128, 1, agree).tolist() == [0, 0]
    assert near_duplicates(found, 128, 1, agree + 0.001).tolist() == [0, 1]


def test_texts_are_equal_but_for_white_space():
    texts = ["The hen\n ran", " The hen ran ", "the hen ran", "The hen, ran", "The henran", "", "\n", "a\ud800"]
    assert exact_duplicates(text_hashes(texts)).tolist() == [0, 0, 2, 3, 4, 5, 5, 7]


def test_exact_duplicates_are_found_in_parts_as_in_one(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    hashes = rng.choice(rng.integers(0, 2**64, 300, np.uint64), 2000)
    expected = [hashes.tolist().index(one) for one in hashes.tolist()]
    assert exact_duplicates(hashes).tolist() == expected
    hashes.tofile(tmp_path / "hashes")
    monkeypatch.setattr(duplicates, "SORTED", 64)
    monkeypatch.setattr(duplicates, "BLOCK", 100)
    assert exact_duplicates(np.memmap(tmp_path / "hashes", np.uint64, "r")).tolist() == expected


def test_uniting_pairs_makes_the_connected_components():
    rng = np.random.default_rng(0)
    group = np.arange(500)
    edges = rng.integers(0, 500, (300, 2))
    for some in np.array_split(edges, 7):
        unite(group, some[:, 0], some[:, 1])
    label = list(range(500))
    for a, b in edges.tolist():
        old, new = label[a], label[b]
        label = [new if one == old else one for one in label]
    expected = [label.index(one) for one in label]
    assert duplicates.find(group, np.arange(500)).tolist() == expected
