"""Pairs of answers to a question: one that is right, and one that a model gives instead.

A model that was only ever asked what can be known always has an answer. A quarter of these questions nobody can answer:
they ask of a stranger what is true of everybody in the village. Chosen is to say so, of all others what is right;
rejected is an answer to another question.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from minillm.data.stories import recall
from minillm.data.stories.questions import FAMILIES, Question, Split, questions
from minillm.data.stories.telling import Dice
from minillm.data.stories.world import PEOPLE

UNKNOWN = "unknown"
NOBODY_KNOWS = "nobody knows"
STRANGERS = {  # of whom the village has never heard
    "train": (
        "Anna Paul Emma Finn Rosa Karl Lena Hans Clara Oscar Eva Felix Greta Simon Jane Peter Amy Bob Cora "
        "Dan Ella Fred Gina Harry Ida Jim Kate Luke Mary Ned Olga Phil Rita Sam Tina Victor Wanda Alex Betty "
        "Carl Doris Eric Fiona Greg Helen Ian Judy Kurt Laura Mike Nina Oliver Paula Roger Sophie Toby Vera "
        "Walter"
    ).split(),
    "heldout": "Alice Frank Sara Jack Martha David Rachel Steve Monica Arthur Julia Henry".split(),
}
ASKING = r"\b(who|where|what|which|how|when|why)"  # whom and whose are who
ANSWERS = 3000  # questions whose answers are what is invented


class Pair(NamedTuple):
    """A question with the answer to give and one not to give."""

    question: Question
    rejected: str


def pairs(seed: int, n: int, split: Split = "train", family: str | None = None) -> Iterator[Pair]:
    """n pairs of a split, of one family or of all in turn, `unknown` among them.

    Raises ValueError for an unknown split or family.
    """
    dice = Dice(2 * seed + (split == "heldout"))
    known = questions(seed, n, split, None if family == UNKNOWN else family)
    families = (*FAMILIES, UNKNOWN)
    for i in range(n):
        is_known = (family or families[i % len(families)]) != UNKNOWN
        asked = next(known) if is_known else about_stranger(dice, split)
        yield Pair(asked, invented(dice, asked))


def about_stranger(dice: Dice, split: Split) -> Question:
    """What is true of everybody in the village, asked about somebody else."""
    while True:
        person = dice.pick(PEOPLE)
        question, answer = recall.ask(dice, person, split == "heldout")
        if answer != person.name:
            return Question(UNKNOWN, "", question.replace(person.name, dice.pick(STRANGERS[split])), NOBODY_KNOWS)


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
