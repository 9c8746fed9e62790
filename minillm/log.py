"""What a run says: messages, a progress bar, rows of metrics, a loss curve in the terminal."""

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tqdm import tqdm

from minillm.files import explained, write_atomically

LOGGER = logging.getLogger("minillm")


@dataclass(frozen=True)
class LogConfig:
    """What is written down while training."""

    every: Annotated[int | None, "steps between rows of metrics; none: about 200 rows a run", ">= 1"] = None
    samples: Annotated[int, "texts generated at the end of the run", ">= 0"] = 3


class TqdmHandler(logging.Handler):
    """Prints messages above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message to standard error."""
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        tqdm.write(prefix + record.getMessage(), file=sys.stderr)


def show_messages(level: int = logging.INFO) -> None:
    """Let the package's messages reach the terminal; a program that imports minillm decides for itself."""
    LOGGER.handlers[:] = [TqdmHandler()]
    LOGGER.setLevel(level)
    LOGGER.propagate = False


class MetricsLog:
    """metrics.jsonl: one JSON object a row, each flushed whole.

    Opening it at a step drops the rows past that step and a last row that a crash cut short, so that a resumed run
    continues the file that an uninterrupted one would have written.
    """

    def __init__(self, path: str | Path, step: int = 0):
        self.path = Path(path)
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row."""
        with explained(self.path):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def close(self) -> None:
        """Flush to the disk and close."""
        with explained(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line without its end, which a crash leaves, is not a row."""
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not a row of metrics: {error.msg}; remove the line") from None
    return rows


def progress(total: int, start: int, description: str, show: bool = True) -> tqdm:
    """A bar over steps on standard error: done, rate and time left, with figures set by `set_postfix_str`."""
    layout = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
    return tqdm(
        total=total,
        initial=start,
        desc=description,
        bar_format=layout,
        dynamic_ncols=True,
        smoothing=0.05,
        disable=not show,
    )


class Clock:
    """Seconds spent in the blocks it times, and the rate of tokens since it was last asked."""

    def __init__(self, tokens: int):
        self.last = self.seconds = self.marked_seconds = 0.0
        self.first_tokens = self.marked_tokens = tokens

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time the block."""
        start = time.perf_counter()
        yield
        self.last = time.perf_counter() - start
        self.seconds += self.last

    def rate(self, tokens: int) -> float:
        """Tokens per second since the last call."""
        rate = (tokens - self.marked_tokens) / max(self.seconds - self.marked_seconds, 1e-9)
        self.marked_seconds, self.marked_tokens = self.seconds, tokens
        return rate

    def mean_rate(self, tokens: int) -> float:
        """Tokens per second since the clock was made."""
        return (tokens - self.first_tokens) / max(self.seconds, 1e-9)


def curve(rows: Iterable[dict[str, Any]], width: int = 72, height: int = 12) -> str:
    """The training loss (dots) and the validation loss (o) over steps, drawn in characters."""
    rows = list(rows)
    train = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    val = [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]
    if len(train) < 2:
        return ""
    last = max(step for step, _ in train + val)
    losses = [loss for _, loss in train + val]
    low, high = min(losses), max(losses)
    canvas = [[" "] * width for _ in range(height)]
    for points, mark in ((average(train, width), "·"), (val, "o")):
        for step, loss in points:
            row = round((high - loss) / (high - low or 1) * (height - 1))
            canvas[row][min(width - 1, int(step / last * (width - 1)))] = mark
    labels = [f"{high - (high - low) * row / (height - 1):8.3f} ┤" for row in range(height)]
    lines = [label + "".join(line).rstrip() for label, line in zip(labels, canvas)]
    axis = " " * 9 + "└" + "─" * width
    return "\n".join([*lines, axis, f"{'step 0':>15}{last:>{width - 5},}    · train   o val"])


def average(points: Sequence[tuple[int, float]], width: int) -> list[tuple[int, float]]:
    """One point a column of the curve: the mean loss of the steps that fall there."""
    last = max(step for step, _ in points)
    columns: dict[int, list[tuple[int, float]]] = {}
    for step, loss in points:
        columns.setdefault(step * width // (last + 1), []).append((step, loss))
    return [(column[-1][0], sum(loss for _, loss in column) / len(column)) for column in columns.values()]


def run_command(command: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Run a command and return its exit code: 0, or 1 after one line on standard error (`--debug`: the traceback)."""
    debug = "--debug" in argv
    show_messages(logging.DEBUG if debug else logging.INFO)
    try:
        return command([word for word in argv if word != "--debug"]) or 0
    except ValueError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # the reader of our output left (`| head`): not an error; and nothing more can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
