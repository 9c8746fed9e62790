"""Who else is told the rows of a run: TensorBoard, Weights & Biases, the picture of its curves.

A tracker is handed rows as they are written, and knows nothing of training; the trainer knows nothing of trackers.
"""

import importlib.util
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minillm.files import read_json, write_atomically
from minillm.log.config import LogConfig
from minillm.log.curves import plot_curves
from minillm.log.messages import LOGGER
from minillm.log.rows import Tracker, read_metrics

WANDB_SECONDS = 20  # how long its server may take to answer before the run is kept on this machine
PICTURE_SECONDS = 60  # drawing takes half a second


def make_trackers(config: LogConfig, directory: str | Path) -> list[Tracker]:
    """The trackers that the section asks for. Raises ValueError naming the extra where a package is missing.

    Nothing is written before they begin. Args: directory: the run's, where they keep their files.
    """
    directory = Path(directory)
    trackers: list[Tracker] = []
    if config.curves and importlib.util.find_spec("matplotlib"):
        trackers.append(CurvesPicture(directory / "curves.png"))
    if config.tensorboard:
        need("tensorboard", "log.tensorboard")
        trackers.append(TensorBoard(directory / "tensorboard"))
    if config.wandb is not None:
        need("wandb", "log.wandb")
        trackers.append(WeightsAndBiases(config.wandb, directory))
    return trackers


def need(package: str, field: str) -> None:
    """Raises ValueError where the package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{field}: the package {package} is not installed: pip install 'minillm[track]'")


def numbers(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numeric values of a row, whatever their names, but for the step."""
    for key, value in row.items():
        if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
            yield key, value


class TensorBoard:
    """Event files that `tensorboard --logdir runs` shows."""

    name = "TensorBoard"

    def __init__(self, directory: Path):
        self.directory = directory

    def begin(self, step: int) -> None:
        """Continue the events; TensorBoard hides earlier ones of the steps that come again."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.directory), purge_step=step + 1 if step else None)

    def write(self, row: dict[str, Any]) -> None:
        """Write each number of a row, to the disk at once: rows are few."""
        for key, value in numbers(row):
            self.writer.add_scalar(key, value, row["step"])
        self.writer.flush()

    def close(self) -> None:
        """End the file."""
        self.writer.close()


class WeightsAndBiases:
    """A run of a W&B project, in RUN/wandb; on this machine alone where the server or a login is missing.

    A run keeps its id, so that a resumed one continues the same curves. Rows have `step` as their x axis instead of
    W&B's own counter, which refuses to go back: rows that are told again after a crash lie on those told before.
    """

    name = "W&B"

    def __init__(self, project: str, directory: Path):
        self.project, self.directory = project, directory

    def begin(self, step: int) -> None:
        """Open the run, online where that is possible."""
        import wandb

        mode = os.environ.get("WANDB_MODE", "online")
        if mode == "online" and not wandb.login(
            prompt=False, verify=False
        ):  # asking would hold up a run that nobody watches
            LOGGER.info("W&B: nobody is logged in (`wandb login`)")
            mode = "offline"
        try:
            self.run = self.open(mode)
        except wandb.Error as error:
            if mode != "online":
                raise
            LOGGER.warning("W&B: its server cannot be used: %s", str(error).partition("\n")[0])
            wandb.teardown()  # the failed attempt still holds the id
            mode, self.run = "offline", self.open("offline")
        self.run.define_metric("*", step_metric="step")
        if mode == "offline":
            folder = Path(self.run.dir).parent
            LOGGER.info("W&B: nothing is lost, the rows are kept in %s; later: wandb sync %s", folder, folder)
        elif mode == "online":
            LOGGER.info("W&B: %s", self.run.url)

    def open(self, mode: str) -> Any:
        """A run of that mode under the id of this directory."""
        import wandb

        return wandb.init(
            project=self.project,
            id=self.run_id(),
            name=self.directory.name,
            resume="allow",
            mode=mode,
            dir=str(self.directory),
            config=read_json(self.directory / "config.json"),
            settings=wandb.Settings(silent=True, console="off", init_timeout=WANDB_SECONDS),
        )

    def run_id(self) -> str:
        """The id of the run, made at its first start."""
        path = self.directory / "wandb-id"
        if not path.exists():
            write_atomically(path, secrets.token_hex(4) + "\n")
        return path.read_text(encoding="utf-8").strip()

    def write(self, row: dict[str, Any]) -> None:
        """Hand over the numbers of a row."""
        self.run.log({"step": row["step"], **dict(numbers(row))})

    def close(self) -> None:
        """Send what is not sent yet."""
        self.run.finish()


class CurvesPicture:
    """curves.png, drawn anew about once a minute and at the end."""

    name = "curves.png"

    def __init__(self, path: Path):
        self.path, self.rows, self.drawn_at = path, [], 0.0

    def begin(self, step: int) -> None:
        """Take up the rows that the run has written before."""
        self.rows = read_metrics(self.path.with_name("metrics.jsonl"))
        self.drawn_at = time.monotonic()

    def write(self, row: dict[str, Any]) -> None:
        """Remember a row of metrics, and draw where the picture is old."""
        if "loss" in row:
            self.rows.append(row)
        if time.monotonic() - self.drawn_at > PICTURE_SECONDS:
            self.close()

    def close(self) -> None:
        """Draw."""
        plot_curves(self.rows, self.path)
        self.drawn_at = time.monotonic()
