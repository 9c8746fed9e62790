"""Rows of metrics: written as a run goes, dropped where it is resumed before them, timed by one clock."""

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from minillm.files import explained, write_atomically
from minillm.log.messages import LOGGER, TERMINAL

# Files of rows beside metrics.jsonl, and whether trackers get those rows too.
NOTES = {"norms": True, "spikes": False}


class Tracker(Protocol):
    """Is told the rows of a run. What it raises is reported once, and ends nothing but itself."""

    name: str

    def begin(self, step: int) -> None:
        """The run begins, or goes on, after this step: rows told earlier of later steps no longer count."""

    def write(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class RunLog:
    """Where a run reports its steps: a progress bar on standard error, and metrics.jsonl, one JSON object a row.

    Opening the file at a step drops the rows past that step and a last row that a crash cut short, so that a resumed
    run continues the file that an uninterrupted one would have written. Without a path there is only the bar.
    Trackers are told the same rows; one that fails is told no more, and the training goes on.
    """

    def __init__(
        self,
        metrics: str | Path | None,
        step: int,
        steps: int,
        show: bool = True,
        trackers: Sequence[Tracker] = (),
    ):
        self.path = Path(metrics) if metrics else None
        self.last: dict[str, Any] = {}  # the newest row
        if self.path:
            kept = drop_rows_past(self.path, step)
            self.last = kept[-1] if kept else {}
            for name in NOTES:
                if self.path.with_name(f"{name}.jsonl").exists():
                    drop_rows_past(self.path.with_name(f"{name}.jsonl"), step)
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
        self.trackers = list(trackers)
        self.tell("begin", step)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        self.tell("close")

    def advance(self) -> None:
        """Move the bar by a step."""
        self.bar.update(1)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row to the file, whole, and show its loss and speed; a validation gets a line of its own."""
        self.last = row = finite(row)
        if self.path:
            append_row(self.path, row)
        self.tell("write", row)
        if self.bar.disable:
            return
        loss = "none" if row["loss"] is None else f"{row['loss']:.3f}"
        self.bar.set_postfix_str(f"loss {loss}, {row['tokens_per_second']:,.0f} tokens/s", refresh=False)
        if row.get("val_loss") is not None:
            bpb = f", {row['val_bpb']:.3f} bits per byte" if row.get("val_bpb") is not None else ""
            LOGGER.info("step %d: train loss %s, val loss %.4f%s", row["step"], loss, row["val_loss"], bpb)

    def note(self, name: str, row: dict[str, Any]) -> None:
        """Append a row to another file beside the metrics, one of NOTES."""
        row = finite(row)
        if self.path:
            append_row(self.path.with_name(f"{name}.jsonl"), row)
        if NOTES[name]:
            self.tell("write", row)

    def tell(self, what: str, *words: Any) -> None:
        """Begin, write or close at each tracker, and do without the ones that fail."""
        for tracker in list(self.trackers):
            try:
                getattr(tracker, what)(*words)
            except Exception as error:  # whatever it is, it is no reason to lose a run
                self.trackers.remove(tracker)
                said = str(error).partition("\n")[0] or type(error).__name__
                LOGGER.warning("%s failed and gets no more rows; the training goes on: %s", tracker.name, said)


def finite(row: dict[str, Any]) -> dict[str, Any]:
    """The row with null for each number that is not finite, which JSON does not have."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a line to a file of rows."""
    with explained(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def drop_rows_past(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep a file's rows up to a step, and return them."""
    kept = [row for row in read_metrics(path) if row["step"] <= step]
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    return kept


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

    def __init__(self, tokens: int = 0, flops_per_token: float = 0.0, peak_flops: float = 0.0):
        self.last = self.seconds = self.marked_seconds = 0.0
        self.waited = self.marked_waited = 0.0
        self.first_tokens = self.marked_tokens = tokens
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time the block."""
        start = time.perf_counter()
        yield
        self.last = time.perf_counter() - start
        self.seconds += self.last

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time a part of a block in which nothing is computed, because the next batch is not there yet."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def speed(self, tokens: int) -> dict[str, float | None]:
        """Since the last call: tokens_per_second, mfu (None where the peak is not known), loader_wait (a share)."""
        seconds = max(self.seconds - self.marked_seconds, 1e-9)
        rate = (tokens - self.marked_tokens) / seconds
        mfu = round(rate * self.flops_per_token / self.peak_flops, 4) if self.peak_flops else None
        loader_wait = round((self.waited - self.marked_waited) / seconds, 4)
        self.marked_seconds, self.marked_waited, self.marked_tokens = self.seconds, self.waited, tokens
        return {"tokens_per_second": round(rate, 1), "mfu": mfu, "loader_wait": loader_wait}

    def mean_rate(self, tokens: int) -> float:
        """Tokens per second since the clock was made."""
        return (tokens - self.first_tokens) / max(self.seconds, 1e-9)
