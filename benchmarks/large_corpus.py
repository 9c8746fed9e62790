"""Prepare a generated corpus larger than memory need be: peak memory, two workers against one, a kill and a resume.

    python benchmarks/large_corpus.py [--gb 2] [--kind bpe] [--folder DIR] [--rounds 1] [--keep_every 30]

Writes --gb GB of text into a folder (a temporary one, which goes away, unless it is named), in JSON lines plain and
packed, parquet and csv: words with the frequencies of a language, every eighth document in Chinese characters, one in
five thousand some MB long. Then runs `minillm data prepare` as a user would, in processes of its own, with one worker
and with two; kills one run with SIGKILL when 60% of its time is over, calls it again, and compares every byte. At last
the packing plan, which training makes before its first step. It takes four times the disk that the corpus does.

Memory is the sum of the resident sizes of all processes of a run (what they share is counted for each), looked at ten
times a second; torch, which the command imports, is in it. Rates are of text as UTF-8. On a machine that is not quiet
the CPU seconds, of all processes together, say more than the time: on two cores that are free the ratio is close to
twice those of one worker over those of two.
"""

import argparse
import csv
import gzip
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minillm.data.config import DataConfig
from minillm.data.text import documents
from minillm.files import sha256
from minillm.tokenizer import TokenizerConfig, train_tokenizer

SHARES = {"a.jsonl": 0.3, "b.jsonl": 0.3, "c.jsonl.gz": 0.2, "d.parquet": 0.1, "e.csv": 0.1}  # of the text
SAMPLE = 2**24  # bytes that the tokenizer is trained on
VOCAB_SIZE = 8192
SEQ_LEN = 1024  # of the packing plan
PREPARE = """
import sys
from minillm.cli import main
from minillm.data import partial
partial.KEEP_EVERY = float(sys.argv.pop(1))
sys.exit(main())
"""
PLAN = """
import sys
from minillm.data.packing import plan_rows
from minillm.data.store import open_prepared
prepared = open_prepared(sys.argv[1])
plan = plan_rows(prepared.train.document_offsets, int(sys.argv[2]), prepared.directory)
print(f"{plan.n_rows:,} rows, {plan.fill(int(sys.argv[2])):.1%} full")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2)
    parser.add_argument("--kind", choices=["bpe", "byte"], default="bpe", help="byte: quick, to look at memory alone")
    parser.add_argument("--folder", type=Path, help="where to work, and what to keep the corpus in")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--keep_every", type=float, default=30, help="seconds between what a killed run leaves")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        measure(options.folder or Path(temporary), Path(temporary), options)


def measure(folder: Path, temporary: Path, options: argparse.Namespace) -> None:
    corpus, tokenizer = folder / f"corpus-{options.gb:g}gb", temporary / "tokenizer"
    if not corpus.exists():
        write_corpus(corpus, int(options.gb * 1e9))
    sample = sampled(documents([corpus / "a.jsonl"], DataConfig()), SAMPLE)
    vocab_size = VOCAB_SIZE if options.kind == "bpe" else None
    train_tokenizer(sample, TokenizerConfig(kind=options.kind, vocab_size=vocab_size)).save(tokenizer)

    def command(workers: int, cache: str) -> list[str]:
        options_of = {"path": corpus, "workers": workers, "cache_dir": temporary / cache}
        words = [word for name, value in options_of.items() for word in (f"--data.{name}", str(value))]
        code = [sys.executable, "-c", PREPARE, str(options.keep_every)]
        return [*code, "data", "prepare", "--tokenizer.path", str(tokenizer), *words]

    print(f"{'workers':>16}{'seconds':>10}{'MB/s':>8}{'CPU s':>8}{'peak MB: all':>14}{'parent':>8}", flush=True)
    runs: dict[int, list[Run]] = {1: [], 2: []}
    for round in range(options.rounds):
        for workers, of in runs.items():
            of.append(run(command(workers, f"{workers}-{round}")))
            size = n_bytes(temporary / f"{workers}-{round}")
            rate = size / 1e6 / of[-1].seconds
            figures = f"{of[-1].seconds:>10.1f}{rate:>8.2f}{of[-1].cpu:>8.1f}{of[-1].peak:>14.0f}{of[-1].parent:>8.0f}"
            print(f"{workers:>16}{figures}", flush=True)
    one, two = runs[1], runs[2]
    ratio = statistics.median(a.seconds / b.seconds for a, b in zip(one, two))
    bound = statistics.median(2 * a.cpu / b.cpu for a, b in zip(one, two))
    print(f"two workers against one, on {os.cpu_count()} cores: {ratio:.2f} by the clock, {bound:.2f} by CPU seconds")

    expected = hashes(temporary / "1-0")
    print(f"the bytes of two workers: {'the same' if hashes(temporary / '2-0') == expected else 'DIFFERENT'}")
    killed = run(command(2, "killed"), kill_after=0.6 * two[0].seconds)
    resumed = run(command(2, "killed"))
    said = [line.partition(": ")[2] for line in resumed.said.splitlines() if "resumed at" in line]
    print(f"killed after {killed.seconds:.0f} s; {said[0] if said else 'NOT RESUMED'}, {resumed.seconds:.0f} s more")
    print(f"the bytes of the resumed run: {'the same' if hashes(temporary / 'killed') == expected else 'DIFFERENT'}")
    (prepared,) = (temporary / "1-0").glob("*/")
    plan = run([sys.executable, "-c", PLAN, str(prepared), str(SEQ_LEN)])
    print(f"packing plan: {plan.said.strip()}, {plan.seconds:.0f} s, peak {plan.peak:.0f} MB")


# --- the corpus -------------------------------------------------------------------------------------------------------


def write_corpus(folder: Path, size: int, seed: int = 0) -> None:
    """Files of generated text, about `size` bytes of it; the same for the same seed."""
    from pyarrow import Table, parquet, schema, string

    folder.mkdir(parents=True)
    texts = generated(seed)
    for name, share in SHARES.items():
        path, rows = folder / name, sampled(texts, int(size * share))
        if name.endswith(".parquet"):
            columns = schema([("id", string()), ("text", string())])
            with parquet.ParquetWriter(path, columns) as writer:
                for group in in_groups(rows, 2**14):
                    ids = [f"{name}-{number}" for number in range(len(group))]
                    writer.write_table(Table.from_pydict({"id": ids, "text": group}, schema=columns))
        elif name.endswith(".csv"):
            with open(path, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([["id", "text"], *([number, text] for number, text in enumerate(rows))])
        else:
            with (
                gzip.open(path, "wt", 1, "utf-8") if name.endswith(".gz") else open(path, "w", encoding="utf-8") as file
            ):
                file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in rows)


def generated(seed: int) -> Iterator[str]:
    """Documents without end."""
    rng = np.random.default_rng(seed)
    consonants, vowels = [*"bcdfghjklmnprstvwz", "th", "st", "ch", "br"], [*"aeiou", "ea", "ou"]
    syllables = [c + v for c in consonants for v in vowels] + [c + v + "n" for c in consonants for v in vowels]
    lengths = np.minimum(1 + rng.geometric(0.5, 40_000), 5) - (np.arange(40_000) < 200)
    words = ["".join(syllables[i] for i in rng.integers(len(syllables), size=length)) for length in lengths]
    characters = [chr(0x4E00 + int(i)) for i in rng.permutation(6000)[:3500]]
    latin = sentences(rng, words, " ", 50_000, 18)
    chinese = sentences(rng, characters, "", 10_000, 25)
    while True:
        pool = chinese if rng.random() < 1 / 8 else latin
        n = int(rng.integers(20_000, 60_000)) if rng.random() < 1 / 5000 else 1 + int(rng.lognormal(2.4, 1.0))
        picked = rng.integers(len(pool), size=n).tolist()
        breaks = "\n" if rng.random() < 0.3 else " "
        yield breaks.join(pool[i] for i in picked)


def sentences(rng: np.random.Generator, words: list[str], joint: str, count: int, length: int) -> list[str]:
    """Sentences of words that are as frequent as their rank lets one expect (Zipf's law, Mandelbrot's form of it)."""
    weights = 1 / (np.arange(len(words)) + 2.7)
    ends = np.cumsum(weights / weights.sum())
    found = []
    for n in rng.poisson(length, count):
        ids = np.minimum(np.searchsorted(ends, rng.random(n + 1)), len(words) - 1)
        found.append((joint.join(words[i] for i in ids) + (". " if joint else "。")).strip().capitalize())
    return found


def sampled(texts: Iterator, size: int) -> Iterator[str]:
    """The next texts, up to about so many bytes."""
    done = 0
    while done < size:
        text = next(texts)
        text = text if isinstance(text, str) else text.text
        done += len(text.encode())
        yield text


def in_groups(rows: Iterator[str], count: int) -> Iterator[list[str]]:
    group: list[str] = []
    for row in rows:
        group.append(row)
        if len(group) == count:
            yield group
            group = []
    if group:
        yield group


# --- a run ------------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    seconds: float
    cpu: float  # seconds, of all processes
    peak: float  # MB, of all processes together
    parent: float  # MB, of the process that was started
    said: str


def run(command: list[str], kill_after: float | None = None) -> Run:
    """Run a command and look at its memory; kill it with SIGKILL after so many seconds."""
    begun = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stdout), daemon=True)
    reader.start()
    peak = parent = 0.0
    before = os.times()
    while process.poll() is None:
        sizes = [resident(pid) for pid in tree(process.pid)]
        peak, parent = max(peak, sum(sizes)), max([parent, *sizes[:1]])
        if kill_after is not None and time.perf_counter() - begun > kill_after:
            process.send_signal(signal.SIGKILL)
            kill_after = None
            process.wait()
        time.sleep(0.1)
    seconds = time.perf_counter() - begun
    reader.join()
    if process.returncode not in (0, -signal.SIGKILL):
        raise ValueError(f"{' '.join(command)}\n{''.join(said)}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(seconds, cpu, peak, parent, "".join(said))


def tree(pid: int) -> list[int]:
    """A process and all that it has started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(found for child in children for found in tree(int(child)))]


def resident(pid: int) -> float:
    """MB of memory that a process holds now."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except (OSError, IndexError):
        return 0.0


def n_bytes(cache: Path) -> int:
    (index,) = cache.glob("*/index.json")
    return sum(split["n_bytes"] for split in json.loads(index.read_text())["splits"].values())


def hashes(cache: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(cache.glob("*/*")) if path.name != "packing.lock"}


if __name__ == "__main__":
    main()
