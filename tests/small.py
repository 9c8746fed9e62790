"""A text and a config of train.py that together take a second."""

import random
from pathlib import Path

SMALL = """
[run]
dir = "runs/small"
[tokenizer]
kind = "byte"
[data]
path = "text.txt"
val = 0.1
seq_len = 32
document = "line"
[model]
dim = 32
n_layers = 2
n_heads = 2
ffn_dim = 64
max_seq_len = 64
dropout = 0.1
[optim]
lr = 1e-2
[train]
max_steps = 12
batch_tokens = 256
micro_batch_size = 4
save_every = 5
eval_every = 6
[log]
every = 1
samples = 0
curves = false
"""


def write_small(directory: Path) -> None:
    """Write both there: `text.txt`, a sentence a line, and `small.toml`."""
    words = random.Random(0).choices("the a cat dog sat ran on under mat hill and then it slept".split(), k=2500)
    (directory / "text.txt").write_text("\n".join(" ".join(words[i : i + 12]) for i in range(0, 2500, 12)))
    (directory / "small.toml").write_text(SMALL)
