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
    a, b = cast(t, "A", "B")
    t.let(thing=t.dice.pick(THINGS), spot=t.dice.pick(SPOTS))
    t.say(
        "{once}{A1} and {B} [tidied|cleaned] the [house|attic|kitchen|workshop|cellar].",
        "{once}{A} helped {B} to [clean|tidy] the [house|attic|kitchen|workshop|cellar].",
        "guests were coming, so {A} and {B} [tidied|cleaned] the house.",
    )
    t.say("{A} put the {thing} {spot}.", "{A} took the {thing} and put it {spot}.")
    t.event("put", a, t.slots["thing"], t.slots["spot"])
    aside(t, t.dice.pick((a, b)))
    t.say("[so nothing was lost|at last they could rest|then they had some {A.food}].")


def lost(t: Telling) -> None:
    a, b = cast(t, "A", "B")
    t.let(thing=t.dice.pick(THINGS), spot=t.dice.pick(SPOTS))
    t.say(
        "{once}{A1} could not find {A.his} {thing}.",
        "{once}{A1} had lost {A.his} {thing}.",
        "{once}the {thing} of {A} was gone.",
    )
    t.event("lost", a, t.slots["thing"])
    t.say(
        "{A} looked [everywhere|upstairs and downstairs], but it was not there.",
        "{A} asked [everyone|the neighbours], but nobody had seen it.",
        "{A} searched [for an hour|all day]. Nothing!",
    )
    aside(t, b)
    t.say(
        "[at last|in the end|then] {B} found the {thing} {spot}.",
        '"here it is!" called {B}. The {thing} was {spot}.',
        "then {B} looked {spot}, and there was the {thing}.",
    )
    t.event("found", b, t.slots["thing"], t.slots["spot"])
    t.say(
        "the {A.pet} had [carried|taken] it there.",
        "{A} thanked {B} [with|and gave {B.him}] some {B.food}.",
        "{A} [laughed|was very glad], and they [ate {A.food}|went home].",
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


def treasure(t: Telling) -> None:
    """One hint leads to the next."""
    a, b = cast(t, "A", "B")
    thing, place = t.dice.pick(THINGS), t.dice.pick(PLACES)
    t.let(place=place, thing=thing, a_thing=an(thing))
    t.say("{once}{A1} found an old map.", "{A} and {B} had an old map.", "{once}{B} gave {A} an old map.")
    t.say(
        "it led [first |]over the hill[, then along the river|].",
        "[it was hard to read|nobody else could read it|half of it was torn].",
        "{A} went [far|up the hill|along the river].",
    )
    aside(t, t.dice.pick((a, b)))
    t.say(
        "{A} dug by the {place} and found {a_thing}.",
        "there was nothing, but by the {place} {A} found {a_thing}.",
        "by the {place}, under a stone, lay {a_thing}.",
    )
    t.event("dug", thing, place)
    t.say("{A} [was glad|laughed|told nobody].", "it had been lost for [years|a long time].")


def painting(t: Telling) -> None:
    a, b = cast(t, "A", "B")
    t.let(thing=t.dice.pick(PAINTED), colour=t.dice.pick(COLOURS))
    t.say(
        "{once}{A1} and {B} bought some paint.",
        "{A} and {B} had some paint left.",
        "{once}everything looked old and grey to {A} and {B}.",
    )
    t.say("{A} painted the {thing} {colour}.", "{A} took a brush and painted the {thing} {colour}.")
    t.event("painted", a, t.slots["thing"], t.slots["colour"])
    t.say("{B} [helped|sang all the while|held the ladder].", "then {B} washed the brush.")
    aside(t, t.dice.pick((a, b)))


def clothes(t: Telling) -> None:
    a, b = cast(t, "A", "B")
    thing, colour = t.dice.pick(CLOTHES), t.dice.pick(COLOURS)
    t.let(a_thing=f"{an(colour)} {thing}")
    t.say(
        "{once}there was a [feast|dance|wedding] by the {A.home}.",
        "{once}{A} and {B} went to a [feast|dance|wedding].",
        "for the feast, everyone wore something new.",
    )
    t.say("{A} wore {a_thing}.", "{A} came in {a_thing}.")
    t.event("wore", a, thing, colour)
    aside(t, t.dice.pick((a, b)))
    t.say("they [sang|danced] until [midnight|the moon rose].", "everyone ate some {B.food}.")


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


PLOTS = (tidy, lost, passed_on, swap, treasure, painting, clothes, mending, storm)
