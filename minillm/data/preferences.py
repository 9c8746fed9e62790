"""Preferences from the rows of files, in any of the usual formats, each recognised by its fields.

A row is a pair, two answers to one prompt of which one is better, or has one answer and says whether it is good:

    what is asked as in a conversation, and chosen, rejected     each a text, a message or a list of messages
    chosen, rejected                                             two whole conversations, alike up to an answer
    a conversation, and label                                    true or false: whether its last answer is good

`data.columns` and dataset_info.json name other fields, as for conversations.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from minillm.data.chat_templates import Message
from minillm.data.conversations import (
    asked_messages,
    check_answers,
    check_order,
    checked_row,
    described_tools,
    missing,
    optional_text,
    said_messages,
)
from minillm.data.formats import CONVERSATIONS, Formats, Layout, recognised

PAIR = {"chosen": "chosen", "rejected": "rejected"}
PREFERENCES = Formats(
    "a preference",
    {
        "prompt and pair": {"prompt": "prompt", "system": "system", "tools": "tools", **PAIR},
        "question and pair": {"prompt": "question", "system": "system", **PAIR},
        "alpaca and pair": {
            "prompt": "instruction",
            "query": "input",
            "system": "system",
            "history": "history",
            "tools": "tools",
            **PAIR,
        },
        "sharegpt and pair": {"messages": "conversations", "system": "system", "tools": "tools", **PAIR},
        "openai and pair": {"messages": "messages", "tools": "tools", **PAIR},
        "pair of conversations": {"system": "system", "tools": "tools", **PAIR},
    }
    | {
        f"{name} and label": {**columns, "label": "label"}
        for name, columns in CONVERSATIONS.usual.items()
        if name != "text"
    },
    (
        {"prompt", "chosen", "rejected"},
        {"messages", "chosen", "rejected"},
        {"prompt", "response", "label"},
        {"messages", "label"},
        {"chosen", "rejected"},
    ),
    "chosen and rejected, with or without prompt or messages; or prompt, response and label; or messages and label",
)
LABELS = {"true": True, "false": False, "1": True, "0": False}


class PreferencePair(NamedTuple):
    """Answers to one prompt: two, or, unpaired, one that is chosen or rejected, and the other empty."""

    prompt: Sequence[Message]
    chosen: Sequence[Message]  # what follows the prompt, mostly one message
    rejected: Sequence[Message]
    mismatched: Sequence[Message] = ()  # unpaired: what answers another prompt

    @property
    def paired(self) -> bool:
        """Whether there are two answers to compare."""
        return bool(self.chosen) and bool(self.rejected)


def preference_of(row: object, layout: Layout | None = None) -> PreferencePair:
    """What a row prefers. Raises ValueError, without the place of the row, where that cannot be learned from."""
    row = checked_row(row)
    layout = layout or layout_by_fields(row)
    return labelled(row, layout) if "label" in layout.columns else paired(row, layout)


def layout_by_fields(row: Mapping[str, Any]) -> Layout:
    """The layout of a row by its fields."""
    for field in PAIR:
        if field not in row and not PAIR.keys().isdisjoint(row):
            raise ValueError(missing(row, field))
    return recognised(row, PREFERENCES)


def labelled(row: Mapping[str, Any], layout: Layout) -> PreferencePair:
    """A row with one answer and a label."""
    field = layout.columns["label"]
    if field not in row:
        raise ValueError(missing(row, field))
    good = LABELS.get(str(row[field]).lower())
    if good is None:
        raise ValueError(f'field "{field}" is {str(row[field])[:40]!r}; true or false is expected')
    messages = [*asked_messages(row, layout)]
    if "messages" not in layout.columns:
        messages += said_messages(row, "response", "assistant", layout)
    check_order(messages)
    check_answers(messages[:-1])
    prompt, answer = [*described_tools(row, layout.columns.get("tools")), *messages[:-1]], messages[-1:]
    return PreferencePair(prompt, answer, []) if good else PreferencePair(prompt, [], answer)


def paired(row: Mapping[str, Any], layout: Layout) -> PreferencePair:
    """A row with two answers."""
    columns = layout.columns
    said = {part: [*said_messages(row, part, "assistant", layout)] for part in PAIR}
    whole = [part for part, messages in said.items() if messages and messages[0].role != "assistant"]
    if len(whole) == 1:
        raise ValueError(f'field "{columns[whole[0]]}" is a whole conversation, and the other of the pair is an answer')
    if whole:  # what is asked is in them, once more if it also stands in another field
        system = optional_text(row, columns.get("system"))
        asked = [Message("system", system)] if system else []
    elif "messages" in columns or "prompt" in columns:
        asked = [*asked_messages(row, layout)]
    else:
        raise ValueError(f'field "{columns["chosen"]}" begins with an answer; what is asked is missing')
    chosen, rejected = ([*asked, *messages] for messages in said.values())
    for part, messages in zip(PAIR, (chosen, rejected)):
        try:
            check_order(messages)
        except ValueError as error:
            raise ValueError(f'field "{columns[part]}": {error}') from None
    shared = shared_messages(chosen, rejected)
    check_answers(chosen[:shared])
    tools = described_tools(row, columns.get("tools"))
    return PreferencePair([*tools, *chosen[:shared]], chosen[shared:], rejected[shared:])


def shared_messages(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """How many messages two conversations have in common before the answers in which they differ."""
    most = min(len(chosen), len(rejected)) - 1  # each has an answer of its own, even where they are alike
    shared = next((number for number in range(most) if chosen[number] != rejected[number]), most)
    if {chosen[shared].role, rejected[shared].role} != {"assistant"}:
        raise ValueError(
            f"message {shared} differs, and is no answer; chosen and rejected have to answer the same prompt"
        )
    return shared
