"""What a script shows at the end of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

from minillm.eval.answers import Answered
from minillm.generate.generate import stream
from minillm.generate.params import SamplingParams
from minillm.log import curve, read_metrics
from minillm.model.transformer import Transformer
from minillm.run import RunDirectory
from minillm.tokenizer import Tokenizer

WIDTH = 160  # characters of a question, and of an answer
PREFERENCES = {  # what is summed up of preferences: in words, and as which number
    "preference_accuracy": ("chosen over rejected, by reward", ".1%"),
    "label_accuracy": ("answers rewarded as labelled", ".1%"),
    "ranking_accuracy": ("chosen likelier than rejected", ".1%"),
    "rewards_chosen": ("reward of a chosen answer", ".3f"),
    "rewards_rejected": ("reward of a rejected answer", ".3f"),
    "margin": ("margin between the rewards", ".3f"),
    "kl": ("distance from the reference, k2, nats a token", ".3f"),
    "answer_length": ("characters of an answer", ".1f"),
}
WIDEST = max(len(words) for words, _ in PREFERENCES.values())
HEADINGS = {"majority": "most common answer", "before": "before", "after": " after"}


def show_samples(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[tuple[str, list[int]]], seed: int) -> None:
    """What the model makes of some beginnings, each with the name of its source, as it makes it."""
    model.eval()
    for name, prompt in prompts:
        label = f"{name}: " if name else ""
        print(f"\n  {label}{tokenizer.decode(prompt)} ▸ ", end="", flush=True)
        new_tokens = min(160, model.config.max_seq_len - len(prompt))
        params = SamplingParams(max_new_tokens=new_tokens, temperature=0.7, top_p=0.95, seed=seed)
        for piece in stream(model, tokenizer, prompt, params):
            print(piece, end="", flush=True)
        print()


def show_stop(summary: Mapping[str, Any]) -> None:
    """What ended a run before its end, and how it goes on."""
    print(f"\nstopped by {summary['stopped_by']} at step {summary['step']}; continue with --run.resume auto")


def show_answers(
    summary: Mapping[str, Any], metrics: Sequence[str], answered: Sequence[Answered], samples: int
) -> None:
    """Some held-out questions with their answers, and a table of each metric: of each file, before and after."""
    step = max(1, len(answered) // max(1, samples))
    for one in answered[::step][:samples]:
        print(f"\n  {answer_line(one)}")
    for metric in metrics if answered else ():
        sides = summary[metric]
        columns = [when for when in ("majority", "before", "after") if when in sides]
        rows = {name: [sides["files"][when][name] for when in columns] for name in sides["files"]["after"]}
        rows |= {"all": [sides[when] for when in columns]} if len(rows) > 1 else {}
        width = max(map(len, rows))
        headings = [HEADINGS[when] for when in columns]
        print(f"\n{metric.replace('_', ' ')} on {len(answered)} held-out questions")
        print(f"  {'':{width}}  {'  '.join(headings)}")
        for name, values in rows.items():
            print(f"  {name:{width}}  " + "  ".join(f"{value:{len(h)}.1%}" for value, h in zip(values, headings)))


def show_preferences(summary: Mapping[str, Any]) -> None:
    """A table of what was found of held-out pairs, and of the answers to them, before and after."""
    rows = [(words, summary[name], form) for name, (words, form) in PREFERENCES.items() if name in summary]
    if rows:
        print(f"\n  {'':{WIDEST}}   before    after")
    for words, sides, form in rows:
        cells = [format(sides[when], form) if when in sides else "" for when in ("before", "after")]
        print(f"  {words:{WIDEST}}  " + "  ".join(f"{cell:>7}" for cell in cells))
    if "win_rate" in summary:
        print(f"  the later answer is the better one: {summary['win_rate']:.1%}, ties being half")


def answer_line(one: Answered) -> str:
    """The end of a question, what was answered, and what was expected, on one line."""
    question, *replies = (" ".join(text.split()) for text in (one.prompt, one.answer, one.expected))
    question = question if len(question) <= WIDTH else f"...{question[-WIDTH:]}"
    answer, expected = (reply if len(reply) <= WIDTH else f"{reply[:WIDTH]}..." for reply in replies)
    return f"{question} ▸ {answer}   (expected: {expected})"


def show_figures(run: RunDirectory, summary: dict[str, Any], sources: Sequence[str], best: bool = False) -> None:
    """The loss curve and the figures of the summary: of the whole, of each source, and of the best step if asked."""
    print(f"\n{curve(read_metrics(run.metrics))}\n")
    val = ""
    if summary.get("val_loss") is not None:
        val = f", val loss {loss_and_bytes(summary)}"
    print(
        f"{run.path}: {summary['tokens']:,} tokens in {summary['hours'] * 60:.1f} minutes, "
        f"{summary['mean_tokens_per_second']:,.0f} tokens/s, {summary['peak_memory_bytes'] / 2**30:.1f} GiB{val}"
    )
    for name in sources:
        if summary.get(f"val_loss/{name}") is not None:
            print(f"  source {name}: val loss {loss_and_bytes(summary, f'/{name}')}")
    if best and summary["best_step"] not in (None, summary["step"]):
        words = f"val loss {summary['best_val_loss']:.4f} at step {summary['best_step']}"
        print(f"  best: {words}; minillm.load({str(run.path)!r}, step={summary['best_step']}) reads its weights")


def loss_and_bytes(summary: Mapping[str, Any], source: str = "") -> str:
    """The loss of what was held out, and how many bits a byte of it takes, if it is text."""
    bpb = summary.get(f"val_bpb{source}")
    return f"{summary[f'val_loss{source}']:.4f}" + (f" ({bpb:.3f} bits per byte)" if bpb is not None else "")
