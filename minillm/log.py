"""What a run says: messages, a progress bar, rows of metrics, a loss curve in the terminal."""

import json
import logging
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tqdm import tqdm

from minillm.files import explained, write_atomically

LOGGER = logging.getLogger("minillm")
# What torch's allocators say of each device. By their words, because a class of torch's own, which only some of them
# raise, would cost its import here.
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory|ALLOC_FAILED")


@dataclass(frozen=True)
class LogConfig:
    """What is written down while training."""

    every: Annotated[int | None, "steps between rows of metrics; none: about 200 rows a run", ">= 1"] = None
    samples: Annotated[int, "texts generated at the end of the run", ">= 0"] = 3


class Terminal:
    """Standard error for as long as somebody reads it: a `2>&1 | head` that has seen enough ends no training."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> None:
        """Write what can still be written."""
        with suppress(BrokenPipeError):
            sys.stderr.write(text)

    def flush(self) -> None:
        """Flush what can still be flushed."""
        with suppress(BrokenPipeError):
            sys.stderr.flush()


TERMINAL = Terminal()


class TqdmHandler(logging.Handler):
    """Prints messages above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message to standard error."""
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        tqdm.write(prefix + record.getMessage(), file=TERMINAL)


def show_messages(level: int = logging.INFO) -> None:
    """Let the package's messages reach the terminal; a program that imports minillm decides for itself."""
    LOGGER.handlers[:] = [TqdmHandler()]
    LOGGER.setLevel(level)
    LOGGER.propagate = False


class RunLog:
    """Where a run reports its steps: a progress bar on standard error, and metrics.jsonl, one JSON object a row.

    Opening the file at a step drops the rows past that step and a last row that a crash cut short, so that a resumed
    run continues the file that an uninterrupted one would have written. Without a path there is only the bar.
    """

    def __init__(self, metrics: str | Path | None, step: int, steps: int, show: bool = True):
        self.path = Path(metrics) if metrics else None
        self.last: dict[str, Any] = {}  # the newest row
        if self.path:
            kept = [row for row in read_metrics(self.path) if row["step"] <= step]
            self.last = kept[-1] if kept else {}
            write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        layout = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        options = {
            "bar_format": layout,
            "dynamic_ncols": True,
            "smoothing": 0.05,
            "mininterval": 0.1 if sys.stderr.isatty() else 30,  # seconds: a log file keeps every state of the bar
            "disable": not show,
            "file": TERMINAL,
        }
        self.bar = tqdm(total=steps, initial=step, desc="train", **options)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def advance(self) -> None:
        """Move the bar by a step."""
        self.bar.update(1)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row to the file, whole, and show its loss and speed; a validation gets a line of its own.

        JSON has no number that is not finite, so such a one is written as null.
        """
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self.last = row
        if self.path:
            with explained(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if self.bar.disable:
            return
        loss = "none" if row["loss"] is None else f"{row['loss']:.3f}"
        self.bar.set_postfix_str(f"loss {loss}, {row['tokens_per_second']:,.0f} tokens/s", refresh=False)
        if row.get("val_loss") is not None:
            bpb = f", {row['val_bpb']:.3f} bits per byte" if row.get("val_bpb") is not None else ""
            LOGGER.info("step %d: train loss %s, val loss %.4f%s", row["step"], loss, row["val_loss"], bpb)


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


class Clock:
    """Seconds spent in the blocks it times, the rate of tokens, and the share of the device's peak that they use."""

    def __init__(self, tokens: int, flops_per_token: float = 0.0, peak_flops: float = 0.0):
        self.last = self.seconds = self.marked_seconds = 0.0
        self.first_tokens = self.marked_tokens = tokens
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time the block."""
        start = time.perf_counter()
        yield
        self.last = time.perf_counter() - start
        self.seconds += self.last

    def speed(self, tokens: int) -> dict[str, float | None]:
        """tokens_per_second since the last call, and mfu (None where the peak is not known)."""
        rate = (tokens - self.marked_tokens) / max(self.seconds - self.marked_seconds, 1e-9)
        self.marked_seconds, self.marked_tokens = self.seconds, tokens
        mfu = round(rate * self.flops_per_token / self.peak_flops, 4) if self.peak_flops else None
        return {"tokens_per_second": round(rate, 1), "mfu": mfu}

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


def out_of_memory(error: Exception) -> str:
    """One line for the error of an allocator, which may have many."""
    amount = re.search(r"allocate ([\d.]+ \w+)", str(error))
    return (
        f"out of memory{f' ({amount[1]} more were needed)' if amount else ''}; to train in less, lower "
        "train.micro_batch_size, set train.activation_checkpointing to full, or choose a smaller model"
    )


def run_command(command: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Run a command and return its exit code: 0, or 1 after one line on standard error (`--debug`: the traceback)."""
    debug = "--debug" in argv
    show_messages(logging.DEBUG if debug else logging.INFO)
    try:
        return command([word for word in argv if word != "--debug"]) or 0
    except BrokenPipeError:
        # the reader of our output left (`| head`): not an error; and nothing more can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        memory = isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error))
        if debug or (isinstance(error, RuntimeError) and not memory):
            raise
        print(f"error: {out_of_memory(error) if memory else error or type(error).__name__}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
