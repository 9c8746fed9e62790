"""The curves of a run: in the terminal, and as a picture."""

import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm.files import write_atomically


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


# --- as a picture -----------------------------------------------------------------------------------------------------

TRAIN, INK, FAINT = "#2f6db5", "#30363d", "#d9dde2"
PANELS = (
    ("lr", "learning rate", "linear"),
    ("grad_norm", "gradient norm", "log"),
    ("tokens_per_second", "tokens/s", "linear"),
)
REJECTED = "#c23b4b"
PREFERENCES = (  # of runs that have them: a title, and keys, each with its color and how it is drawn
    (
        "log p: chosen, rejected (red)",  # dashed: the reference
        {
            "logprobs_chosen": (TRAIN, "-"),
            "logprobs_rejected": (REJECTED, "-"),
            "reference_logprobs_chosen": (TRAIN, "--"),
            "reference_logprobs_rejected": (REJECTED, "--"),
        },
    ),
    (
        "rewards, margin (black)",
        {"rewards_chosen": (TRAIN, "-"), "rewards_rejected": (REJECTED, "-"), "margin": (INK, "-")},
    ),
    ("share told apart", {"preference_accuracy": (TRAIN, "-"), "label_accuracy": (TRAIN, "-")}),
    ("KL to the reference", {"kl": (TRAIN, "-")}),
)
VAL = ("#e07b39", "#3c9d6e", "#a34fa3", "#c23b4b", "#8a6d3b", "#4aa3b8")


def plot_curves(rows: Iterable[dict[str, Any]], path: str | Path) -> None:
    """Draw the rows of a metrics.jsonl: the losses large, below them learning rate, gradient norm and speed.

    Of preferences there is one more line of panels: log-probabilities, those of the reference dashed, rewards, accuracy
    and KL; dots are of what is held out.

    Raises ValueError where matplotlib is missing. The file is whole or not there.
    """
    try:
        from matplotlib.figure import Figure  # and not pyplot, which keeps every figure of the process
    except ImportError:
        raise ValueError(f"{path}: drawing needs the package matplotlib: pip install 'minillm[plot]'") from None
    rows = list(rows)
    compares = any("logprobs_chosen" in row for row in rows)
    figure = Figure(figsize=(14, 10) if compares else (10, 7), dpi=120, layout="constrained")
    grid = figure.add_gridspec(2 + compares, 12, height_ratios=(2, 1, 1)[: 2 + compares])
    plot_losses(figure.add_subplot(grid[0, :]), rows)
    for place, (title, keys) in enumerate(PREFERENCES if compares else ()):
        plot_preferences(figure.add_subplot(grid[1, 3 * place : 3 * place + 3]), rows, title, keys)
    for place, (key, title, scale) in enumerate(PANELS):
        axes, points = figure.add_subplot(grid[-1, 4 * place : 4 * place + 4]), points_of(rows, key)
        scale = scale if is_positive(points) else "linear"
        style(axes, title, scale)
        draw_line(axes, points)
        if scale == "linear":
            axes.set_ylim(bottom=0)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomically(path, picture.getvalue())


def plot_losses(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Training loss, each step faint and its running mean over it; validation losses with their last value."""
    names = sorted({key for row in rows for key in row if key == "val_loss" or key.startswith("val_loss/")})
    points = [point for name in ("loss", *names) for point in points_of(rows, name)]
    style(axes, "loss (nats)", "log" if is_positive(points) else "linear")
    draw_line(axes, points_of(rows, "loss"), "train")
    for name, color in zip(names, itertools.cycle(VAL)):
        points = points_of(rows, name)
        if points:
            label = "val" + name.removeprefix("val_loss").replace("/", " ")
            axes.plot(*zip(*points), color=color, marker="o", markersize=4, linewidth=1.4, label=label)
            text = {"textcoords": "offset points", "color": color, "fontsize": 9, "va": "center"}
            axes.annotate(f"{points[-1][1]:.3f}", points[-1], xytext=(6, 0), **text)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=INK)
    axes.set_xlabel("step", color=INK, fontsize=9)


def plot_preferences(axes: Any, rows: Sequence[dict[str, Any]], title: str, keys: Mapping[str, tuple]) -> None:
    """Running means over the steps, and dots where pairs that are held out were evaluated."""
    style(axes, title, "linear")
    for key, (color, line) in keys.items():
        if points := points_of(rows, key):
            steps, values = zip(*points)
            axes.plot(steps, running_mean(values, len(values) // 40), color=color, linestyle=line, linewidth=1.4)
        if points := points_of(rows, f"val_{key}"):
            axes.plot(*zip(*points), color=color, marker="o", markersize=4, linestyle="none")


def style(axes: Any, title: str, scale: str) -> None:
    """A quiet frame: a title on the left, a faint grid, plain numbers."""
    axes.set_title(title, loc="left", color=INK, fontsize=10)
    axes.set_yscale(scale)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8, length=0, which="both")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(FAINT)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter(lambda x, _: f"{x:,.0f}" if x >= 1000 else f"{x:g}")
    if scale == "log":
        axes.yaxis.set_minor_formatter("{x:g}")


def draw_line(axes: Any, points: Sequence[tuple[int, float]], label: str | None = None) -> None:
    """The points faint, and over them their running mean."""
    if points:
        steps, values = zip(*points)
        axes.plot(steps, values, color=TRAIN, linewidth=0.8, alpha=0.3)
        axes.plot(steps, running_mean(values, len(values) // 40), color=TRAIN, linewidth=1.6, label=label)


def points_of(rows: Iterable[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of the rows that have the key."""
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def is_positive(points: Sequence[tuple[int, float]]) -> bool:
    """Whether a logarithmic axis can show them."""
    return bool(points) and min(value for _, value in points) > 0


def running_mean(values: Sequence[float], reach: int) -> list[float]:
    """The mean of each value and its neighbours, at most `reach` on each side; fewer at the start, which is steep."""
    sums = [0.0, *itertools.accumulate(values)]
    means = []
    for i in range(len(values)):
        near = min(reach, i // 8)
        first, end = i - near, min(i + near + 1, len(values))
        means.append((sums[end] - sums[first]) / (end - first))
    return means
