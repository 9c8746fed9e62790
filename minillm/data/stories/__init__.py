"""The embedded corpus: a small world in text, made from a seed, and questions about it.

`write_stories(path, seed)` writes the corpus as JSON lines, the same bytes on every machine; `stories(seed)` yields
the texts; `questions(seed, n, split)` asks about them; `pairs(seed, n, split)` gives each a right and a wrong answer.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from minillm.data.stories import chinese, counting, village
from minillm.data.stories.questions import FAMILIES, READING_PLOTS, Question, is_held_out, questions, retell, tell_story
from minillm.data.stories.telling import Dice
from minillm.data.stories.unknown import UNKNOWN, Pair, pairs

N_STORIES = 23_000
N_QUESTIONS, N_PAIRS = 24_000, 16_000  # to learn from
N_HELD_OUT = 200  # of each family, to be asked
VILLAGE = (village.portrait, village.neighbours, village.traveller, village.riddle, village.walk)
# The plots of a story, by a draw from 0 to 99: the first group whose number is above it.
GROUPS = ((26, VILLAGE), (67, READING_PLOTS), (95, counting.PLOTS), (100, chinese.PLOTS))

__all__ = [
    "Pair",
    "Question",
    "is_held_out",
    "pairs",
    "questions",
    "stories",
    "write_pairs",
    "write_questions",
    "write_stories",
]


def stories(seed: int = 0, n: int = N_STORIES) -> Iterator[str]:
    """n different stories, none of them held out."""
    dice = Dice(seed)
    seen = set()
    while len(seen) < n:
        draw = dice.number(0, 99)
        group = next(plots for above, plots in GROUPS if draw < above)
        story = tell_story(dice, dice.pick(group), joiner="" if group is chinese.PLOTS else " ")
        if story.text not in seen and not is_held_out(story.text):
            seen.add(story.text)
            yield retell(dice, story)


def write_stories(path: str | Path, seed: int = 0, n: int = N_STORIES) -> None:
    """Write the corpus as JSON lines, one {"text": ...} a story."""
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in stories(seed, n))
    Path(path).write_bytes("".join(lines).encode())


def write_questions(directory: str | Path, seed: int = 0) -> None:
    """Write questions and their answers as JSON lines: train.jsonl, and of each family heldout/FAMILY.jsonl."""
    files = {"train": questions(seed, N_QUESTIONS)}
    files |= {f"heldout/{name}": questions(seed + 1, N_HELD_OUT, "heldout", name) for name in FAMILIES}
    for file, asked in files.items():
        write_rows(directory, file, ({"question": said(one), "answer": f" {one.answer}"} for one in asked))


def write_pairs(directory: str | Path, seed: int = 0) -> None:
    """Write pairs of answers as `write_questions` does; what nobody knows is a family too."""
    files = {"train": pairs(seed, N_PAIRS)}
    files |= {f"heldout/{name}": pairs(seed + 1, N_HELD_OUT, "heldout", name) for name in (*FAMILIES, UNKNOWN)}
    for file, found in files.items():
        write_rows(directory, file, map(pair_row, found))


def pair_row(pair: Pair) -> dict[str, str]:
    """A row of a file of pairs."""
    asked, rejected = pair
    return {"prompt": said(asked), "chosen": f" {asked.answer}", "rejected": f" {rejected}"}


def said(asked: Question) -> str:
    """A question as it is put: after its story."""
    return f"{asked.context} {asked.question}".strip()


def write_rows(directory: str | Path, name: str, rows: Iterable[dict[str, str]]) -> None:
    """Write directory/name.jsonl. Before an answer is a space, so that its tokens are those it has in the stories."""
    path = Path(directory) / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
