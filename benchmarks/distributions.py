"""Draw what each parameter of SamplingParams does to one distribution: the figures of docs/decoding.md.

    python benchmarks/distributions.py [--out docs/images]

The distribution is counted: the words that follow "went" in the embedded stories. The bars are what is left of it after
`minillm.generate.filters`, the outlines what was there before. The same files come out each time.
"""

import argparse
import re
from collections import Counter
from pathlib import Path

import torch

from minillm.data.stories import stories
from minillm.generate.filters import TokenCounts, adjust_logits, filter_logits
from minillm.generate.params import SamplingParams

STORIES, WORD, SHOWN = 6000, "went", 12
PANEL, WORDS, TOP, LINE, SCALE = 280, 70, 34, 17, 300  # pixels; SCALE of them are a probability of 1
# what stands in the prompt, and what came since, for the penalties
PROMPT, NEW = ["home"], ["to", "to", "to", "for"]
FIGURES = {
    "temperature": [SamplingParams(temperature=value) for value in (0.5, 1.0, 2.0)],
    "filters": [SamplingParams(top_k=4), SamplingParams(top_p=0.8), SamplingParams(min_p=0.1)],
    "penalties": [
        SamplingParams(repetition_penalty=1.5),
        SamplingParams(presence_penalty=1.0),
        SamplingParams(frequency_penalty=1.0),
    ],
}


def words_that_follow(word: str) -> tuple[list[str], torch.Tensor]:
    """The commonest words after a word of the stories, and logits whose softmax is how often each comes."""
    found = Counter()
    for text in stories(0, STORIES):
        found.update(re.findall(rf"\b{word} ([a-z]+)", text))
    words, counts = zip(*found.most_common(SHOWN))
    logits = torch.tensor(counts, dtype=torch.float64).log()
    return list(words), (logits - logits.mean())[None]  # (1, V)


def changed(words: list[str], logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities under params, after the prompt and the new words."""
    counts = TokenCounts.empty(1, len(words))
    counts.begin(0, [words.index(word) for word in PROMPT])
    for word in NEW:
        counts.add(torch.tensor([0]), torch.tensor([words.index(word)]))
    return filter_logits(adjust_logits(logits, params, counts), params).softmax(-1)[0]


def label(params: SamplingParams) -> str:
    """The field that is not its default; temperature where all are."""
    names = [name for name in vars(params) if getattr(params, name) != getattr(SamplingParams, name)]
    return " ".join(f"{name} = {getattr(params, name):g}" for name in names or ["temperature"])


def draw_panel(left: int, words: list[str], before: list[float], after: list[float], title: str) -> list[str]:
    """The elements of one panel: a line a word, with its bar, its outline and its share."""
    elements = [f'<text x="{left + WORDS}" y="{TOP - 14}" font-weight="bold">{title}</text>']
    for line, (word, old, new) in enumerate(zip(words, before, after)):
        y, start = TOP + line * LINE, left + WORDS
        color = "#000" if new else "#aaa"
        share = f"{100 * new:.0f}%" if new else ""
        elements += [
            f'<text x="{start - 5}" y="{y + 9}" text-anchor="end" fill="{color}">{word}</text>',
            f'<rect x="{start}" y="{y}" width="{new * SCALE:.1f}" height="11" fill="#6a9bd1"/>',
            f'<rect x="{start}" y="{y}" width="{old * SCALE:.1f}" height="11" fill="none" stroke="#555"/>',
            f'<text x="{start + 5 + max(old, new) * SCALE:.1f}" y="{y + 9}" fill="#555">{share}</text>',
        ]
    return elements


def draw(words: list[str], logits: torch.Tensor, panels: list[SamplingParams]) -> str:
    """One SVG picture, a panel for each params."""
    before = logits.softmax(-1)[0].tolist()
    width, height = PANEL * len(panels), TOP + LINE * len(words) + 4
    elements = [
        element
        for number, params in enumerate(panels)
        for element in draw_panel(number * PANEL, words, before, changed(words, logits, params).tolist(), label(params))
    ]
    size = f"{width} {height}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-family="sans-serif" font-size="11">'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="#fff"/>', *elements, "</svg>", ""])


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    words, logits = words_that_follow(WORD)
    for name, panels in FIGURES.items():
        (out / f"{name}.svg").write_text(draw(words, logits, panels), encoding="utf-8")
        print(out / f"{name}.svg")


if __name__ == "__main__":
    main()
