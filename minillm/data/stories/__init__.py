"""The embedded corpus: a small world in text, made from a seed, and questions about it.

`write_stories(path, seed)` writes the corpus as JSON lines, the same bytes on every machine; `stories(seed)` yields
the texts; `questions(seed, n, split)` asks about them.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from minillm.data.stories import chinese, counting, village
from minillm.data.stories.questions import FAMILIES, READING_PLOTS, Question, is_held_out, questions, retell, tell_story
from minillm.data.stories.telling import Dice

N_STORIES = 23_000
N_QUESTIONS, N_HELD_OUT = 24_000, 200  # to learn from, and of each family to be asked
VILLAGE = (village.portrait, village.neighbours, village.traveller, village.riddle, village.walk)
# The plots of a story, by a draw from 0 to 99: the first group whose number is above it.
GROUPS = ((26, VILLAGE), (67, READING_PLOTS), (95, counting.PLOTS), (100, chinese.PLOTS))

__all__ = ["Question", "is_held_out", "questions", "stories", "write_questions", "write_stories"]


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
    files = {"train.jsonl": questions(seed, N_QUESTIONS)}
    files |= {f"heldout/{name}.jsonl": questions(seed + 1, N_HELD_OUT, "heldout", name) for name in FAMILIES}
    for file, asked in files.items():
        path = Path(directory) / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes("".join(map(question_line, asked)).encode())


def question_line(asked: Question) -> str:
    """A row of such a file; before an answer is a space, so that its tokens are those that it has in the stories."""
    question = f"{asked.context} {asked.question}".strip()
    return json.dumps({"question": question, "answer": f" {asked.answer}"}, ensure_ascii=False) + "\n"
