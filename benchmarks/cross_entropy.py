"""The chunked loss against F.cross_entropy(lm_head(hidden)): time of forward and backward, and peak memory.

    python benchmarks/cross_entropy.py [--threads 2] [--rounds 7]

Both run in one process, in turns; the time is the median of each, the ratio the median of the rounds' ratios. Memory is
the largest resident size of a fresh process, less that before the loss; it holds the gradient of the weight, V x D.
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from minillm.losses import chunked_cross_entropy, cross_entropy

SHAPES = [(65, 128, 768), (6400, 512, 2048), (50_304, 384, 2048), (151_936, 512, 2048)]
LOSSES = {"plain": cross_entropy, "chunked": chunked_cross_entropy}


def problem(vocab_size, dim, tokens):
    torch.manual_seed(0)
    lm_head = nn.Linear(dim, vocab_size, bias=False)
    return lm_head, torch.randn(tokens, dim, requires_grad=True), torch.randint(0, vocab_size, (tokens,))


def step(loss, lm_head, hidden, targets):
    lm_head.weight.grad = hidden.grad = None
    (loss(lm_head, hidden, targets) / len(targets)).backward()


def memory(field):
    """VmRSS, resident now, or VmHWM, the largest so far, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status).group(1)) / 1024


def measure_memory(name, shape):
    data = problem(*map(int, shape.split(",")))
    before = memory("VmRSS")
    step(LOSSES[name], *data)
    print(max(0.0, memory("VmHWM") - before))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", nargs=2, metavar=("LOSS", "V,D,N"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        return measure_memory(*options.memory)
    print("| V | D | tokens | plain, s | chunked, s | speed-up | plain, MiB | chunked, MiB |\n|" + "---|" * 8)
    for shape in SHAPES:
        data = problem(*shape)
        times = {name: [] for name in LOSSES}
        for _ in range(1 + options.rounds):
            for name, loss in LOSSES.items():
                start = time.perf_counter()
                step(loss, *data)
                times[name].append(time.perf_counter() - start)
        times = {name: values[1:] for name, values in times.items()}  # the first round warms up
        ratio = statistics.median(p / c for p, c in zip(times["plain"], times["chunked"]))
        mib = []
        for name in LOSSES:
            command = [sys.executable, __file__, "--memory", name, ",".join(map(str, shape))]
            mib.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        seconds = [statistics.median(values) for values in times.values()]
        cells = [*shape, *(f"{s:.4f}" for s in seconds), f"{ratio:.2f}", *(f"{m:.0f}" for m in mib)]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
