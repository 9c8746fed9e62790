"""What is compared of two runs, and the one line that a run which fails says."""

from collections.abc import Callable
from pathlib import Path

from minillm.log import read_metrics

COMPARED = ("step", "tokens", "loss", "lr", "grad_norm")


def losses(directory: str | Path) -> list[dict]:
    """The rows of a run's metrics, without what depends on the clock."""
    rows = read_metrics(Path(directory) / "metrics.jsonl")
    return [{key: row[key] for key in row if key in COMPARED or key.startswith("val_")} for row in rows]


def failure(capsys, run: Callable[..., int], *words) -> str:
    """The line that a command fails with."""
    capsys.readouterr()
    assert run(*words) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error[error.index("error: ") :]
