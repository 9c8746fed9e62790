"""The embedded corpus: a small world in text, made from a seed, and questions about it.

`write_stories(path, seed)` writes the corpus as JSON lines, the same bytes on every machine; `stories(seed)` yields
the texts; `questions(seed, n, split)` asks about them.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from minillm.data.stories import chinese, counting, village
from minillm.data.stories.questions import READING_PLOTS, Question, is_held_out, questions, tell_story
from minillm.data.stories.telling import Dice, Story

N_STORIES = 22_000
VILLAGE = (village.portrait, village.neighbours, village.traveller, village.riddle, village.walk)
GROUPS = ((0.26, VILLAGE), (0.41, READING_PLOTS), (0.28, counting.PLOTS), (0.05, chinese.PLOTS))

__all__ = ["Question", "Story", "is_held_out", "questions", "stories", "tell_stories", "write_stories"]


def tell_stories(seed: int = 0, n: int = N_STORIES) -> Iterator[Story]:
    """n different stories with their plots and events, none of them held out."""
    dice = Dice(seed)
    seen = set()
    while len(seen) < n:
        draw, at = dice.number(0, 99), 0
        for share, group in GROUPS:
            at += round(100 * share)
            if draw < at:
                break
        story = tell_story(dice, dice.pick(group), joiner="" if group is chinese.PLOTS else " ")
        if story.text not in seen and not is_held_out(story.core):
            seen.add(story.text)
            yield story


def stories(seed: int = 0, n: int = N_STORIES) -> Iterator[str]:
    """The texts of n different stories."""
    return (story.text for story in tell_stories(seed, n))


def write_stories(path: str | Path, seed: int = 0, n: int = N_STORIES) -> None:
    """Write the corpus as JSON lines, one {"text": ...} a story."""
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in stories(seed, n))
    Path(path).write_bytes("".join(lines).encode())
