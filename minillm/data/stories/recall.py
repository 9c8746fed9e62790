"""Questions about what is always true of the village."""

from minillm.data.stories.telling import Dice, an, tell
from minillm.data.stories.world import Person

# (attribute, which end is asked) -> wordings for stories and training, wordings held out.
RECALL: dict[tuple[str, str], tuple[tuple[str, ...], tuple[str, ...]]] = {
    ("home", "value"): (
        (
            "Where does {P} live?",
            "By what does {P} live?",
            "Where is {P}'s house?",
            "Where is the home of {P}?",
            "Where did {P} always live?",
            "Where does {P}'s house stand?",
        ),
        ("Where could I find the house of {P}?", "Where is {P} at home?"),
    ),
    ("home", "name"): (
        (
            "Who lives by the {v}?",
            "Whose house stands by the {v}?",
            "Whose home is by the {v}?",
            "Who has a house by the {v}?",
            "By the {v} lives who?",
        ),
        ("The house by the {v} belongs to whom?", "Who is at home by the {v}?"),
    ),
    ("job", "value"): (
        (
            "What is {P}'s trade?",
            "What is {P}'s job?",
            "What is the work of {P}?",
            "As what does {P} work?",
            "What is the trade of {P}?",
        ),
        ("What work does {P} do?", "What is {P} by trade?"),
    ),
    ("job", "name"): (
        (
            "Who is the {v}?",
            "What is the {v} called?",
            "Who works as a {v}?",
            "Who is the village {v}?",
            "What is the name of the {v}?",
        ),
        ("Which villager is a {v}?", "Who works here as the {v}?"),
    ),
    ("goods", "value"): (
        (
            "What does {P} sell?",
            "What is sold by {P}?",
            "What can you buy from {P}?",
            "What is in {P}'s shop?",
            "What do people buy from {P}?",
        ),
        ("What do the neighbours buy at {P}'s shop?", "What is the shop of {P} full of?"),
    ),
    ("goods", "name"): (
        (
            "Who sells {v}?",
            "From whom can you buy {v}?",
            "Whose shop is full of {v}?",
            "From whom do people buy {v}?",
            "Who has {v} to sell?",
        ),
        ("To whom do you go if you need {v}?", "In whose shop do people find {v}?"),
    ),
    ("pet", "value"): (
        (
            "What pet does {P} have?",
            "What pet does {P} keep?",
            "What is {P}'s pet?",
            "What animal does {P} have?",
            "Which animal follows {P}?",
        ),
        ("Which animal belongs to {P}?", "What kind of pet is {P}'s?"),
    ),
    ("pet", "name"): (
        (
            "Who has {a_v}?",
            "Who keeps {a_v}?",
            "Whose pet is the {v}?",
            "Whose is the {v}?",
            "Who has the {v}?",
        ),
        ("To whom does the {v} belong?", "Who keeps {a_v} as a pet?"),
    ),
    ("food", "value"): (
        (
            "What does {P} like to eat?",
            "What is {P}'s favourite food?",
            "What food does {P} love?",
            "What does {P} love to eat?",
            "What does {P} like best of all?",
        ),
        ("What tastes best to {P}?", "Which food does {P} like most?"),
    ),
    ("food", "name"): (
        (
            "Who likes {v} best?",
            "Who loves {v}?",
            "Whose favourite food is {v}?",
            "Who loves to eat {v}?",
            "Who eats {v} every day?",
        ),
        ("Whose best-loved food is {v}?", "Who wants {v} every day?"),
    ),
    ("door", "value"): (
        (
            "What colour is {P}'s door?",
            "What colour is the door of {P}?",
            "Which colour did {P} paint the door?",
            "What is the colour of {P}'s door?",
            "Which door is {P}'s?",
        ),
        ("What colour is the door at {P}'s house?", "Which colour does the door of {P} have?"),
    ),
}


def ask(dice: Dice, person: Person, heldout: bool = False) -> tuple[str, str]:
    """A question about a person and its answer."""
    attribute, end = dice.pick(list(RECALL))
    value = getattr(person, attribute)
    wording = dice.pick(RECALL[attribute, end][heldout])
    question = tell(dice, wording, {"P": person, "v": value, "a_v": an(value)})
    return question, person.name if end == "name" else f"by the {value}" if attribute == "home" else value
