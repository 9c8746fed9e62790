"""How fast `minillm data clean` is on one core, and what each of its steps costs.

    python benchmarks/clean.py PATH [--text_field text] [--document line] [--against FILE] [--mb 20] [--rounds 3]

The corpus is --mb MB of documents as long as those of PATH, each put together from sentences that are drawn at random
from all of PATH: copies of the same documents would all be duplicates. Each row of the table does what the row before
does, and one thing more; rounds take turns, and the medians of CPU time are shown, so that a busy machine matters less.
"""

import argparse
import json
import random
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

from minillm.data.clean.config import CleanConfig
from minillm.data.clean.pipeline import clean
from minillm.data.clean.report import Report, table
from minillm.data.clean.sift import whole_texts
from minillm.data.config import DataConfig
from minillm.data.text import find_files

NOTHING = {"rules": [], "unicode": "none", "spaces": False, "privacy": [], "exact": False, "near": None}
STEPS = {
    "read and write": {},
    "normalise": {"unicode": "nfc", "spaces": True},
    "rules of Gopher": {"rules": ["basic", "gopher", "repetition"]},
    "rules of C4": {"rules": ["basic", "gopher", "repetition", "c4"]},
    "secrets": {"privacy": CleanConfig().privacy},
    "exact duplicates": {"exact": True},
    "near-duplicates": {"near": 0.8},
    "contamination": {"against": ""},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path")
    parser.add_argument("--text_field", default="text")
    parser.add_argument("--document", default="line")
    parser.add_argument("--against", help="test files to look for")
    parser.add_argument("--against_field", default="question")
    parser.add_argument("--mb", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"python {sys.version.split()[0]}, one process")
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        write_corpus(corpus, options)
        seconds: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            settings = dict(NOTHING)
            for step, added in STEPS.items():
                settings |= added
                if step == "contamination":
                    if not options.against:
                        continue
                    settings |= {"against": options.against, "against_field": options.against_field}
                report, taken = run(corpus, CleanConfig(**settings))
                seconds.setdefault(step, []).append(taken)
    print(f"{report.documents:,} documents, {report.n_bytes / 1e6:.1f} MB\n")
    print("| with | documents/s | MB/s |\n|---|---:|---:|")
    for step, taken in seconds.items():
        median = statistics.median(taken)
        print(f"| {step} | {report.documents / median:,.0f} | {report.n_bytes / 1e6 / median:.1f} |")
    print(f"\n{table(report)}")


def write_corpus(path: Path, options: argparse.Namespace) -> None:
    """Documents of sentences at random, as many as --mb asks for."""
    data = DataConfig(path=options.path, text_field=options.text_field, document=options.document)
    texts = [text for _, text in whole_texts(find_files(options.path), data)]
    sentences = [sentence for text in texts for sentence in re.split(r"(?<=[.!?。！？\n])", text) if sentence]
    draw = random.Random(0)
    written = 0
    with open(path, "w") as file:
        while written < options.mb * 1e6:
            length, drawn = len(draw.choice(texts)), ""
            while len(drawn) < length:
                drawn += draw.choice(sentences)
            written += len(drawn.encode())
            file.write(json.dumps({"text": drawn}) + "\n")


def run(corpus: Path, config: CleanConfig) -> tuple[Report, float]:
    """(report, seconds of CPU) of cleaning the corpus."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        report = clean(DataConfig(path=str(corpus), workers=1), config, Path(folder) / "out", progress=False)
        return report, time.process_time() - start


if __name__ == "__main__":
    main()
