"""How the facts of the world enter a story: asides, introductions, and the plots that are about little else."""

from minillm.data.stories import recall
from minillm.data.stories.telling import Telling, fill
from minillm.data.stories.world import ATTRIBUTES, PEOPLE, Person

ONCE = (
    "One [cold|warm|windy|bright|grey] [morning|afternoon|evening], ",
    "On [Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday], ",
    "Last [spring|summer|autumn|winter], ",
    "[One day|Yesterday|Early one day|Not long ago], ",
    "",
)
INTRODUCED = (
    "{P}",
    "{P}",
    "{P} the {P.job}",
    "{P}, who lived by the {P.home},",
    "{P}, who sold {P.goods},",
    "{P}, who had {P.a_pet},",
    "the {P.job}, {P},",
)
TOLD = {
    "home": (
        "{P} lived by the {P.home}.",
        "{P}'s [little |old |]house stood by the {P.home}.",
        "the house by the {P.home} was {P}'s [home|house].",
        "by the {P.home} lived {P}.",
        "{P} had [always lived|a small house|grown up] by the {P.home}.",
        "[everyone knew that|as always,] {P} lived by the {P.home}.",
        "home, for {P}, was by the {P.home}.",
    ),
    "job": (
        "{P} was the {P.job} of the village.",
        "{P} worked as a {P.job}.",
        "the village {P.job} was {P}.",
        "{P} was a [good|busy|fine|careful] {P.job}.",
        "[people called|everyone called] {P} the best {P.job} [in the land|of all].",
        "{P}'s [work|trade|job] was that of a {P.job}.",
    ),
    "goods": (
        "{P} sold {P.goods}.",
        "{P}'s shop was full of {P.goods}.",
        "if you needed {P.goods}, you went to {P}.",
        "people bought their {P.goods} from {P}.",
        "{P} sold {P.goods} to [everyone|the whole village|all the neighbours].",
        "all the {P.goods} in the village came from {P}.",
    ),
    "pet": (
        "{P} had {P.a_pet}.",
        "{P} kept {P.a_pet}.",
        "{P}'s pet was {P.a_pet}.",
        "the {P.pet} belonged to {P}.",
        "the {P.pet} followed {P} everywhere.",
        "{P} went nowhere without the {P.pet}.",
    ),
    "food": (
        "{P} loved {P.food}.",
        "{P}'s favourite food was {P.food}.",
        "nothing tasted better to {P} than {P.food}.",
        "{P} [ate|wanted] {P.food} every day.",
        "{P} liked {P.food} best of all.",
    ),
    "door": (
        "{P} had {P.a_door} door.",
        "{P}'s door was {P.door}.",
        "the door of {P}'s house was {P.door}.",
        "{P} had painted the door {P.door}.",
        "you could tell {P}'s house by its {P.door} door.",
    ),
}
TWICE_TOLD = (
    "{P}, who lived by the {P.home}, sold {P.goods}.",
    "{P} the {P.job} lived by the {P.home}.",
    "{P} and {P.his} {P.pet} lived behind {P.a_door} door.",
    "{P} the {P.job} loved {P.food}.",
    "{P}, the {P.job}, had {P.a_pet}.",
    "{P} sold {P.goods} by day and ate {P.food} in the evening.",
    "{P} gave some {P.food} to {P.his} {P.pet}.",
    "by the {P.home}, behind {P.a_door} door, lived {P}.",
    "{P} sold {P.goods}, because {P.he} was the {P.job}.",
)


def cast(t: Telling, *roles: str, besides: Person | None = None) -> list[Person]:
    """Different people for the roles; {A} is the name and {A1} a name with, sometimes, a fact."""
    people = t.dice.sample([person for person in PEOPLE if person != besides], len(roles))
    for role, person in zip(roles, people):
        t.let(**{role: person, role + "1": fill(t.dice, t.dice.pick(INTRODUCED), {"P": person})})
    t.let(once=fill(t.dice, t.dice.pick(ONCE), {}))
    return people


def about(t: Telling, person: Person, k: int) -> None:
    """k facts of a person, sometimes two in one sentence."""
    t.let(P=person)
    for attribute in t.dice.sample(ATTRIBUTES, k):
        t.say(*(TWICE_TOLD if t.dice.chance(0.2) else TOLD[attribute]))


def aside(t: Telling, person: Person) -> None:
    if t.dice.chance(0.6):
        about(t, person, 1)


def portrait(t: Telling) -> None:
    (a,) = cast(t, "A")
    t.let(P=a)
    t.say(
        "this is the story of {A}.",
        "[do you know|have you met] {A}[|, the {A.job}]?",
        "there [once was|was] a {A.job} whose name was {A}.",
        "everybody in the village knew {A}.",
    )
    about(t, a, t.dice.number(4, 6))
    t.say(
        "[that was how {A} lived|so the days went by|that was all {A} needed], and {A.he} was [happy|content].",
        "{A} would not have changed places with a king.",
        "and {A.he} sang while {A.he} worked.",
    )


def neighbours(t: Telling) -> None:
    cast(t, "A", "B")
    t.say(
        "{A} and {B} were [good friends|old friends|neighbours].",
        "{A} and {B} met [in the square|on the road|in the street] and talked for [an hour|a while].",
        "{A} and {B} had known each other since they were small.",
    )
    ways = {
        "home": "{A} lived by the {A.home}, and {B} lived by the {B.home}.",
        "job": "{A} was the {A.job}, and {B} was the {B.job}.",
        "goods": "{A} sold {A.goods}, but {B} sold {B.goods}.",
        "pet": "{A} had {A.a_pet}, and {B} had {B.a_pet}.",
        "food": "{A} loved {A.food}, but {B} liked {B.food} better.",
        "door": "{A}'s door was {A.door}, and {B}'s door was {B.door}.",
    }
    for attribute in t.dice.sample(ATTRIBUTES, t.dice.number(3, 4)):
        t.say(ways[attribute])
    t.say(
        "[still|and yet], they never [quarrelled|had a cross word].",
        "[on Sundays|in the evening] they [played cards|drank tea|sat in the sun] together.",
        "when {A} needed help, {B} was always there.",
    )


def traveller(t: Telling) -> None:
    cast(t, "A")
    t.let(B=t.dice.pick(("the traveller", "the stranger", "the child", "the king", "the judge", "the new boy")))
    t.say(
        "{once}{B} came to the village and met {A}.",
        "{once}{B} stopped {A} in the square.",
        "{once}{A1} showed {B} the village.",
    )
    for person in t.dice.sample(PEOPLE, t.dice.number(3, 4)):
        question, answer = recall.ask(t.dice, person)
        t.let(question=question, answer=answer)
        t.say('"{question}" They said: {answer}.')
    t.say(
        '"thank you," said {B}, and went on.',
        "{B} [wrote it all down|nodded|tried to remember it all].",
        '"you know [everyone|everybody]," said {B}.',
    )


def riddle(t: Telling) -> None:
    _, _, c = cast(t, "A", "B", "C")
    t.let(P=c)
    hints = {
        "home": "I live by the {P.home}",
        "job": "I am a {P.job}",
        "goods": "I sell {P.goods}",
        "pet": "I have {P.a_pet}",
        "food": "I love {P.food}",
        "door": "my door is {P.door}",
    }
    chosen = t.dice.sample(ATTRIBUTES[:5], 2) + (["door"] if t.dice.chance(0.4) else [])
    said = " and ".join((", ".join(hints[x] for x in chosen[:-1]), hints[chosen[-1]]))
    t.say("{once}{A1} asked {B} a riddle.", "{A} and {B} were [playing a game|telling riddles].")
    t.say('"' + said + '. Who am I?" asked {A}.')
    t.say('"you are {C}," [said|answered|cried] {B}.', '"that must be {C}," [said|answered] {B}.')
    about(t, c, t.dice.number(1, 2))
    t.say("{A} [laughed|clapped]. It was right.", '"[right|yes]!" said {A}. "[Now it is your turn|Now you ask me]."')


def walk(t: Telling) -> None:
    """A walk past three houses; at each, a fact, and something to remember."""
    _, b, c, d = cast(t, "A", "B", "C", "D")
    t.say("{once}{A1} went for a walk.", "{once}{A} walked through the village.", "{A1} had [letters|news] to bring.")
    for person, way in zip((b, c, d), ("first", "then", "last of all")):
        t.let(P=person, way=way)
        t.say(
            "{way} came the house by the {P.home}, where {P} lived.",
            "{way} {A} came to {P}'s {P.door} door by the {P.home}.",
            "{way} {A} met {P} the {P.job} by the {P.home}.",
            "{way} {A} saw {P} with {P.his} {P.pet} by the {P.home}.",
            "{way} {A} bought {P.goods} from {P} by the {P.home}.",
            "{way} {A} ate some {P.food} with {P} by the {P.home}.",
        )
    about(t, t.dice.pick((b, c, d)), 1)
    t.say("then {A.he} went home [to the {A.home}|by the {A.home}|to {A.his} {A.pet}].")
