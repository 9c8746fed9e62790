"""Greedy decoding with int8 weights beside fp32, on random weights: how long a token takes.

    python benchmarks/quantize.py [--shapes 26m 170m] [--batches 1 8] [--tokens 32] [--threads 1] [--rounds 5]

Both run in one process, in turns; a ratio is the median of the rounds' ratios. Prompts have 16 tokens.
"""

import argparse
import copy
import statistics
import time

import torch

from minillm import ModelConfig, SamplingParams, Transformer, generate
from minillm.quantize import quantize_int8

SHAPES = {
    "26m": ModelConfig(vocab_size=6400, dim=512, n_layers=8, n_heads=8, n_kv_heads=2, ffn_dim=1408),
    "170m": ModelConfig(vocab_size=16_000, dim=1024, n_layers=12, n_heads=16, n_kv_heads=4, ffn_dim=2816),
    "tiny": ModelConfig(vocab_size=64, dim=16, n_layers=1, n_heads=2),
}


def megabytes(model):
    return sum(parameter.numel() * parameter.itemsize for parameter in model.parameters()) / 1e6


def seconds(model, prompts, tokens):
    params = SamplingParams(temperature=0, max_new_tokens=tokens)
    start = time.perf_counter()
    generate(model, None, prompts, params)
    return time.perf_counter() - start


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["26m", "170m"], choices=SHAPES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    print("| shape | fp32, MB | int8, MB | batch | fp32, tokens/s | int8, tokens/s | int8 / fp32 |")
    print("|---|---|---|---|---|---|---|")
    for name in options.shapes:
        torch.manual_seed(0)
        plain = Transformer(SHAPES[name]).eval()
        models = {"fp32": plain, "int8": quantize_int8(copy.deepcopy(plain))}
        sizes = " | ".join(f"{megabytes(model):,.1f}" for model in models.values())
        for batch in options.batches:
            prompts = torch.randint(SHAPES[name].vocab_size, (batch, 16)).tolist()
            rounds = [
                {kind: seconds(model, prompts, options.tokens) for kind, model in models.items()}
                for _ in range(1 + options.rounds)
            ][1:]
            speeds = {kind: batch * options.tokens / statistics.median(one[kind] for one in rounds) for kind in models}
            ratio = statistics.median(one["fp32"] / one["int8"] for one in rounds)
            print(
                f"| {name} | {sizes} | {batch} | {speeds['fp32']:,.0f} | {speeds['int8']:,.0f} | {ratio:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
