"""Plots in which people meet, help, compete and wait for each other.

Each plot notes its events as it goes; `questions.py` asks for one value of an event.
"""

from minillm.data.stories.telling import Telling, an
from minillm.data.stories.village import about, aside, cast
from minillm.data.stories.world import (
    CHORES,
    CONTESTS,
    DAYS,
    DELAYS,
    DISHES,
    INGREDIENTS,
    PEOPLE,
    PLACES,
    THINGS,
)


def birthday(t: Telling) -> None:
    a, b, c = cast(t, "A", "B", "C")
    t.let(day=t.dice.pick(DAYS))
    t.say("on {day} it was {B}'s birthday.", "{B}'s birthday was on {day}.", "{B} had a birthday on {day}.")
    t.event("birthday", b, t.slots["day"])
    t.say(
        "{A1} wanted to bring a present.",
        "{A} thought for a long time about a present.",
        '"what shall I bring?" thought {A}.',
    )
    t.let(P=b)
    if t.dice.chance(0.5):
        about(t, b, 1)
    t.say(
        "so {A.he} bought {C.goods} from {C} the {C.job}.",
        "so {A.he} went to {C}, who sold {C.goods}, and bought some.",
        "{A.he} bought {C.goods} at {C}'s shop.",
    )
    t.event("bought", a, c.goods)
    t.say(
        "{B} was [glad|very happy] and gave {A} some {B.food}.",
        "everyone ate {B.food}, for that was what {B} liked best.",
        "{B}'s {B.pet} got a [ribbon|present] too.",
    )


def market(t: Telling) -> None:
    a, b, c = cast(t, "A", "B", "C")
    t.say(
        "{once}{A} and {B} went shopping.",
        "it was market day.",
        "{once}the shops were full.",
    )
    t.say("{A} bought {C.goods} from {C}.", "{A} wanted {C.goods} and went to {C}.", "{C} sold {C.goods} to {A}.")
    t.event("bought", a, c.goods)
    aside(t, t.dice.pick((a, b)))
    t.say("[by noon the shops were empty|it had been a good day].", "then they ate some {B.food}.")


def late(t: Telling) -> None:
    a, b = cast(t, "A", "B")
    weather, state = t.dice.pick(DELAYS)
    t.let(weather=weather, state=state, place=t.dice.pick(PLACES), hour=t.dice.pick(("noon", "six", "sunset", "nine")))
    t.say(
        "{once}{A1} wanted to meet {B} by the {place}.",
        "{A} and {B} had agreed to meet by the {place} at {hour}.",
        '"meet me by the {place} at {hour}," {B} had said to {A}.',
    )
    t.event("meeting", a, b, t.slots["place"])
    t.say(
        "but {weather}, so {state}, and {A} came late.",
        "but {weather}. Because of that, {state}, and {A} was late.",
        "{weather}. So {state}, and {A} came too late.",
        "but {A} was late, because {weather} and {state}.",
    )
    t.event("late", a, state)
    aside(t, t.dice.pick((a, b)))
    t.say("{B} was not angry, and they [ate {B.food}|shared some {B.food}|walked on together].")


def contest(t: Telling) -> None:
    a, b, c = cast(t, "A", "B", "C")
    what, thing = t.dice.pick(CONTESTS), t.dice.pick(THINGS)
    t.let(what=what, a_thing=an(thing), thing=thing, place=t.dice.pick(PLACES))
    first, second, last = t.dice.sample("ABC", 3)
    t.let(**{"F": t.slots[first], "S": t.slots[second], "L": t.slots[last]})
    t.say(
        "{once}{A}, {B} and {C} met for {what} by the {place}.",
        "{A}, {B} and {C} took part in {what}.",
        "everyone came to the {place} to see {what} between {A}, {B} and {C}.",
    )
    aside(t, t.dice.pick((a, b, c)))
    t.say(
        "{F} won {what}. {S} came second, and {L} came last.",
        "{L} came last, {S} came second, and {F} won.",
        "{S} did well, but {F} was better and won. {L} came last.",
        "{F} won, {S} was second and {L} was last.",
    )
    t.event("won", t.slots["F"], what)
    t.event("last", t.slots["L"], what)
    t.say("the prize was {a_thing}.", "{F} was given {a_thing} as a prize.", "{a_thing} was the prize.")
    t.event("prize", t.slots["F"], thing)


def week(t: Telling) -> None:
    (a,) = cast(t, "A")
    t.let(day=t.dice.pick(DAYS), chore=t.dice.pick(CHORES))
    t.say("it was a busy week for {A}.", "{A} had [a lot|much] to do.", "{A1} was never idle.")
    t.say("on {day} {A.he} {chore}.", "{A.he} {chore} on {day}.")
    t.event("did", a, t.slots["chore"], t.slots["day"])
    if t.dice.chance(0.6):
        about(t, a, 1)
    t.say("then {A.he} [rested|slept well|ate some {A.food}].", "[a good week|what a week]!")


def runaway(t: Telling) -> None:
    a, b, c = cast(t, "A", "B", "C")
    t.let(place=t.dice.pick(PLACES))
    t.say(
        "{once}{A}'s {A.pet} ran away.",
        "{once}the {A.pet} of {A} was gone.",
        "{A} cried, because {A.his} {A.pet} had run away.",
    )
    t.event("ran", a, a.pet)
    t.say("{B} looked [everywhere|in the fields|behind every tree].", "{A} and {B} called [it|and called].")
    aside(t, t.dice.pick((a, b)))
    t.say(
        "but it was {C} who found the {A.pet} by the {place}.",
        "[at last|in the end] {C} found it by the {place}.",
        "then {C} saw the {A.pet} by the {place} and brought it home.",
    )
    t.event("spotted", c, a.pet, t.slots["place"])
    t.say(
        "{A} gave {C} some {C.food}.",
        "it was [hungry|tired|cold], but it was well.",
        "the {A.pet} had been [lonely|afraid of the thunder], and that was why it ran.",
    )


def cooking(t: Telling) -> None:
    a, b, c = cast(t, "A", "B", "C")
    t.let(dish=t.dice.pick(DISHES), need=t.dice.pick(INGREDIENTS))
    t.say("{once}{A1} wanted to make {dish} for {B}.", "{A} was making {dish}, for {B} was coming.")
    t.event("made", a, t.slots["dish"])
    t.say("but there was no {need} left.", "but {A.he} had run out of {need}.", "but the {need} was gone.")
    aside(t, t.dice.pick((a, b, c)))
    t.say(
        "{A} ran to {C} by the {C.home} and borrowed some {need}.",
        "so {A} borrowed {need} from {C}.",
        "{C} lent {A.him} some {need}.",
    )
    t.event("borrowed", a, t.slots["need"], c)
    t.say(
        "they ate it all, and the {B.pet} got some too.",
        '"very good," said {B}. "But I still like {B.food} best."',
        "in the end all three ate together.",
    )


def letter(t: Telling) -> None:
    a, b = cast(t, "A", "B")
    thing, day, place = t.dice.pick(THINGS), t.dice.pick(DAYS), t.dice.pick(PLACES)
    t.let(thing=thing, day=day, place=place, a_thing=an(thing))
    t.say("{once}{A1} got a letter from {B}.", "{B1} wrote a letter to {A}.", "a letter from {B} came for {A}.")
    t.event("wrote", b, a)
    t.say(
        'it said: "Come to the {place} on {day} and bring {a_thing}."',
        '"please come to the {place} on {day}," it said, "and bring {a_thing}."',
        '"bring {a_thing} to the {place} on {day}," it said.',
    )
    t.event("invited", a, place, day)
    t.event("bring", a, thing)
    aside(t, t.dice.pick((a, b)))
    t.say(
        "{A} read it twice and smiled.",
        "{A} wondered why. It was a surprise: {B} had made {A.food}.",
        "{A} went, and found {B} there with the {B.pet}.",
    )


def culprit(t: Telling) -> None:
    a, _, c, d = cast(t, "A", "B", "C", "D")
    food = t.dice.pick(PEOPLE).food
    t.let(food=food)
    t.say(
        "{once}someone had eaten {A}'s {food}.",
        "{A} had left some {food} on the table, and now the plate was empty.",
        "{once}{A1} came home, and all the {food} had been eaten.",
    )
    t.event("eaten", a, food)
    t.say(
        "it was not {B}'s {B.pet}, for it had been asleep.",
        "was it {B}'s {B.pet}? No, the {B.pet} had been out.",
        '"my {B.pet} was with me," said {B}.',
    )
    t.say(
        "but the face of {C}'s {C.pet} was dirty.",
        "but small footprints led to {C}'s {C.pet}.",
        "then they saw {C}'s {C.pet}, and it looked very full.",
    )
    t.event("culprit", c.pet)
    aside(t, d)
    t.say("{C} [was sorry and|said sorry and] gave {A} some {C.goods}.", "everyone laughed, even {A}.")


def news(t: Telling) -> None:
    """Who told whom that somebody was ill, or away."""
    a, b, c = cast(t, "A", "B", "C")
    t.let(
        what=t.dice.pick(("ill", "away", "asleep", "hungry", "tired", "sad", "busy", "cold")), D=t.dice.pick(PEOPLE).pet
    )
    t.say("{once}{A1} told {B} that the {D} was {what}.", '"the {D} is {what}," said {A} to {B}.')
    aside(t, t.dice.pick((a, b)))
    t.say("{B} told it to {C}.", "{B} ran to {C} with the news.", "then {B} told {C}.")
    t.event("told", a, b)
    t.event("told", b, c)
    t.event("was", t.slots["D"], t.slots["what"])
    t.say("soon the whole village knew.", "{C} [shook {C.his} head|went to look].")


PLOTS = (birthday, market, late, contest, week, runaway, cooking, letter, culprit, news)
