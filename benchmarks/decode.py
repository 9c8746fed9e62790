"""How fast text is generated, beside transformers; on a GPU, with what share of its memory's speed.

    python benchmarks/decode.py [--threads 2] [--rounds 5] [--cases 1 8 mixed]
    python benchmarks/decode.py --device cuda --sizes 1b 7b [--batch 1 8 64] [--compile]

On a CPU: the 26M shape of train_step.py in fp32, greedy, random tokens, the same weights on both sides and no end of
text before the length asked for. All run in one process in turns; a ratio is the median over the rounds of the other's
time divided by minillm's in the same round (above 1: minillm is faster), on the wall and, for a CPU that others use
too, in CPU time.

`1` and `8` are so many prompts of 32 tokens, each continued by 128. `mixed` is 64 requests given at once, whose prompts
have 16 to 160 tokens and whose completions have as many, in no relation; each length is a few percent more than the one
before, so that short ones are the more common. In `even` all lengths are as common. minillm gets them in one call;
transformers, which pads a batch to its longest prompt and goes on until its longest completion is there, in the ways of
`STATIC`: all at once, in eights as they come, and in eights sorted by the length of the completion, as if that were
known. Counted are the tokens that were asked for.

On an accelerator: sizes of `SIZES` in bf16. A step has to read all weights but those of the embedding, and the keys and
values of every row; the share is how many bytes that is a second, over what the device's memory was measured to copy.
"""

import argparse
import gc
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from beside import LLAMA_26M, Seconds, as_transformers, compared, machine, table, timed

from minillm.distributed.device import find_device
from minillm.doctor.devices import copy_rate
from minillm.generate.engine import Engine
from minillm.generate.generate import generate
from minillm.generate.params import SamplingParams
from minillm.model.config import ModelConfig
from minillm.model.presets import llama2
from minillm.model.transformer import Transformer

SHAPES = {
    "llama-26m": llama2(vocab_size=6400, max_seq_len=512, **LLAMA_26M),
    "llama-tiny": llama2(vocab_size=96, max_seq_len=512, **LLAMA_26M | {"dim": 32, "ffn_dim": 64, "n_layers": 2}),
}
SIZES = {
    "1b": llama2(vocab_size=32_000, max_seq_len=4096, dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, ffn_dim=5632),
    "7b": llama2(vocab_size=32_000, max_seq_len=4096, dim=4096, n_layers=32, n_heads=32, ffn_dim=11_008),
    "tiny": SHAPES["llama-tiny"],
}
SHORTEST, LONGEST = 16, 160
PROMPT, NEW = 32, 128


class Request(NamedTuple):
    """A prompt, and how many tokens are to follow it."""

    prompt: list[int]
    new: int


def make_requests(case: str, vocab_size: int, scale: int = 1) -> list[Request]:
    """Those of a case; lengths divided by `scale`."""
    g = torch.Generator().manual_seed(0)
    if case in ("mixed", "even"):
        even = torch.linspace(0, 1, 64)
        lengths = SHORTEST * (LONGEST / SHORTEST) ** even if case == "mixed" else SHORTEST + (LONGEST - SHORTEST) * even
        lengths = lengths.round().long() // scale
        prompts, news = (lengths[torch.randperm(64, generator=g)].tolist() for _ in range(2))
    else:
        prompts, news = [PROMPT // scale] * int(case), [NEW // scale] * int(case)
    return [Request(torch.randint(vocab_size, (p,), generator=g).tolist(), new) for p, new in zip(prompts, news)]


# --- the contenders ---------------------------------------------------------------------------------------------------


def ours(model: Transformer, requests: Sequence[Request]) -> list[list[int]]:
    """The new tokens of each request."""
    params = [SamplingParams(temperature=0, max_new_tokens=request.new) for request in requests]
    return [one.tokens for one in generate(model, None, [request.prompt for request in requests], params)]


def theirs(model, requests: Sequence[Request]) -> list[list[int]]:
    """The same by transformers' generate, prompts padded on the left; of what is too long only the beginning counts."""
    width, new = max(len(request.prompt) for request in requests), max(request.new for request in requests)
    tokens, seen = (torch.zeros(len(requests), width, dtype=torch.int64) for _ in range(2))
    for row, request in enumerate(requests):
        tokens[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
        seen[row, width - len(request.prompt) :] = 1
    tokens, seen = tokens.to(model.device), seen.to(model.device)
    made = model.generate(
        tokens, attention_mask=seen, do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0
    )
    return [row[width : width + request.new].tolist() for row, request in zip(made, requests)]


def all_at_once(requests: Sequence[Request]) -> list[Sequence[Request]]:
    return [requests]


def in_eights(requests: Sequence[Request]) -> list[Sequence[Request]]:
    return [requests[i : i + 8] for i in range(0, len(requests), 8)]


def in_sorted_eights(requests: Sequence[Request]) -> list[Sequence[Request]]:
    return in_eights(sorted(requests, key=lambda request: request.new))


STATIC: dict[str, Callable[[Sequence[Request]], list[Sequence[Request]]]] = {
    "all at once": all_at_once,
    "in eights": in_eights,
    "in sorted eights": in_sorted_eights,
}


# --- beside transformers ----------------------------------------------------------------------------------------------


def measure_case(case: str, shape: str, rounds: int, warmup: int, scale: int = 1) -> None:
    """Print the rows of one case."""
    config, device = SHAPES[shape], torch.device("cpu")
    torch.manual_seed(0)
    model = Transformer(config).eval()
    reference = as_transformers(model).eval()
    requests = make_requests(case, config.vocab_size, scale)
    wanted = sum(request.new for request in requests)

    def check(made: list[list[int]], order: Sequence[Request]) -> None:
        assert [len(tokens) for tokens in made] == [request.new for request in order]

    def run_ours(_) -> None:
        check(ours(model, requests), requests)

    def run_theirs(batches: list[Sequence[Request]]) -> None:
        for batch in batches:
            check(theirs(reference, batch), batch)

    ways = {name: STATIC[name](requests) for name in (STATIC if case in ("mixed", "even") else ["all at once"])}
    runs = {"minillm": (run_ours, None)} | {f"transformers, {name}": (run_theirs, way) for name, way in ways.items()}
    seconds: dict[str, list[Seconds]] = {name: [] for name in runs}
    for i in range(warmup + rounds):
        for name, (run, argument) in runs.items():
            took = timed(run, argument, device)
            if i >= warmup:
                seconds[name].append(took)
    for one in compared(seconds, wanted):
        print(f"| {shape} | {case} | {one.name} | {one.rate:,.0f} | {one.wall:.2f} | {one.cpu:.2f} |", flush=True)


# --- on an accelerator ------------------------------------------------------------------------------------------------


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    model.to_empty(device=device)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    return model.eval()


def bytes_a_step(model: Transformer, rows: int, length: int) -> int:
    """What a step has to read: the weights that take part in a product, and the keys and values of each row."""
    config = model.config
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if not config.tie_embeddings:
        weights -= model.embed.weight.nbytes
    number = model.embed.weight.element_size()
    return weights + 2 * config.n_layers * rows * length * config.n_kv_heads * config.head_dim * number


def measure_size(size: str, rows: int, device: torch.device, options: argparse.Namespace, peak: float) -> None:
    """Print the row of one size and batch."""
    model = random_model(SIZES[size], device, torch.bfloat16 if device.type != "cpu" else torch.float32)
    steps = options.steps
    engine = Engine(model, max_rows=rows, capacity=options.prompt + 2 * steps + 8, compile=options.compile)
    params = SamplingParams(temperature=0, max_new_tokens=2 * steps + 4)
    for _ in range(rows):
        engine.add(torch.randint(SIZES[size].vocab_size, (options.prompt,)).tolist(), params)
    for _ in range(1 + steps):  # the prompts, and kernels that are compiled
        engine.step()
    took = timed(lambda engine: [engine.step() for _ in range(steps)], engine, device).wall / steps
    read = bytes_a_step(model, rows, options.prompt + steps + steps // 2)
    rate, share = rows / took, read / took / peak
    print(f"| {size} | {rows} | {1000 * took:,.2f} | {rate:,.0f} | {read / 1e9:,.2f} | {share:.0%} |", flush=True)
    del model, engine
    gc.collect()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=["1", "8", "mixed", "even"], default=["1", "8", "mixed"])
    parser.add_argument("--shape", choices=SHAPES, default="llama-26m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="rounds that are not counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scale", type=int, default=1, help="divides all lengths")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="of a model alone, instead of beside transformers")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], help="rows, for --sizes")
    parser.add_argument("--prompt", type=int, default=512, help="tokens before the first step, for --sizes")
    parser.add_argument("--steps", type=int, default=64, help="steps that are timed, for --sizes")
    parser.add_argument("--compile", action="store_true", help="for --sizes")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    device = find_device(options.device)
    print(machine(device, options.threads, ["transformers"]))
    if options.sizes or device.type != "cpu":
        peak = copy_rate(device, seconds=1.0)
        print(f"memory reads and writes {peak / 1e9:,.0f} GB/s")
        table("size", "rows", "ms a step", "tokens/s", "GB read a step", "of the memory's speed")
        for size in options.sizes or ["1b", "7b"]:
            for rows in options.batch:
                measure_size(size, rows, device, options, peak)
        return
    table("shape", "prompts", "", "tokens/s", "its time / minillm's", "in CPU time")
    for case in options.cases:
        measure_case(case, options.shape, options.rounds, options.warmup, options.scale)


if __name__ == "__main__":
    main()
