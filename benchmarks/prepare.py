"""How fast `prepare` tokenises, against sentencepiece's own batch call on the same documents.

    python benchmarks/prepare.py PATH ... [--text_field text] [--document line] [--mb 64] [--rounds 5]

The corpus is repeated until it has --mb MB, so that what is fixed (starting processes, fsync) counts as it does for a
corpus worth measuring. sentencepiece gets the documents as one list, already in memory, with one thread, 8 MB at a
time; `prepare` starts from the files and ends with verified shards on the disk. All three take turns, so that a busy
machine slows each alike, and medians of ratios are quoted.

Wall time is what a user waits; CPU time (all processes) is the better figure while other programs run.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import sentencepiece

from minillm.data.config import DataConfig
from minillm.data.shards import prepare
from minillm.data.text import documents, find_files
from minillm.tokenizer import TokenizerConfig, train_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="+")
    parser.add_argument("--text_field", default="text")
    parser.add_argument("--document", default="line")
    parser.add_argument("--mb", type=float, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"python {sys.version.split()[0]}, sentencepiece {sentencepiece.__version__}")
    print(f"{'':24}{'documents':>10}{'MB':>6}   MB/s: sentencepiece, prepare x1, x2    x1 / sp    x2 / sp    x2 / x1")
    for path in options.path:
        measure(path, options)


def measure(path: str, options: argparse.Namespace) -> None:
    config = DataConfig(path=path, document=options.document, text_field=options.text_field)
    files = find_files(path)
    tokenizer = train_tokenizer((d.text for d in documents(files, config)), TokenizerConfig(kind="bpe"))
    texts = whole_documents(files, config)
    size = sum(len(text.encode()) for text in texts)
    copies = max(1, round(options.mb * 1e6 / size))
    with tempfile.TemporaryDirectory() as folder:
        corpus = repeated(files, copies, Path(folder))
        batches = in_batches(texts, size, 8e6)

        def library() -> None:
            done = 0
            while done < copies * len(batches):
                tokenizer.processor.encode(batches[done % len(batches)], num_threads=1)
                done += 1

        def ours(workers: int) -> None:
            with tempfile.TemporaryDirectory(dir=folder) as cache:
                prepare(
                    DataConfig(
                        path=[str(file) for file in corpus],
                        document=options.document,
                        text_field=options.text_field,
                        cache_dir=cache,
                        workers=workers,
                    ),
                    tokenizer,
                    progress=False,
                )

        runs: dict[str, list[tuple[float, float]]] = {"sp": [], "x1": [], "x2": []}
        for _ in range(options.rounds):
            runs["sp"].append(timed(library))
            runs["x1"].append(timed(lambda: ours(1)))
            runs["x2"].append(timed(lambda: ours(2)))
    mb = size * copies / 1e6
    for kind, column in (("wall", 0), ("CPU", 1)):
        seconds = {name: [run[column] for run in of] for name, of in runs.items()}
        rates = "".join(f"{mb / statistics.median(seconds[name]):>12.2f}" for name in ("sp", "x1", "x2"))
        ratios = [ratio(seconds["sp"], seconds["x1"]), ratio(seconds["sp"], seconds["x2"])]
        ratios.append(ratio(seconds["x1"], seconds["x2"]))
        columns = "".join(f"{value:>11.2f}" for value in ratios)
        head = f"{Path(path).name + ', ' + kind:24}{len(texts) * copies:>10,}{mb:>6.0f}   "
        print(f"{head}{rates}  {columns}", flush=True)


def whole_documents(files: list[Path], config: DataConfig) -> list[str]:
    """The texts as sentencepiece's own user would pass them: documents, not pieces."""
    texts: list[str] = []
    for document in documents(files, config):
        if document.starts:
            texts.append("")
        texts[-1] += document.text
    return texts


def in_batches(texts: list[str], size: int, batch_size: float) -> list[list[str]]:
    count = max(1, round(size / batch_size))
    return [texts[i * len(texts) // count : (i + 1) * len(texts) // count] for i in range(count)]


def repeated(files: list[Path], copies: int, folder: Path) -> list[Path]:
    paths = []
    for file in files:
        for copy in range(copies):
            paths.append(folder / f"{copy:04d}-{file.name}")
            paths[-1].symlink_to(file.resolve())
    return paths


def timed(function: Callable[[], None]) -> tuple[float, float]:
    """(wall, CPU) seconds, the processes that the function started and ended included."""

    def cpu() -> float:
        usages = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    wall, before = time.perf_counter(), cpu()
    function()
    return time.perf_counter() - wall, cpu() - before


def ratio(base: list[float], other: list[float]) -> float:
    return statistics.median(b / o for b, o in zip(base, other))


if __name__ == "__main__":
    main()
