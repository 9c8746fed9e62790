"""One run's directory: made once, held by one process, resumed by name.

config.json  tokenizer.*  metrics.jsonl  summary.json  checkpoints/step-*/
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from minillm.files import explained, locked, read_json, write_atomically


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives and what makes it repeatable."""

    dir: Annotated[str, "directory of the run"] = "runs/quickstart"
    seed: Annotated[int, "seed of weights, data order and dropout", ">= 0, < 4294967296"] = 0
    resume: Annotated[
        str, "never | auto (continue what is there, or start afresh) | PATH of a run or checkpoint to continue from"
    ] = "never"
    device: Annotated[str, "auto (the accelerator if there is one) | cpu | cuda | cuda:1 | mps | ..."] = "auto"

    def __post_init__(self):
        if not self.dir.strip():
            raise ValueError("dir: is empty; give a directory")


class RunDirectory:
    """The paths inside a run's directory."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self.before = (
            self.path / "before.json"
        )  # of a run that went on from a model: its evaluation before the first step
        self.checkpoints = self.path / "checkpoints"

    @property
    def started(self) -> bool:
        """True when a run has begun here: also where only a part of what it wrote is left."""
        rows = self.metrics.exists() and self.metrics.stat().st_size > 0
        return self.config.exists() or rows or any(self.checkpoints.glob("step-*"))

    def finished_at(self, step: int) -> bool:
        """True when the run reached its end at that step and said so: an earlier end may since have been moved."""
        summary = read_json(self.summary) if self.summary.exists() else {}
        return bool(summary.get("finished")) and summary.get("step") == step

    def rank_log(self, rank: int) -> Path:
        """Where a rank keeps its messages, where it is asked to."""
        return self.path / "logs" / f"rank-{rank:04d}.log"

    def write_json(self, path: Path, value: dict[str, Any]) -> None:
        """Write one of the JSON files, whole or not at all."""
        write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def open_run(config: RunConfig) -> Iterator[RunDirectory]:
    """Hold the run's directory while the block runs.

    Raises ValueError when it holds a run and `resume` is never, and BusyError when a live process has it. One whose
    last holder died is free at once.
    """
    run = RunDirectory(config.dir)
    if run.path.exists() and not run.path.is_dir():
        raise ValueError(f"run.dir: {run.path} is a file; give a directory")
    with explained(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
    with locked(run.path / "run.lock"):
        if run.started and not resumed_inside(run.path, config.resume):
            raise ValueError(
                f"run.dir: {run.path} holds a run already; "
                "continue it with --run.resume auto, or choose another --run.dir"
            )
        yield run


def resumed_inside(directory: Path, resume: str) -> bool:
    """Whether a run goes on in the directory that it was in: under `auto`, or from a path there."""
    if resume in ("auto", "never"):
        return resume == "auto"
    start = Path(resume).resolve()
    return directory.resolve() in (start, *start.parents)
