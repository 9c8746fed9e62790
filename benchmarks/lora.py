"""LoRA beside peft's: time and peak memory of a training step on one core, and what training takes with and without.

    PYTHONPATH=. python benchmarks/lora.py

So that adapters alone are compared, peft's layers are put into minillm's model, of a 26M shape: both train the same
weights at the same rank on the same layers and tokens. Steps are interleaved; times are medians of ratios of CPU time.
Memory is the peak of all tensors alive, counted at every operation as in tests/live.py.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.append(str(Path(__file__).parent.parent / "tests"))  # where the memory is counted the same way

from live import Live

from minillm.lora import LoRAConfig, apply_lora
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer

SHAPE = {"vocab_size": 6400, "dim": 512, "n_heads": 8, "n_kv_heads": 2, "ffn_dim": 1408, "max_seq_len": 512}
KINDS = {"LoRA": {}, "rsLoRA": {"rslora": True}, "DoRA": {"dora": True}}
R, ALPHA = 8, 16.0
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def ours(config: ModelConfig, kind: str) -> Transformer:
    return apply_lora(Transformer(config), LoRAConfig(r=R, alpha=ALPHA, **KINDS[kind]))


def with_their_layers(config: ModelConfig, kind: str) -> nn.Module:
    """Peft's layers in minillm's model: but for the adapters the step is the same."""
    import peft

    lora = peft.LoraConfig(
        r=R, lora_alpha=ALPHA, target_modules=LAYERS, use_rslora=kind == "rsLoRA", use_dora=kind == "DoRA"
    )
    return peft.inject_adapter_in_model(lora, Transformer(config))


def step_of(model: nn.Module, tokens: torch.Tensor) -> Callable[[], None]:
    """One step of AdamW on what is trained."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        logits = model(tokens)
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds(step: Callable[[], None]) -> float:
    """Of the processor, on one thread: what else runs on the machine does not count."""
    begin = time.process_time()
    step()
    return time.process_time() - begin


def peak(make: Callable[[], nn.Module], tokens: torch.Tensor) -> int:
    """Bytes of the second step, when all that the optimizer holds is there."""
    with Live() as live:
        step = step_of(make(), tokens)
        for _ in range(2):
            live.peak = 0
            step()
    return live.peak


def beside_peft(config: ModelConfig, tokens: torch.Tensor, rounds: int) -> None:
    print("| | its step / minillm's | MB: minillm | peft |\n|---|---|---|---|")
    for kind in KINDS:
        makes = [partial(ours, config, kind), partial(with_their_layers, config, kind)]
        steps = [step_of(make(), tokens) for make in makes]
        times = [[seconds(step) for step in steps] for _ in range(rounds + 1)][1:]
        ratio = statistics.median(theirs / mine for mine, theirs in times)
        memory = [peak(make, tokens) / 1e6 for make in makes]
        print(f"| {kind} | {ratio:.2f} | {memory[0]:.1f} | {memory[1]:.1f} |", flush=True)


def memory_table(config: ModelConfig, tokens: torch.Tensor) -> None:
    """What a step takes at its peak, and what is held between two."""
    configs = {
        "all weights": LoRAConfig(),
        "LoRA": LoRAConfig(r=R, alpha=ALPHA),
        "LoRA, base in bf16": LoRAConfig(r=R, alpha=ALPHA, base_precision="bf16"),
        "DoRA, base in bf16": LoRAConfig(r=R, alpha=ALPHA, base_precision="bf16", dora=True),
    }
    print("| | trained | MB: weights | gradients and moments | peak of a step |\n|---|---|---|---|---|")
    for name, lora in configs.items():

        def make(lora: LoRAConfig = lora) -> Transformer:
            return apply_lora(Transformer(config), lora)

        made = make()
        trained = sum(p.numel() for p in made.parameters() if p.requires_grad)
        weights = sum(p.nbytes for p in made.parameters()) / 1e6
        del made
        top = peak(make, tokens) / 1e6
        print(f"| {name} | {trained:,} | {weights:.1f} | {trained * 12 / 1e6:.1f} | {top:.1f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = ModelConfig(**SHAPE, n_layers=options.layers)
    rows = torch.randint(SHAPE["vocab_size"], (options.rows, options.length))
    memory_table(shape, rows)
    print()
    beside_peft(shape, rows, options.rounds)
