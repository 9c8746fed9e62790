"""Questions with one right answer each, in three families.

- recall: about what is always true of the village, without any context;
- reading: about what happened in a story, which is the context;
- counting: how many there are at the end of a story that does not say it.

`split="heldout"` asks what no training question and no training story gives away: for recall in other words, for
reading and counting about other stories (see `is_held_out`).
"""

import zlib
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from minillm.data.stories import counting, people, recall, things
from minillm.data.stories.telling import Dice, Event, Story, Telling
from minillm.data.stories.world import PEOPLE

Split = Literal["train", "heldout"]
READING_PLOTS = (*things.PLOTS, *people.PLOTS)
FAMILIES = ("recall", "reading", "counting")
HELD_OUT_STORIES = 20  # one story in this many is never written into the training corpus


class Question(NamedTuple):
    family: str
    context: str  # "" for recall
    question: str
    answer: str


def is_held_out(text: str) -> bool:
    """Whether a story belongs to the held-out part: a property of its text, so it needs no list and no seed."""
    return zlib.crc32(text.encode()) % HELD_OUT_STORIES == 0


# Reading: (event, which value is asked) -> wordings; {0}, {1}, ... are the event's values.
READING: dict[tuple[str, int], tuple[str, ...]] = {
    ("put", 0): ("Who put the {1} {2}?",),
    ("put", 1): ("What did {0} put {2}?", "What is {2}?"),
    ("put", 2): ("Where did {0} put the {1}?", "Where is the {1}?"),
    ("lost", 1): ("What did {0} lose?", "What was {0} looking for?"),
    ("found", 0): ("Who found the {1}?",),
    ("found", 2): ("Where was the {1}?", "Where did {0} find the {1}?"),
    ("gave", 0): ("Who gave the {1} to {2}?", "From whom did {2} get the {1}?"),
    ("gave", 2): ("To whom did {0} give the {1}?", "Who got the {1} from {0}?"),
    ("keeps", 0): ("Who has the {1} now?", "Who keeps the {1}?"),
    ("birthday", 0): ("Whose birthday is on {1}?", "Who has a birthday?"),
    ("birthday", 1): ("When is {0}'s birthday?", "On which day is the birthday of {0}?"),
    ("bought", 0): ("Who bought {1}?",),
    ("bought", 1): ("What did {0} buy?", "What was {0}'s present?"),
    ("late", 0): ("Who was late?", "Who came late?"),
    ("late", 1): ("Why was {0} late?", "Why did {0} come late?"),
    ("meeting", 2): ("Where did {0} and {1} want to meet?", "Where was {0} to meet {1}?"),
    ("won", 0): ("Who won {1}?", "Who was the winner?"),
    ("won", 1): ("What did {0} win?",),
    ("last", 0): ("Who came last?", "Who was last?"),
    ("prize", 1): ("What was the prize?", "What did {0} get as a prize?"),
    ("got", 0): ("Who has the {1} now?", "Who got the {1}?"),
    ("got", 1): ("What does {0} have now?", "What did {0} get?"),
    ("wore", 0): ("Who wore the {1}?", "Who wore something {2}?"),
    ("wore", 1): ("What did {0} wear?", "Which piece of clothing was {2}?"),
    ("wore", 2): ("What colour was {0}'s {1}?", "What colour was the {1}?"),
    ("dug", 0): ("What was found?", "What was found by the {1}?"),
    ("dug", 1): ("Where was the {0}?", "Where was the {0} found?"),
    ("told", 0): ("Who told {1}?", "From whom did {1} know it?"),
    ("told", 1): ("To whom did {0} tell it?",),
    ("was", 1): ("How is the {0}?", "How was the {0}?"),
    ("did", 1): ("What did {0} do on {2}?", "What happened on {2}?"),
    ("did", 2): ("{0} {1}. On which day was that?", "On what day was it that {0} {1}?"),
    ("painted", 0): ("Who painted the {1}?",),
    ("painted", 1): ("What did {0} paint?",),
    ("painted", 2): ("What colour is the {1} now?", "What colour did {0} paint the {1}?"),
    ("ran", 0): ("Whose {1} ran away?",),
    ("ran", 1): ("Which animal ran away?",),
    ("spotted", 0): ("Who found the {1}?",),
    ("spotted", 2): ("Where was the {1}?", "Where did {0} find the {1}?"),
    ("broke", 0): ("Whose {1} was mended?",),
    ("broke", 2): ("What happened to the {1}?", "What happened to {0}'s {1}?"),
    ("mended", 0): ("Who mended the {1}?",),
    ("mended", 1): ("What did {0} mend?",),
    ("paid", 1): ("What did {0} pay with?", "With what did {0} pay?"),
    ("made", 0): ("Who made {1}?",),
    ("made", 1): ("What did {0} make?",),
    ("borrowed", 1): ("What did {0} borrow?", "What did {2} lend to {0}?"),
    ("borrowed", 2): ("Who lent {0} the {1}?", "From whom did {0} borrow {1}?"),
    ("wrote", 0): ("Who wrote the letter?",),
    ("wrote", 1): ("Who got a letter?",),
    ("invited", 1): ("Where must {0} go?",),
    ("invited", 2): ("When must {0} go?", "On which day must {0} come?"),
    ("bring", 1): ("What must {0} bring?",),
    ("eaten", 0): ("Whose food was eaten?",),
    ("eaten", 1): ("What was eaten?", "Which food was gone?"),
    ("culprit", 0): ("Which animal had eaten the food?", "Which animal did it?"),
    ("stayed", 0): ("Who could not go home?",),
    ("stayed", 1): ("With whom did {0} stay?", "At whose house did {0} sleep?"),
    ("forgot", 1): ("What did {0} forget?", "What did {0} leave {2}?"),
    ("forgot", 2): ("Where was the {1}?",),
}
COUNTING: dict[tuple[str, int], tuple[str, ...]] = {
    ("has", 2): ("How many {0} does {1} have now?", "How many {0} does {1} have in the end?"),
    ("are", 2): ("How many {0} are {1} now?", "How many {0} are {1} in the end?"),
    ("both", 3): ("How many {0} do {1} and {2} have together?",),
    ("old", 2): ("How many years old is {1}'s {0}?",),
    ("walked", 1): ("How many miles did {0} walk?",),
}
# Answers that are a place by which something is.
BY_THE = {("meeting", 2), ("spotted", 2), ("invited", 1), ("dug", 1)}


def tell_story(dice: Dice, plot: Callable[[Telling], None], joiner: str = " ") -> Story:
    """One telling of a plot."""
    t = Telling(dice)
    plot(t)
    return t.story(joiner)


def retell(dice: Dice, story: Story) -> str:
    """The story, and at its end what people ask about it and are told."""
    options = possible_questions(story)
    by_answer = {question.answer: question for question in dice.sample(options, len(options))}  # each but once
    asked = list(by_answer.values())[: dice.number(1, 4)]
    return " ".join([story.text, *(f'"{question}" They said: {answer}.' for _, _, question, answer in asked)])


def possible_questions(story: Story) -> list[Question]:
    """Every question whose answer the story's events give and leave no choice in."""
    found = []
    for event in story.events:
        for i, answer in enumerate(event.values):
            family = "reading" if (event.kind, i) in READING else "counting"
            for wording in READING.get((event.kind, i)) or COUNTING.get((event.kind, i), ()):
                if answers(wording, event, i, story.events) == {answer}:
                    said = f"by the {answer}" if (event.kind, i) in BY_THE else answer
                    found.append(Question(family, story.text, wording.format(*event.values), said))
    return found


def answers(wording: str, event: Event, asked: int, events: tuple[Event, ...]) -> set:
    """What the events of that kind answer, given the values that the wording shows."""
    shown = [j for j in range(len(event.values)) if f"{{{j}}}" in wording]
    alike = (e for e in events if e.kind == event.kind and all(e.values[j] == event.values[j] for j in shown))
    return {e.values[asked] for e in alike}


def questions(seed: int, n: int, split: Split = "train", family: str | None = None) -> Iterator[Question]:
    """n questions of a split, of one family or of all three in turn.

    Raises ValueError for an unknown split or family.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split: {split!r} is none of train, heldout")
    if family not in (None, *FAMILIES):
        raise ValueError(f"family: {family!r} is none of {', '.join(FAMILIES)}")
    dice = Dice(2 * seed + (split == "heldout"))
    for i in range(n):
        chosen = family or FAMILIES[i % len(FAMILIES)]
        if chosen == "recall":
            yield Question("recall", "", *recall.ask(dice, dice.pick(PEOPLE), split == "heldout"))
        else:
            yield about_story(dice, split, chosen)


def about_story(dice: Dice, split: Split, family: str) -> Question:
    """A question about a story of the split; stories are told until one can be asked about."""
    while True:
        story = tell_story(dice, dice.pick(READING_PLOTS if family == "reading" else counting.PLOTS))
        if is_held_out(story.text) == (split == "heldout") and (options := possible_questions(story)):
            return dice.pick(options)
