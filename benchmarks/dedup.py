"""Near-duplicates by MinHash: documents a second, recall and precision, beside datasketch with the same parameters.

    python benchmarks/dedup.py [--documents 50000] [--planted 5000] [--threshold 0.8] [--rounds 7]

The corpus is generated: words of a vocabulary of 4,096 at Zipf's frequencies, documents of about 2.4 kB, one in ten of
them with one of some stock paragraphs. Planted are copies of documents with words replaced here and there, so that the
Jaccard similarity to the original is spread evenly from 0.5 to 1. The exact similarity of all pairs that share anything
is counted over sets of 5-word shingles: five words of 12 bits each are one number, no hash.

Quality: two documents are found when they end up in one group; for datasketch, when a query of one finds the other.
Speed: in each round every contender goes from texts to groups on one core, one after the other; printed are medians
over the rounds: documents a second of processor time, and the others' time divided by ours within a round.
"""

import argparse
import statistics
import time
import zlib
from collections.abc import Callable
from itertools import pairwise

import numpy as np
from datasketch import MinHash, MinHashLSH

from minillm.data.clean.duplicates import near_duplicates
from minillm.data.clean.minhash import N_PERM, NGRAM, choose_bands, signatures

BITS = 12  # of the number of a word
WORDS = 400  # of a document, on average
EDGES = [0.0, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0]
Pairs = np.ndarray  # (pairs,) int64: the earlier document * documents + the later


# --- the corpus -------------------------------------------------------------------------------------------------------


def generate(n_documents: int, n_planted: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Documents as numbers of words; the planted copies are the last ones."""
    frequency = 1 / np.arange(10, 10 + 2**BITS)
    frequency /= frequency.sum()
    stock = rng.choice(2**BITS, (n_documents // 100 + 1, WORDS // 3), p=frequency)
    documents = []
    for _ in range(n_documents - n_planted):
        words = rng.choice(2**BITS, rng.integers(WORDS // 2, WORDS * 3 // 2), p=frequency)
        if rng.random() < 0.1:
            words = np.concatenate([words[WORDS // 3 :], stock[rng.integers(len(stock))]])
        documents.append(words)
    originals = rng.choice(len(documents), n_planted, replace=False)
    return documents + [edit(documents[i], rng.uniform(0.5, 1.0), rng) for i in originals]


def edit(words: np.ndarray, similarity: float, rng: np.random.Generator) -> np.ndarray:
    """A copy with words replaced one by one until so much of the n-grams is left, to a Jaccard similarity."""
    words, n_shingles = words.copy(), len(words) - NGRAM + 1
    lost = np.zeros(n_shingles, bool)
    for place in rng.permutation(len(words)):
        after = lost.copy()
        after[max(0, place - NGRAM + 1) : place + 1] = True
        left = n_shingles - after.sum()
        if left / (2 * n_shingles - left) < similarity:
            break
        words[place] = (words[place] + rng.integers(1, 2**BITS)) % 2**BITS
        lost = after
    return words


def spell(documents: list[np.ndarray], rng: np.random.Generator) -> list[str]:
    """The documents as text: each number a word of 2 to 8 letters."""
    letters = list("abcdefghijklmnopqrstuvwxyz")
    vocabulary: dict[str, None] = {}
    while len(vocabulary) < 2**BITS:
        vocabulary["".join(rng.choice(letters, rng.integers(2, 9)))] = None
    table = list(vocabulary)
    return [" ".join(table[word] for word in words) for words in documents]


def exact_similarities(documents: list[np.ndarray]) -> tuple[Pairs, np.ndarray]:
    """All pairs of documents that share a shingle, and their Jaccard similarity."""
    sets = []
    for words in documents:
        windows = np.lib.stride_tricks.sliding_window_view(words.astype(np.uint64), NGRAM)
        sets.append(np.unique((windows << (np.arange(NGRAM, dtype=np.uint64) * np.uint64(BITS))).sum(axis=1)))
    sizes = np.array([len(one) for one in sets])
    shingles, owners = np.concatenate(sets), np.repeat(np.arange(len(sets)), sizes)
    order = np.argsort(shingles, kind="stable")  # the owners of a shingle stay in order
    shingles, owners = shingles[order], owners[order]
    shared = []
    for distance in range(1, len(documents)):
        same = np.flatnonzero(shingles[distance:] == shingles[:-distance])
        if not len(same):
            break
        shared.append(owners[same] * len(sets) + owners[same + distance])
    pairs, both = np.unique(np.concatenate(shared), return_counts=True)
    a, b = np.divmod(pairs, len(sets))
    return pairs, both / (sizes[a] + sizes[b] - both)


# --- the contenders: from texts to pairs ------------------------------------------------------------------------------


def ours(texts: list[str], threshold: float, bands: int, rows: int) -> np.ndarray:
    return near_duplicates(signatures(texts, N_PERM), bands, rows, threshold)


def theirs(texts: list[str], bands: int, rows: int, hashfunc: Callable | None = None) -> tuple[list, list]:
    """datasketch's generator, for each document a query, then an insertion: (sketches, candidates of each)."""
    lsh = MinHashLSH(num_perm=N_PERM, params=(bands, rows))
    options = {} if hashfunc is None else {"hashfunc": hashfunc}
    sketches, candidates = [], []
    for i, sketch in enumerate(MinHash.generator(map(shingles_of, texts), num_perm=N_PERM, **options)):
        candidates.append(lsh.query(sketch))
        lsh.insert(i, sketch)
        sketches.append(sketch)
    return sketches, candidates


def shingles_of(text: str) -> set[bytes]:
    words = text.encode().split()
    return {b" ".join(words[i : i + NGRAM]) for i in range(max(1, len(words) - NGRAM + 1))}


def pairs_of_groups(first: np.ndarray) -> Pairs:
    order = np.argsort(first, kind="stable")
    found = []
    for members in np.split(order, np.flatnonzero(np.diff(first[order])) + 1):
        a, b = np.triu_indices(len(members), 1)
        found.append(members[a] * len(first) + members[b])
    return np.concatenate(found)


def pairs_of_candidates(candidates: list[list[int]]) -> Pairs:
    pairs = [earlier * len(candidates) + i for i, found in enumerate(candidates) for earlier in found]
    return np.array(pairs, np.int64)


# --- the tables -------------------------------------------------------------------------------------------------------


def quality(documents: list[np.ndarray], texts: list[str], threshold: float) -> None:
    same = choose_bands(threshold, N_PERM, 0.5)
    pairs, similarity = exact_similarities(documents)
    sketches, candidates = theirs(texts, *same)
    found = {f"datasketch {same}": pairs_of_candidates(candidates)}
    a, b = np.divmod(found[f"datasketch {same}"], len(texts))
    alike = [sketches[i].jaccard(sketches[j]) >= threshold for i, j in zip(a, b)]
    found[f"datasketch {same}, verified"] = found[f"datasketch {same}"][np.array(alike, bool)]
    del sketches, candidates
    sketched = signatures(texts, N_PERM)
    for bands in (same, choose_bands(threshold, N_PERM)):
        found[f"minillm {bands}"] = pairs_of_groups(near_duplicates(sketched, *bands, threshold))

    print("| Jaccard similarity | pairs | " + " | ".join(found) + " |\n|" + "---|" * (2 + len(found)))
    for low, high in pairwise(EDGES):
        here = (similarity >= low) & ((similarity < high) | (high == 1.0))
        shares = [f"{np.isin(pairs[here], some).mean():.1%}" for some in found.values()] if here.any() else []
        print(f"| {low:.2f} to {high:.2f} | {here.sum():,} | " + " | ".join(shares) + " |")
    right = pairs[similarity >= threshold]
    recall = [f"{np.isin(right, some).mean():.1%}" for some in found.values()]
    precision = [f"{np.isin(some, right).mean():.1%}" for some in found.values()]
    print(f"| **recall at {threshold}** | {len(right):,} | " + " | ".join(recall) + " |")
    print("| **precision** | | " + " | ".join(precision) + " |")


def speed(texts: list[str], threshold: float, rounds: int) -> None:
    same = choose_bands(threshold, N_PERM, 0.5)
    contenders = {
        "minillm": lambda: ours(texts, threshold, *same),
        "datasketch, SHA-1": lambda: theirs(texts, *same),
        "datasketch, zlib.crc32": lambda: theirs(texts, *same, zlib.crc32),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(1 + rounds):
        for name, run in contenders.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    seconds = {name: times[1:] for name, times in seconds.items()}  # the first round warms up
    print("| | documents/s | minillm is faster by |\n|---|---|---|")
    for name, times in seconds.items():
        ratio = statistics.median(t / o for t, o in zip(times, seconds["minillm"]))
        print(f"| {name} | {len(texts) / statistics.median(times):,.0f} | {ratio:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=50_000)
    parser.add_argument("--planted", type=int, default=5_000)
    parser.add_argument("--threshold", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--timed", type=int, default=2_000, help="documents of the measure of speed")
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    documents = generate(options.documents, options.planted, rng)
    texts = spell(documents, rng)
    size = statistics.mean(map(len, texts))
    print(f"{len(texts):,} documents of {size:,.0f} bytes on average, {options.planted:,} of them planted copies")
    print(f"{N_PERM} permutations, {NGRAM}-word shingles, threshold {options.threshold}\n")
    speed(texts[-options.timed :], options.threshold, options.rounds)
    print()
    quality(documents, texts, options.threshold)


if __name__ == "__main__":
    main()
