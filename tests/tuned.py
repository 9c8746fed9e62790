"""A model that knows nothing, a config of a run that tunes it in a second, and what is compared of two models."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

import minillm
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tokenizer import ByteTokenizer

WORDS = ("red", "blue", "green", "black")  # answers to as many questions


def config_of(path: str, own: str) -> str:
    """The config of a run on the rows of a file, with the section of what is learned."""
    return f"""
[run]
dir = "runs/tuned"
device = "cpu"
[model]
path = "base"
[data]
path = "{path}"
val = "held.jsonl"
seq_len = 64
[optim]
lr = 1e-2
[train]
max_steps = 6
batch_tokens = 256
micro_batch_size = 2
save_every = 3
eval_every = 3
{own}
[log]
every = 1
samples = 1
curves = false
"""


def write_base(directory: Path) -> None:
    """Write the model there, as `base`."""
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    shape = ModelConfig(vocab_size=tokenizer.vocab_size, dim=32, n_layers=2, n_heads=2, ffn_dim=64, max_seq_len=64)
    minillm.save(Transformer(shape), tokenizer, directory / "base")


def question(number: int) -> str:
    """One of four questions, in one of three wordings; its answer is that of the same number in `WORDS`, modulo 4."""
    return f"{number % 4}?" + " so" * (number % 3)


def write_rows(path: str | Path, rows: Iterable[Mapping]) -> None:
    """Write a .jsonl."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def weights(directory: str | Path) -> dict[str, torch.Tensor]:
    """The weights of the model of a run or folder, by name."""
    return minillm.load(directory)[0].state_dict()


def same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> bool:
    """Whether weights are equal, bit for bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
