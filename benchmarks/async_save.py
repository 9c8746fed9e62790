"""How long a checkpoint holds up training: written at once, and in the background.

    python benchmarks/async_save.py [--mb 200] [--rounds 7] [--dir DIR]

A model of the size of --mb / 3 with AdamW's two moments is saved again and again, the two ways taking turns. Quoted
are medians of: the seconds until `save` returns, the same in the background (from the second time on, when the memory
for the copy is there), and the ratio of each pair. Beside it: what a step of training takes with and without a
checkpoint being written in the background, on as many cores as this process may use.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import torch

from minillm.checkpoint import ALONE, Saver


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dir", default=None)
    options = parser.parse_args()
    rows = round(options.mb * 1e6 / (3 * 16 * 1024 * 4))
    tensors = {
        f"{prefix}blocks.{i}.weight": torch.randn(rows, 1024)
        for prefix in ("", "optim.exp_avg.", "optim.exp_avg_sq.")
        for i in range(16)
    }
    size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    savers = {"at once": Saver(ALONE), "in the background": Saver(ALONE, background=True)}
    seconds: dict[str, list[float]] = {name: [] for name in savers}
    alone, beside = [], []
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        for turn in range(options.rounds + 1):
            for name, saver in savers.items():
                blocked = timed(lambda saver=saver, turn=turn: saver.save(folder, turn, tensors, {}, keep_last=1))
                if saver.background:
                    beside += steps_while(lambda saver=saver: saver.thread.is_alive())
                    saver.wait()
                if turn:  # the first time makes the memory for the copy
                    seconds[name].append(blocked)
            end = time.perf_counter() + 0.5
            alone += steps_while(lambda end=end: time.perf_counter() < end)
    ratios = [one / other for one, other in zip(seconds["in the background"], seconds["at once"])]
    print(f"torch {torch.__version__}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads")
    for name, found in seconds.items():
        print(f"{size:.0f} MB saved {name}: training waits {statistics.median(found):.3f} s")
    low, high = min(ratios), max(ratios)
    print(f"ratio {statistics.median(ratios):.1%} (from {low:.1%} to {high:.1%} in {len(ratios)} pairs)")
    slower = statistics.median(beside) / statistics.median(alone)
    print(f"a step of training while a checkpoint is being written: {slower:.2f} times as long as otherwise")


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def steps_while(goes_on: Callable[[], bool]) -> list[float]:
    """Seconds of some matrix products, as a step of training would make them."""
    a, found = torch.ones(512, 512), []
    while goes_on():
        found.append(timed(lambda: [a @ a for _ in range(4)]))
    return found


if __name__ == "__main__":
    main()
