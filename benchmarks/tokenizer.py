"""How fast a BPE tokenizer encodes beside sentencepiece's own list call, on the same texts, on one core.

    python benchmarks/tokenizer.py TEXT [TEXT ...] [--vocab_size N] [--document CHARACTERS ...] [--rounds N]

Each file is cut into documents of so many characters. In every round sentencepiece, `encode_batch` (lists) and
`encode_arrays` encode all of them, one after the other. Printed are medians over the rounds: sentencepiece's megabytes
of UTF-8 a second, and the rates of the other two divided by it within a round, which a machine that speeds up and slows
down changes little.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from minillm.tokenizer import BPETokenizer, TokenizerConfig, train_tokenizer


def seconds(function: Callable, documents: list[str]) -> float:
    start = time.process_time()  # of this process alone, so that what else runs on the machine counts less
    function(documents)
    return time.process_time() - start


def compare(tokenizer: BPETokenizer, documents: list[str], rounds: int) -> tuple[float, float, float]:
    """(MB/s of sentencepiece, encode_batch / sentencepiece, encode_arrays / sentencepiece), medians over the rounds."""
    megabytes = sum(len(document.encode()) for document in documents) / 1e6
    raw, lists, arrays = [], [], []
    for _ in range(rounds):
        raw.append(seconds(lambda texts: tokenizer.processor.encode(texts, num_threads=1), documents))
        lists.append(seconds(tokenizer.encode_batch, documents))
        arrays.append(seconds(tokenizer.encode_arrays, documents))
    ratios = [statistics.median(a / b for a, b in zip(raw, ours)) for ours in (lists, arrays)]
    return megabytes / statistics.median(raw), *ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--document", type=int, nargs="+", default=[300, 2400, 100_000])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()

    print(f"{'file':<26} {'document':>9} {'sentencepiece':>14} {'encode_batch':>13} {'encode_arrays':>14}")
    for path in options.texts:
        text = path.read_text(encoding="utf-8")
        tokenizer = train_tokenizer([text], TokenizerConfig(vocab_size=options.vocab_size))
        for size in options.document:
            documents = [text[i : i + size] for i in range(0, len(text), size)]
            rate, lists, arrays = compare(tokenizer, documents, options.rounds)
            print(f"{path.name:<26} {size:>9,} {rate:>9.2f} MB/s {lists:>12.2f}x {arrays:>13.2f}x", flush=True)


if __name__ == "__main__":
    main()
