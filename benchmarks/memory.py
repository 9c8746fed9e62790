"""The memory of a training step on each rank: that of the estimate, and that of real steps, eager, on the CPU.

    PYTHONPATH=. python benchmarks/memory.py            the peak of all tensors alive, of small models on 1 to 4 ranks
    PYTHONPATH=. python benchmarks/memory.py --held     what a rank of up to 1,024 holds of large models, to the byte

--held cuts the models by the real `parallelize`, on ranks that send nothing and in tensors that have no memory.
"""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tests"))  # where the same measurement is a test

from live import held_bytes, measured_peaks
from ranks import run_ranks

from minillm.distributed.config import Layout
from minillm.memory import Setting, estimate
from minillm.model.config import ModelConfig
from minillm.model.presets import preset
from minillm.optim import OptimConfig
from minillm.strategy import layout_name

SHAPE = {"vocab_size": 1000, "dim": 64, "n_layers": 4, "n_heads": 4, "ffn_dim": 172, "max_seq_len": 512}
DEEP = {"dim": 256, "ffn_dim": 688, "n_layers": 8}
UNTIED = {"tie_embeddings": False, "vocab_size": 8000}
FEW = {"rows": 1, "seq_len": 32}
# what dominates -> (shape, setting)
CASES = {
    "activations": ({}, {}),
    "blocks": (DEEP, FEW),
    "blocks, bf16": (DEEP, FEW | {"precision": "bf16"}),
    "blocks, two micro-batches": (DEEP, FEW | {"accumulates": True}),
    "vocabulary": (UNTIED, FEW),
    "selective checkpointing": ({"n_layers": 12}, {"activation_checkpointing": "selective"}),
    "full checkpointing": ({"n_layers": 12}, {"activation_checkpointing": "full"}),
}
LAYOUTS = [
    (Layout("ddp", 1, 1, 1), True),
    (Layout("ddp", 2, 1, 1), True),
    (Layout("fsdp", 1, 2, 1), False),
    (Layout("fsdp", 1, 2, 1), True),
    (Layout("fsdp", 1, 4, 1), True),
    (Layout("hsdp", 2, 2, 1), True),
    (Layout("ddp", 1, 1, 2), True),
    (Layout("fsdp", 1, 2, 2), True),
]
LARGE = [
    ("llama3-8b", Layout("fsdp", 1, 64, 1)),
    ("llama3-8b", Layout("hsdp", 8, 8, 1)),
    ("qwen2.5-7b", Layout("fsdp", 1, 24, 1)),
    ("llama3-70b", Layout("hsdp", 8, 64, 2)),
]
OPTIM = OptimConfig(lr=1e-3)


def peaks() -> None:
    print(f"| MB: estimate, measured | {' | '.join(CASES)} |\n|---|{'---|' * len(CASES)}")
    worst = 0.0
    for layout, reshard in LAYOUTS:
        cases = [
            (
                ModelConfig(**SHAPE | shape),
                OPTIM,
                Setting(**{"rows": 2, "seq_len": 256, "reshard_after_forward": reshard} | setting),
            )
            for shape, setting in CASES.values()
        ]
        world_size = layout.dp_replicate * layout.dp_shard * layout.tp
        cells = []
        for case, *ranks in zip(cases, *run_ranks(world_size, measured_peaks, cases, layout, seconds=1200)):
            predicted, measured = estimate(*case, layout).peak, max(ranks)
            worst = max(worst, abs(predicted / measured - 1))
            cells.append(f"{predicted / 1e6:.1f}, {measured / 1e6:.1f} ({100 * (predicted / measured - 1):+.0f}%)")
        name = layout_name(layout, reshard) if world_size > 1 else "one process"
        print(f"| {name}{f' x {world_size}' if name == 'ddp' else ''} | {' | '.join(cells)} |", flush=True)
    print(f"\nfarthest: {100 * worst:.1f}%")


def held() -> None:
    print("| model | layout | weights, gradients, moments: estimate | held |\n|---|---|---|---|")
    for model, layout in LARGE:
        config = preset(model)
        found = estimate(config, OPTIM, Setting(rows=1, seq_len=8), layout)
        predicted = ", ".join(f"{part:,}" for part in (found.weights, found.gradients, found.moments))
        (parts,) = run_ranks(1, held_bytes, config, OPTIM, layout, seconds=1200)
        name = layout_name(layout, reshard=True)
        print(f"| {model} | {name} | {predicted} | {', '.join(f'{part:,}' for part in parts)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held", action="store_true", help="what a rank holds of large models")
    (held if parser.parse_args().held else peaks)()
