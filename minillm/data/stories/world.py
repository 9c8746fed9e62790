"""The world the stories are told in: a village of twelve people, and what there is in it.

Nobody shares a trade, goods, home, pet or favourite food, so each of these facts can be asked from both ends.
Door colours are shared by two. None of this ever changes; what changes in a story is listed after the people.
"""

from typing import NamedTuple

from minillm.data.stories.telling import an


class Person(NamedTuple):
    name: str
    he: str
    job: str
    goods: str
    home: str
    pet: str
    food: str
    door: str

    def __str__(self) -> str:
        return self.name

    @property
    def him(self) -> str:
        return "him" if self.he == "he" else "her"

    @property
    def his(self) -> str:
        return "his" if self.he == "he" else "her"

    @property
    def a_pet(self) -> str:
        return an(self.pet)

    @property
    def a_door(self) -> str:
        return an(self.door)


# name, pronoun, trade, goods sold, lives by the ..., pet, favourite food, colour of the front door
PEOPLE = tuple(
    Person(*row.split())
    for row in """
Mia she baker bread bridge cat plums red
Tom he smith nails mill owl noodles blue
Ada she weaver blankets well goat pancakes green
Ben he potter bowls chapel dog cherries yellow
Lily she tailor coats pond turtle walnuts white
Max he shoemaker boots gate parrot porridge black
Nora she carpenter chairs school rabbit grapes green
Leo he painter pictures inn hedgehog dumplings white
Ruth she beekeeper honey forge pony mushrooms blue
Otto he farmer eggs tower mouse peas red
Ivy she fisher fish orchard duck figs black
Hugo he clockmaker clocks market frog rice yellow
""".strip().splitlines()
)
ATTRIBUTES = ("home", "job", "goods", "pet", "food", "door")
SHARED = ("door",)  # attributes whose value does not name one person
COLOURS = tuple(dict.fromkeys(person.door for person in PEOPLE))

# What a story moves, says or counts.
THINGS = "key ball bell spoon cup ring drum map mirror brush flute shell".split()
SPOTS = (
    "in the drawer/under the bed/on the shelf/behind the door/in the chest/under the stairs/on the table/in the "
    "barrel/behind the curtain/in the jar/under the bench/on the roof"
).split("/")
PLACES = tuple(person.home for person in PEOPLE)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
PAINTED = ("boat", "fence", "bench", "cart", "sign", "sledge", "swing", "ladder")
CONTESTS = "the sack race/the boat race/the snowball match/the egg race/the song contest/the chess match".split("/")
CHORES = (
    "swept the yard/picked berries/washed the windows/wrote a letter/went swimming/planted a tree/chopped wood/baked a "
    "pie/mended the roof/climbed the hill"
).split("/")
INGREDIENTS = "salt sugar butter milk oil pepper cream yeast".split()
CLOTHES = ("hat", "coat", "scarf", "shirt", "dress", "cloak")
DISHES = ("a pie", "a cake", "a stew", "a salad", "a pudding", "some biscuits", "a pot of soup")
# Each weather always has the same consequence, and that is why somebody is late.
DELAYS = (
    ("it had rained all night", "the path was muddy"),
    ("there had been a hard frost", "the road was icy"),
    ("a storm had come in the night", "a tree blocked the road"),
    ("it had snowed for three days", "the snow was deep"),
    ("a mist had come up from the river", "the fog was thick"),
    ("the snow in the hills had melted", "the river was high"),
    ("it was a feast day", "the ferry was full"),
    ("the guard had gone home", "the gate was locked"),
    ("the cart was old", "a wheel came off"),
    ("nobody had wound the clock", "the clock was wrong"),
)
# Goods that break: (goods, one of them, what happens to it, because ...). Whoever sells them mends them.
CLOTH = ("it caught on a nail", "a puppy pulled at it", "it was caught in the gate")
HARD = ("it fell off the table", "it fell down the stairs", "a ball hit it")
HEAVY = ("a horse stepped on it", "a branch fell on it", "a cart rolled over it")
BREAKABLE = (
    ("blankets", "blanket", "tore", CLOTH),
    ("coats", "coat", "tore", CLOTH),
    ("bowls", "bowl", "cracked", HARD),
    ("clocks", "clock", "stopped", HARD),
    ("pictures", "picture", "broke", HARD),
    ("boots", "boot", "split", HEAVY),
    ("chairs", "chair", "broke", HEAVY),
)
COUNTED = "apple pear egg shell coin nut button stone stamp marble biscuit lemon".split()

BY_NAME = {person.name: person for person in PEOPLE}
SELLER = {person.goods: person for person in PEOPLE}


def facts() -> list[tuple[str, str, str]]:
    """Everything that is always true: (attribute, name, value)."""
    return [(attribute, person.name, getattr(person, attribute)) for person in PEOPLE for attribute in ATTRIBUTES]
