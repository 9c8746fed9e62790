"""Pairs of answers to a question: one that is right, and one that a model gives instead.

A model that was only ever asked what can be known always has an answer. Half of these questions nobody can answer: they
are about a stranger, or ask of a story about somebody or something that does not occur in it. Chosen is to say so, and
in the other half what is right; rejected is an answer to another question.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from minillm.data.stories import counting, recall
from minillm.data.stories.questions import (
    COUNTING,
    READING,
    READING_PLOTS,
    Question,
    Split,
    is_held_out,
    questions,
    tell_story,
)
from minillm.data.stories.telling import Dice, Story
from minillm.data.stories.world import PEOPLE

UNKNOWN = "unknown"
NOBODY_KNOWS = "nobody knows"
STRANGERS = {  # of whom the village has never heard
    "train": "Anna Paul Emma Finn Rosa Karl Lena Hans Clara Oscar Eva Felix Greta Simon Jane Peter".split(),
    "heldout": "Alice Frank Sara Jack Martha David".split(),
}
ASKING = r"\b(who|where|what|which|how|when|why)"  # whom and whose are who
ANSWERS = 3000  # questions whose answers are what is invented


class Pair(NamedTuple):
    """A question with the answer to give and one not to give."""

    question: Question
    rejected: str


def pairs(seed: int, n: int, split: Split = "train", family: str | None = None) -> Iterator[Pair]:
    """n pairs of a split: of one family, `unknown` among them, or every second of what nobody knows.

    Raises ValueError for an unknown split or family.
    """
    dice = Dice(2 * seed + (split == "heldout"))
    known = questions(seed, n, split, None if family == UNKNOWN else family)
    for i in range(n):
        if family == UNKNOWN or (family is None and i % 2):
            asked = about_stranger(dice, split) if dice.chance(0.3) else about_nothing(dice, split)
        else:
            asked = next(known)
        yield Pair(asked, invented(dice, asked))


def about_stranger(dice: Dice, split: Split) -> Question:
    """What is true of everybody in the village, asked about somebody else."""
    while True:
        person = dice.pick(PEOPLE)
        question, answer = recall.ask(dice, person, split == "heldout")
        if answer != person.name:
            return Question(UNKNOWN, "", question.replace(person.name, dice.pick(STRANGERS[split])), NOBODY_KNOWS)


def about_nothing(dice: Dice, split: Split) -> Question:
    """A question that names what does not occur in the story it is asked of: it was another story's."""
    while True:
        plots = dice.pick((READING_PLOTS, counting.PLOTS))
        heard, other = (tell_story(dice, dice.pick(plots)) for _ in range(2))
        asked = [question for names, question in naming_questions(other) if not all(n in heard.text for n in names)]
        if asked and is_held_out(heard.text) == (split == "heldout"):
            return Question(UNKNOWN, heard.text, dice.pick(asked), NOBODY_KNOWS)


def naming_questions(story: Story) -> list[tuple[list[str], str]]:
    """(what it names, the question) of each question that a story's events give."""
    return [
        ([str(value) for i, value in enumerate(event.values) if f"{{{i}}}" in wording], wording.format(*event.values))
        for event in story.events
        for (kind, _), wordings in (READING | COUNTING).items()
        if kind == event.kind
        for wording in wordings
    ]


def invented(dice: Dice, asked: Question) -> str:
    """A wrong answer of the right kind: another one that is given where the same is asked for."""
    return dice.pick([answer for answer in usual_answers()[asked_for(asked)] if answer != asked.answer])


@cache
def usual_answers() -> dict[str, list[str]]:
    """What questions that ask for the same are answered with."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for asked in questions(0, ANSWERS):
        found[asked_for(asked)].add(asked.answer)
    return {kind: sorted(answers) for kind, answers in found.items()}


def asked_for(asked: Question) -> str:
    """The word that says what is asked for: who, where, how."""
    return re.search(ASKING, asked.question, re.IGNORECASE)[0].lower()
