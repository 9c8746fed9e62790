"""The only training loop."""

from minillm.trainer.config import DTYPES, Loader, TrainConfig, completed, total_steps
from minillm.trainer.loop import Trainer
from minillm.trainer.progress import NonFiniteError, Progress, Stopped, dropout_seed

__all__ = [
    "DTYPES",
    "Loader",
    "NonFiniteError",
    "Progress",
    "Stopped",
    "TrainConfig",
    "Trainer",
    "completed",
    "dropout_seed",
    "total_steps",
]
