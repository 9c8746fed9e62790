"""What choosing a token costs under each parameter, beside the largest vocabularies there are.

    python benchmarks/filters.py [--vocab_size 151936] [--rows 8] [--threads 1] [--rounds 15]

All take turns in one process; a figure is the median over the rounds. Logits are random, spread as widely as those of a
trained model (standard deviation 6), on the CPU in fp32; the prompt has 30,000 tokens.
"""

import argparse
import statistics
import time

import torch

from minillm.generate.filters import TokenCounts, choose
from minillm.generate.params import SamplingParams

PARAMS = {
    "temperature 0": SamplingParams(temperature=0),
    "temperature 1": SamplingParams(),
    "top_k 50": SamplingParams(top_k=50),
    "top_p 0.9": SamplingParams(top_p=0.9),
    "min_p 0.05": SamplingParams(min_p=0.05),
    "top_k 50, top_p 0.9": SamplingParams(top_k=50, top_p=0.9),
    "repetition_penalty 1.1": SamplingParams(repetition_penalty=1.1),
    "presence_penalty 1, frequency_penalty 1": SamplingParams(presence_penalty=1, frequency_penalty=1),
}


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab_size", type=int, default=151_936)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    logits = torch.randn(options.rows, options.vocab_size) * 6
    uniform = torch.rand(options.rows)
    counts = TokenCounts.empty(options.rows, options.vocab_size)
    for row in range(options.rows):
        counts.begin(row, torch.randint(options.vocab_size, (30_000,)).tolist())

    seconds = {name: [] for name in PARAMS}
    for _ in range(options.rounds):
        for name, params in PARAMS.items():
            start = time.perf_counter()
            choose(logits, params, uniform, counts)
            seconds[name].append(time.perf_counter() - start)
    print("| parameters | ms a row |\n|---|---|")
    for name, taken in seconds.items():
        print(f"| {name} | {1000 * statistics.median(taken) / options.rows:.2f} |")


if __name__ == "__main__":
    main()
