"""Plots in which things change hands, places or colours, get lost and break.

Each plot notes its events as it goes; `questions.py` asks for one value of an event.
"""

from minillm.data.stories.telling import Telling, an
from minillm.data.stories.village import aside, cast
from minillm.data.stories.world import (
    BREAKABLE,
    CLOTHES,
    COLOURS,
    PAINTED,
    PEOPLE,
    PLACES,
    SELLER,
    SPOTS,
    THINGS,
)


def tidy(t: Telling) -> None:
    """Things are put in places; later one is wanted."""
    a, b, _ = cast(t, "A", "B", "C")
    things, spots = t.dice.sample(THINGS, 3), t.dice.sample(SPOTS, 3)
    t.say(
        "{once}{A1} and {B} [tidied|cleaned] the [house|attic|kitchen|workshop|cellar].",
        "{once}{A} helped {B} to [clean|tidy] the [house|attic|kitchen|workshop|cellar].",
        "guests were coming, so {A} and {B} [tidied|cleaned] the house.",
    )
    for person, thing, spot in list(zip((a, b, a), things, spots))[: t.dice.number(2, 3)]:
        t.let(P=person, thing=thing, spot=spot)
        t.say("{P} [put|laid|left] the {thing} {spot}.", "{P} took the {thing} and [put|laid] it {spot}.")
        t.event("put", person, thing, spot)
    aside(t, t.dice.pick((a, b)))
    _, (who, thing, spot) = t.dice.pick(t.events)
    t.let(P=who, thing=thing, spot=spot)
    t.say(
        '[later|in the evening], {C} asked, "Where is the {thing}?" "It is {spot}," said {P}.',
        '"where did you put the {thing}?" asked {C}. "{spot}," said {P}.',
        "later, {C} needed the {thing} and found it {spot}, where {P} had put it.",
        '"who put the {thing} {spot}?" asked {C}. "{P} did."',
        answer=True,
    )
    t.say("[so nothing was lost|at last they could rest|then they had some {A.food}].")


def lost(t: Telling) -> None:
    a, b = cast(t, "A", "B")
    s1, s2, s3 = t.dice.sample(SPOTS, 3)
    t.let(thing=t.dice.pick(THINGS), s1=s1, s2=s2, s3=s3)
    t.say(
        "{once}{A1} could not find {A.his} {thing}.",
        "{once}{A1} had lost {A.his} {thing}.",
        "{once}the {thing} of {A} was gone.",
    )
    t.event("lost", a, t.slots["thing"])
    t.say(
        "{A} looked {s1} and {s2}, but it was not there.",
        "it was not {s1}, and it was not {s2}.",
        "{A} searched {s1}. {A} searched {s2}. Nothing!",
    )
    aside(t, b)
    t.say(
        "[at last|in the end|then] {B} found the {thing} {s3}.",
        '"here it is!" called {B}. The {thing} was {s3}.',
        "then {B} looked {s3}, and there was the {thing}.",
    )
    t.event("found", b, t.slots["thing"], s3)
    t.say(
        "the {A.pet} had [carried|taken] it there.",
        "{A} thanked {B} [with|and gave {B.him}] some {B.food}.",
        "{A} [laughed|was very glad], and they [ate {A.food}|went home].",
    )
    t.say(
        '"where was it?" asked the neighbours. "The {thing} was {s3}," said {A}.',
        "so the {thing} of {A} had been {s3} all the time.",
        answer=True,
    )


def passed_on(t: Telling) -> None:
    a, b, c = cast(t, "A", "B", "C")
    thing = t.dice.pick(THINGS)
    t.let(thing=thing, a_thing=an(thing), a_colour=an(t.dice.pick(COLOURS)))
    t.say(
        "{once}{A1} found {a_colour} {thing}.",
        "{A} had {a_colour} {thing}.",
        "{once}{A1} made {a_colour} {thing}.",
    )
    t.say("{A} [gave|lent|sent] the {thing} to {B}.", "{B} liked it, so {A} gave the {thing} to {B}.")
    t.event("gave", a, thing, b)
    aside(t, b)
    t.say(
        "[later|a week later|the next day] {B} [gave|lent|sent] the {thing} to {C}.",
        "{B} did not need it, and gave the {thing} to {C}.",
    )
    t.event("gave", b, thing, c)
    t.event("keeps", c, thing)
    t.say(
        '"who has the {thing} now?" asked {A}. "{C} has it," said {B}.',
        '"who gave you the {thing}?" asked {A}. "{B} did," said {C}.',
        "so the {thing} went from {A} to {B}, and from {B} to {C}.",
        answer=True,
    )
    t.say("{C} [kept it for years|was very proud of it|took good care of it].")


def swap(t: Telling) -> None:
    """Two people exchange what they have."""
    a, b = cast(t, "A", "B")
    x, y = t.dice.sample(THINGS, 2)
    t.let(x=x, y=y, a_x=an(x), a_y=an(y))
    t.say(
        "{once}{A1} had {a_x}, and {B} had {a_y}.",
        "{A} had {a_x} but wanted {a_y}. {B} had {a_y}.",
        "{A} found {a_x}, and {B} found {a_y}.",
    )
    aside(t, t.dice.pick((a, b)))
    t.say(
        "{A} liked the {y}, and {B} liked the {x}. So they swapped.",
        '"give me the {y}, and I will give you the {x}," said {A}. {B} agreed.',
        "{A} gave the {x} to {B}, and {B} gave the {y} to {A}.",
    )
    t.event("got", a, y)
    t.event("got", b, x)
    t.say("[both were happy|they shook hands|it was a fair deal].", "then they ate some {A.food}.")
    t.say(
        "now {A} had the {y}, and {B} had the {x}.",
        '"where is your {x}?" asked a neighbour. "{B} has it now," said {A}.',
        '"who has the {y}?" asked a neighbour. "{A} has it," said {B}.',
        answer=True,
    )


def treasure(t: Telling) -> None:
    """One hint leads to the next."""
    a, b = cast(t, "A", "B")
    p1, p2, p3 = t.dice.sample(PLACES, 3)
    thing = t.dice.pick(THINGS)
    t.let(p1=p1, p2=p2, p3=p3, thing=thing, a_thing=an(thing))
    t.say("{once}{A1} found an old map.", "{A} and {B} had an old map.", "{once}{B} gave {A} an old map.")
    t.say(
        "it led first to the {p1}, then to the {p2}.",
        "from the {p1} it led to the {p2}.",
        "{A} went to the {p1}, and then to the {p2}.",
    )
    aside(t, t.dice.pick((a, b)))
    t.say(
        "{A} dug by the {p3} and found {a_thing}.",
        "there was nothing, but by the {p3} {A} found {a_thing}.",
        "by the {p3}, under a stone, lay {a_thing}.",
    )
    t.event("dug", thing, p3)
    t.say(
        '"where was the {thing}?" asked {B}. "By the {p3}," said {A}.',
        '"what did you find?" asked {B}. "{a_thing}," said {A}.',
        answer=True,
    )
    t.say("{A} [was glad|laughed|told nobody].", "it had been lost for [years|a long time].")


def painting(t: Telling) -> None:
    a, b = cast(t, "A", "B")
    things, colours = t.dice.sample(PAINTED, 2), t.dice.sample(COLOURS, 2)
    t.say(
        "{once}{A1} and {B} bought some paint.",
        "{A} and {B} had some paint left.",
        "{once}everything looked old and grey to {A} and {B}.",
    )
    for person, thing, colour in zip((a, b), things, colours):
        t.let(P=person, thing=thing, colour=colour)
        t.say("{P} painted the {thing} {colour}.", "{P} took a brush and painted the {thing} {colour}.")
        t.event("painted", person, thing, colour)
    aside(t, t.dice.pick((a, b)))
    _, (who, thing, colour) = t.dice.pick(t.events)
    t.let(P=who, thing=thing, colour=colour)
    t.say(
        '"what colour is the {thing}?" asked a neighbour. "It is {colour}," said {P}.',
        '"who painted the {thing}?" asked a neighbour. "{P} did."',
        "now the {thing} was {colour}, and {P} was proud of it.",
        answer=True,
    )


def clothes(t: Telling) -> None:
    """What three people wore."""
    people = cast(t, "A", "B", "C")
    t.say(
        "{once}there was a [feast|dance|wedding] by the {A.home}.",
        "{once}{A}, {B} and {C} went to a [feast|dance|wedding].",
        "for the feast, everyone wore something new.",
    )
    for person, thing, colour in zip(people, t.dice.sample(CLOTHES, 3), t.dice.sample(COLOURS, 3)):
        t.let(P=person, thing=thing, colour=colour, a_thing=f"{an(colour)} {thing}")
        t.say("{P} wore {a_thing}.", "{P} came in {a_thing}.")
        t.event("wore", person, thing, colour)
    aside(t, t.dice.pick(people))
    t.say("they [sang|danced] until [midnight|the moon rose].", "everyone ate some {B.food}.")
    _, (who, thing, colour) = t.dice.pick(t.events)
    t.let(P=who, thing=thing, colour=colour)
    t.say(
        '"who wore the {thing}?" asked a child. "{P} did."',
        '"what colour was the {thing} of {P}?" asked a child. "It was {colour}."',
        "the {colour} {thing} of {P} was the finest of all.",
        answer=True,
    )


def mending(t: Telling) -> None:
    """Something breaks, and whoever sells such things mends it."""
    goods, thing, broke, reasons = t.dice.pick(BREAKABLE)
    maker = SELLER[goods]
    a, b = cast(t, "A", "B", besides=maker)
    t.let(M=maker, thing=thing, broke=broke, why=t.dice.pick(reasons), pay=t.dice.pick(PEOPLE).food)
    t.say(
        "{once}{A}'s {thing} {broke}, because {why}.",
        "{A} had an old {thing}. {once}it {broke}, because {why}.",
        "{A} was sad. The {thing} {broke}, because {why}.",
    )
    t.event("broke", a, thing, t.slots["why"])
    aside(t, t.dice.pick((a, b)))
    t.say(
        "so {A} took it to {M} the {M.job}.",
        "{A} brought the {thing} to {M}, who sold {M.goods}.",
        '"go to {M}," said {B}. "{M} is the {M.job}."',
    )
    t.say("{M} mended the {thing} [at once|in an hour|that evening].", "{M} looked at it and mended it.")
    t.event("mended", maker, thing)
    t.say("{A} paid with some {pay}.", "{A} gave {M.him} some {pay} for it.", "{M} wanted only some {pay} for it.")
    t.event("paid", a, t.slots["pay"])
    t.say('"what happened to the {thing}?" asked {B}. "{why}," said {A}.', answer=True)


def storm(t: Telling) -> None:
    a, b = cast(t, "A", "B")
    thing = t.dice.pick(THINGS)
    t.let(thing=thing, spot=t.dice.pick(SPOTS))
    t.say(
        "{once}a storm came, and {A} could not go home.",
        "there was so much snow that {A} could not go home.",
        "it rained so hard that the road to the {A.home} was gone, and {A} could not go home.",
    )
    t.say("{A} slept at {B}'s house by the {B.home}.", "so {A} stayed with {B}, who lived by the {B.home}.")
    t.event("stayed", a, b)
    t.say("they ate some {B.food} and told stories.", "the {B.pet} slept by the fire.", "they sang all night.")
    t.say(
        "in the morning {A} left, but the {thing} stayed {spot}.",
        "when {A} went home, {A.he} left a {thing} {spot}.",
        "{A} went home early and forgot the {thing}. It lay {spot}.",
    )
    t.event("forgot", a, thing, t.slots["spot"])
    t.say(
        "{B} saw it and ran after {A}.",
        "{B} brought it back the next day.",
    )
    t.say('"what did {A} forget?" asked a neighbour. "the {thing}," said {B}.', answer=True)


PLOTS = (tidy, lost, passed_on, swap, treasure, painting, clothes, mending, storm)
