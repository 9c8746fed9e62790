"""Plots in which something is counted. Every count adds up, and every total is equally common.

A telling draws the total first, then a change that leads to it. The total is not said: that is the question.
"""

from functools import partial
from typing import NamedTuple

from minillm.data.stories.telling import NUMBERS, Dice, Telling, count, plural
from minillm.data.stories.village import aside, cast
from minillm.data.stories.world import BREAKABLE, COUNTED, PAINTED, PLACES, SELLER

MOST = len(NUMBERS) - 1
LARGEST_CHANGE = 2


class Scene(NamedTuple):
    """Something whose number grows ({k} more) and shrinks; `place` is empty where a person has the things."""

    nouns: tuple[str, ...]
    place: str
    starts: tuple[str, ...]
    mores: tuple[str, ...]
    lesses: tuple[str, ...]
    totals: tuple[str, ...]


HAS = ("now {A} had {n}.", "so {A} had {n} now.", "that made {n}.", "{A} counted: {n}.")
ARE = ("now there {were} {n}.", "that made {n}.", "so there {were} {n} {place} now.", "{A} counted: {n}.")
SCENES = {
    "gathering": Scene(
        tuple(COUNTED),
        "",
        ("{once}{A1} had {n}.", "{once}{A} found {n}.", "{A} had {n} in a bag.", "{A} put {n} in a bag."),
        ("{A} found {k} more.", "{B} gave {A} {k} more.", "then {A} got {k} more.", "{A} added {k} more."),
        ("{A} gave {k} to {B}.", "{A} lost {k} on the way.", "{A} gave {k} of them away.", "{B} took {k}."),
        HAS,
    ),
    "paying": Scene(
        ("coin",),
        "",
        ("{once}{A1} had {n}.", "{A} went to the shops with {n}.", "there {were} {n} in {A}'s pocket."),
        ("{A} earned {k} more.", "{B} paid {A} {k} more.", "{A} found {k} more on the road."),
        ("{A} paid {k} for {B.goods}.", "{A} bought some {B.food} for {k}.", "{A} gave {k} to {B}."),
        HAS,
    ),
    "yard": Scene(
        ("hen", "duck", "goose", "goat", "lamb", "crow"),
        "in the yard",
        ("{once}there {were} {n} in {A}'s yard.", "{A} had {n} in the yard.", "{once}{n} {were} in the yard of {A}."),
        ("{k} more came in.", "{A} bought {k} more.", "{k} more came over the wall."),
        ("{k} ran away.", "{A} sold {k} to {B}.", "{k} went out by the gate."),
        ARE,
    ),
    "ferry": Scene(
        ("child", "passenger", "man", "woman"),
        "on the ferry",
        ("{once}{n} got on the ferry.", "{once}there {were} {n} on the ferry.", "the ferry left with {n}."),
        ("by the {A.home}, {k} more got on.", "at the next stop {k} more got on.", "then {k} more got on."),
        ("by the {A.home}, {k} got off.", "at the next stop {k} got off.", "then {k} got off."),
        ARE,
    ),
    "evening": Scene(
        ("candle", "lamp", "lantern", "torch"),
        "burning",
        ("{once}{n} {were} burning in the hall.", "{A} lit {n}.", "it was dark, and {A} lit {n}."),
        ("{A} lit {k} more.", "{B} came and lit {k} more.", "then {k} more {kwere} lit."),
        ("the wind blew out {k}.", "{B} put out {k}.", "then {k} went out."),
        ARE,
    ),
    "shelf": Scene(
        ("cup", "plate", "jar", "glass", "pot"),
        "on the shelf",
        ("{once}{A} put {n} on the shelf.", "{n} stood on {A}'s shelf.", "there {were} {n} on the shelf."),
        ("{A} put {k} more there.", "{B} brought {k} more.", "then {A} washed {k} more."),
        ("{k} fell down and broke.", "{A} took {k} away.", "the {A.pet} knocked down {k}."),
        ARE,
    ),
    "shop": Scene(
        tuple(one for _, one, *_ in BREAKABLE),
        "in the shop",
        ("{once}there {were} {n} in {A}'s shop.", "{A} the {A.job} had {n} in the shop.", "{A}'s shop had {n}."),
        ("{A} made {k} more.", "then {A} brought {k} more.", "{k} more {kwere} ready by noon."),
        ("{B} bought {k}.", "{A} sold {k} to {B}.", "{k} {kwere} sold by noon."),
        ARE,
    ),
}


def step_to(dice: Dice, total: int) -> tuple[int, int]:
    """(start, change) with start + change == total, start in 1..MOST and |change| in 1..LARGEST_CHANGE."""
    changes = [k for k in range(-LARGEST_CHANGE, LARGEST_CHANGE + 1) if k and 1 <= total - k <= MOST]
    change = dice.pick(changes)
    return total - change, change


def scene(t: Telling, name: str) -> None:
    """One or two changes of a count; each total is said, the last one as the answer."""
    here = SCENES[name]
    noun = t.dice.pick(here.nouns)
    seller = SELLER.get(plural(noun)) if name == "shop" else None  # chairs are counted where chairs are sold
    a, _ = cast(t, "A", "B", besides=seller)
    if seller:
        a = seller
        t.let(A=seller)
    total = t.dice.number(1, MOST)
    middle, change = step_to(t.dice, total)
    steps = [(change, total)]
    start = middle
    if t.dice.chance(0.2):
        start, change = step_to(t.dice, middle)
        steps.insert(0, (change, middle))
    t.let(n=count(start, noun), were="was" if start == 1 else "were", place=here.place)
    t.say(*here.starts)
    for i, (change, after) in enumerate(steps):
        k = abs(change)
        t.let(k=NUMBERS[k], kwere="was" if k == 1 else "were")
        t.say(*(here.mores if change > 0 else here.lesses))
        if i + 1 < len(steps):
            t.let(n=count(after, noun), were="was" if after == 1 else "were")
            t.say(*here.totals)
    if here.place:
        t.event("are", plural(noun), here.place, NUMBERS[total])
    else:
        t.event("has", plural(noun), a, NUMBERS[total])
    aside(t, a)


def together(t: Telling) -> None:
    a, b = cast(t, "A", "B")
    noun = t.dice.pick(COUNTED)
    total = t.dice.number(2, MOST)
    less = t.dice.number(1, min(LARGEST_CHANGE, total - 1))
    pair = [less, total - less] if t.dice.chance(0.5) else [total - less, less]
    t.let(n=count(pair[0], noun), m=count(pair[1], noun), k=NUMBERS[pair[1]])
    t.say(
        "{once}{A1} had {n}, and {B} had {k}.",
        "{A} found {n}, and {B} found {k}.",
        "{once}{A} brought {n}. {B} brought {m}.",
    )
    aside(t, t.dice.pick((a, b)))
    t.event("both", plural(noun), a, b, NUMBERS[total])


def ages(t: Telling) -> None:
    a, b = cast(t, "A", "B")
    total = t.dice.number(1, MOST)
    other, change = step_to(t.dice, total)
    thing = t.dice.pick(PAINTED)
    t.let(thing=thing, n=count(other, "year"), k=count(abs(change), "year"))
    t.let(older="older" if change > 0 else "younger")
    t.say(
        "{once}{A1} and {B} talked about old times.",
        "{A} and {B} each had a {thing}.",
        '"which {thing} is older?" asked {A}.',
    )
    aside(t, t.dice.pick((a, b)))
    t.say("{A}'s {thing} was {n} old.", "the {thing} of {A} was {n} old.")
    t.say("{B}'s {thing} was {k} {older}.", "the {thing} of {B} was {k} {older} than that.")
    t.event("old", thing, b, NUMBERS[total])


def journey(t: Telling) -> None:
    a, b = cast(t, "A", "B")
    total = t.dice.number(2, MOST)
    more = t.dice.number(1, min(LARGEST_CHANGE, total - 1))
    p1, p2, p3 = t.dice.sample(PLACES, 3)
    t.let(p1=p1, p2=p2, p3=p3, n=count(total - more, "mile"), k=NUMBERS[more])
    t.say("{once}{A1} went to see the {p3}.", "{A} had to bring a letter to the {p3}.", "{A} went far that day.")
    t.say("{A.he} walked {n} from the {p1} to the {p2}.", "from the {p1} to the {p2} it was {n}.")
    t.say("then {A.he} walked {k} more to the {p3}.", "then it was {k} more to the {p3}.")
    aside(t, t.dice.pick((a, b)))
    t.event("walked", a, NUMBERS[total])


def aloud(t: Telling) -> None:
    """Counting one by one, up or down: whoever reads it learns the order of the numbers."""
    a, _ = cast(t, "A", "B")
    noun = t.dice.pick(COUNTED)
    total, others = t.dice.number(1, MOST), t.dice.number(1, 5)
    up = t.dice.chance(0.5)
    first = max(1, total - others) if up else min(MOST, total + others)
    order = range(first, total + 1) if up else range(first, total - 1, -1)
    t.let(nouns=plural(noun), said=", ".join(NUMBERS[i] for i in order))
    t.say("{once}{A1} had a [bag|basket|box] of {nouns}.", "{A} [found|brought] some {nouns}.")
    t.say(
        *("{A} counted them: {said}.", '"how many?" asked {B}. {A} counted: {said}.')
        if up
        else ("{A} [sold them|gave them away] one by one: {said}.", "{B} [took them|carried them off]: {said}.")
    )
    t.event("has", plural(noun), a, NUMBERS[total])


PLOTS = (*(partial(scene, name=name) for name in SCENES), together, ages, journey, aloud, aloud)
