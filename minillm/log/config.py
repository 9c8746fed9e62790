"""The `log` section: what is written down while training, and where to."""

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class LogConfig:
    """What is written down while training."""

    every: Annotated[int | None, "steps between rows of metrics; none: about 200 rows a run", ">= 1"] = None
    samples: Annotated[int, "texts generated at the end of the run", ">= 0"] = 3
    norms_every: Annotated[
        int | None, "steps between rows of norms.jsonl, the norms of each parameter; none: no such rows", ">= 1"
    ] = None
    ranks: Annotated[bool, "each rank keeps its messages in logs/rank-0000.log and so on"] = False
    curves: Annotated[bool, "draw curves.png where matplotlib is installed (extra plot)"] = True
    tensorboard: Annotated[bool, "write the rows for TensorBoard too (extra track)"] = False
    wandb: Annotated[str | None, "project of Weights & Biases that gets the rows too (extra track)"] = None

    def __post_init__(self):
        if self.wandb is not None and not self.wandb.strip():
            raise ValueError("wandb: is empty; give the name of a project, or leave it out")
