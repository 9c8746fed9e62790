"""How likely two answers are while a model learns to prefer one: the figure of docs/preferences.md.

    python benchmarks/falling.py runs/quickstart-sft [--steps 60] [--lr 3e-4] [--out docs/images]

The run is that of `python sft.py`. It knows the answers, but not the way in which they are given here, TOLD, which is
the same in both answers of a pair: what tells them apart is one word. Every pair is seen once, so what is drawn of a
step was found before anything was learned from its pairs.
"""

import argparse
import copy
import json
import tempfile
from pathlib import Path
from statistics import fmean

import torch
from torch import nn

import minillm
from minillm.data.chat_templates import TEMPLATES
from minillm.data.config import PreferencesConfig
from minillm.data.loader import Loader
from minillm.data.preference_store import open_preferences
from minillm.data.stories import pairs
from minillm.data.trees import PairsConfig
from minillm.preference import Frozen, Preference

TOLD, WEIGHTS, SEQ_LEN, ROWS = " {}, they say.", (0.0, 0.2, 1.0), 256, 8
SHOWN = {
    "logprobs_chosen": "log p, chosen",
    "logprobs_rejected": "log p, rejected",
    "margin": "margin",
    "preference_accuracy": "preference accuracy",
    "ranking_accuracy": "ranking accuracy",
}
LAST = 10  # steps that figures are means over


def write_rows(path: Path, n: int) -> None:
    """Questions about stories, with a right and a wrong answer in words that the model has not met."""
    rows = [
        {
            "prompt": f"{pair.question.context} {pair.question.question}",
            "chosen": TOLD.format(pair.question.answer),
            "rejected": TOLD.format(pair.rejected),
        }
        for pair in pairs(0, n, family="reading")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train(model: nn.Module, loader: Loader, steps: int, lr: float, sft_weight: float) -> list[dict[str, float]]:
    """The metrics of each step."""
    policy, reference = copy.deepcopy(model).train(), Frozen(copy.deepcopy(model))
    objective = Preference("dpo", reference, sft_weight=sft_weight)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0)
    found = []
    for step in range(steps):
        [batch] = loader.batches(step * ROWS)
        loss_sum, metrics = objective(policy, batch)
        optimizer.zero_grad()
        (loss_sum / objective.count(batch)).backward()
        optimizer.step()
        found.append({name: float(total) / float(count) for name, (total, count) in metrics.items()})
    return found


def draw(curves: dict[float, list[dict[str, float]]], path: Path) -> None:
    """A panel a weight: log-probabilities of both answers, by steps."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.hashsalt": path.name, "svg.fonttype": "none"}  # the same file each time; text as text
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, (weight, found) in zip(figure.subplots(1, len(curves), sharey=True), curves.items()):
        for name, color in (("logprobs_chosen", "#2f6db5"), ("logprobs_rejected", "#c23b4b")):
            axes.plot([row[name] for row in found], color=color, label=name.removeprefix("logprobs_"))
            axes.plot([row[f"reference_{name}"] for row in found], color=color, linestyle="--", linewidth=0.8)
        axes.set(title=f"sft_weight {weight:g}", xlabel="step")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("log-probability of an answer, nats")
    figure.axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    options = parser.parse_args(arguments)
    model, tokenizer = minillm.load(options.run)
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder, "pairs.jsonl"), 50 * options.steps)
        data = PreferencesConfig(path=f"{folder}/pairs.jsonl", seq_len=SEQ_LEN, val="0", cache_dir=folder)
        sources = open_preferences(data, PairsConfig(), TEMPLATES["plain"], tokenizer)
        fields = {"seq_len": SEQ_LEN, "packing": True, "micro_batch_size": ROWS, "samples_per_step": ROWS, "seed": 0}
        loader = Loader(sources, **fields, prefetch=False)
        curves = {weight: train(model, loader, options.steps, options.lr, weight) for weight in WEIGHTS}
    print(f"| sft_weight | {' | '.join(SHOWN.values())} |\n|{'---|' * (len(SHOWN) + 1)}")
    for weight, found in curves.items():
        last = {name: fmean(row[name] for row in found[-LAST:]) for name in SHOWN}
        print(f"| {weight:g} | {' | '.join(f'{value:.2f}' for value in last.values())} |")
    draw(curves, options.out / "falling.svg")


if __name__ == "__main__":
    main()
