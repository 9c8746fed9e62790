"""Attention through a sliding window, a block of queries at a time, against one call with a boolean mask; forward and
backward, on the CPU.

    python benchmarks/window.py [--threads 1] [--rounds 7]

All run in one process, in turns; a ratio is the median of the rounds' ratios to the windowed path. `full` is causal
attention without a window.
"""

import argparse
import statistics
import time

import torch

from minillm.model.attention import attend
from minillm.model.masks import Mask, visible

SHAPES = [(1024, 256), (2048, 256), (4096, 256)]
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64


def masks(T, window):
    windowed, dense, full = Mask(True, window=window), Mask(True, window=window), Mask(True)
    windowed.path, dense.path, full.path = "window", "dense", "causal"
    dense.dense = visible(dense, range(T), range(T), torch.device("cpu"))
    return {"window": windowed, "dense": dense, "full": full}


def seconds(mask, qkv):
    start = time.perf_counter()
    torch.autograd.grad(attend(*qkv, mask).sum(), qkv)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| T | window | windowed, ms | dense mask | full causal |\n|---|---|---|---|---|")
    for T, window in SHAPES:
        heads = (HEADS, KV_HEADS, KV_HEADS)
        qkv = [torch.randn(1, T, n, HEAD_DIM).transpose(1, 2).requires_grad_() for n in heads]
        cases = masks(T, window)
        rounds = [{name: seconds(mask, qkv) for name, mask in cases.items()} for _ in range(1 + options.rounds)][1:]
        own = statistics.median(one["window"] for one in rounds)
        ratios = [statistics.median(one[name] / one["window"] for one in rounds) for name in ("dense", "full")]
        print(f"| {T:,} | {window:,} | {1000 * own:.0f} | {ratios[0]:.1f} | {ratios[1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
