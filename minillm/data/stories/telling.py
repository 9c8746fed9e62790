"""How a story is told: dice that fall alike everywhere, and templates with alternatives.

A template is a sentence such as "{A} [found|spotted] the {thing} {spot}[.| at last.]": one alternative of each
bracket is drawn, slots are filled as `str.format` does (so {A.his} works), sentence beginnings are capitalised.
"""

import random
import re
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
SENTENCE_START = re.compile(r'(?:^"?|[.!?] "?)[a-z]')
NUMBERS = (
    "no one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()


class Dice:
    """Draws from `random.Random.random`, the one method whose sequence Python promises never to change."""

    def __init__(self, seed: int):
        self._random = random.Random(seed).random

    def number(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return low + int(self._random() * (high - low + 1))

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self._random() * len(options))]

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def sample(self, options: Sequence[T], k: int) -> list[T]:
        """k different options, in random order."""
        pool = list(options)
        return [pool.pop(int(self._random() * len(pool))) for _ in range(k)]


@cache
def parse(template: str) -> tuple:
    """Literal strings and, for each bracket, a tuple of parsed alternatives."""
    stack: list[list[list]] = [[[]]]  # open brackets > their alternatives > parts
    for token in re.split(r"([\[\]|])", template):
        if token == "[":
            stack.append([[]])
        elif token == "|" and len(stack) > 1:
            stack[-1].append([])
        elif token == "]":
            alternatives = tuple(tuple(parts) for parts in stack.pop())
            stack[-1][-1].append(alternatives)
        elif token:
            stack[-1][-1].append(token)
    assert len(stack) == 1, f"unbalanced brackets: {template}"
    return tuple(stack[0][0])


def expand(dice: Dice, parts: tuple) -> str:
    return "".join(part if isinstance(part, str) else expand(dice, dice.pick(part)) for part in parts)


def fill(dice: Dice, template: str, slots: dict[str, Any]) -> str:
    """One way of saying a part of a sentence."""
    return expand(dice, parse(template)).format_map(slots)


def tell(dice: Dice, template: str, slots: dict[str, Any]) -> str:
    """One way of saying a whole sentence or several."""
    return SENTENCE_START.sub(lambda start: start[0].upper(), fill(dice, template, slots))


def an(noun: str) -> str:
    """The noun with its indefinite article; no noun of this world has a silent h or a consonantal u."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def count(number: int, noun: str) -> str:
    """The noun in words: "one apple", "three apples", "no apples"."""
    return f"{NUMBERS[number]} {noun if number == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """Plural of the countable nouns used here."""
    irregular = {"goose": "geese", "child": "children", "man": "men", "woman": "women"}
    if noun in irregular:
        return irregular[noun]
    if noun.endswith(("ch", "sh", "ss", "x")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


class Event(NamedTuple):
    """Something that a story, or the world, says: ("put", ("Mia", "key", "in the drawer"))."""

    kind: str
    values: tuple


class Story(NamedTuple):
    text: str
    events: tuple[Event, ...]


class Telling:
    """A story while it is being told: its dice, its slots, what was said and what happened."""

    def __init__(self, dice: Dice):
        self.dice = dice
        self.slots: dict[str, Any] = {}
        self.sentences: list[str] = []
        self.events: list[Event] = []

    def let(self, **slots: Any) -> None:
        self.slots.update(slots)

    def say(self, *ways: str) -> None:
        """Say one of the ways."""
        self.sentences.append(tell(self.dice, self.dice.pick(ways), self.slots))

    def event(self, kind: str, *values: Any) -> None:
        self.events.append(Event(kind, tuple(str(value) for value in values)))

    def story(self, joiner: str = " ") -> Story:
        return Story(joiner.join(self.sentences), tuple(self.events))
