"""A conversation: what was said, what of it a model is given to go on from, and the file it is kept in."""

import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from minillm.data.chat import prompt, stop_ids
from minillm.data.chat_templates import FOLLOWS, ChatTemplate, Message, Role
from minillm.data.jinja import choose_template
from minillm.files import read_json
from minillm.load import taught_template
from minillm.tokenizer import Tokenizer


class Rendered(NamedTuple):
    """A conversation as a model reads it."""

    tokens: list[int]
    stop_token_ids: tuple[int, ...] = ()  # what ends the answer, beside the end of the text


# How a model is given a conversation; the models that were taught a format have templates of their own.
Template = Callable[[Tokenizer, Sequence[Message]], Rendered]


def continuation(tokenizer: Tokenizer, messages: Sequence[Message]) -> Rendered:
    """The template of a model that knows no conversations: one text, which it continues.

    Each message begins a line, but an answer follows its question at once. What is said is encoded as text, so that
    none of it can become a special token.
    """
    text = ""
    for message in messages:
        between = "\n" if text and message.role != "assistant" else ""
        text += between + message.content
    return Rendered(([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(text))


def template_for(folder: Path, wanted: str, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The chat template that `--template` says, None for plain text that is continued; auto: what the model was taught.

    Raises ValueError where the model was taught another than is wanted.
    """
    taught = taught_template(folder)
    if wanted == "none" or (wanted == "auto" and taught is None):
        return None
    return choose_template(wanted, tokenizer, taught)


def conversing(template: ChatTemplate | None) -> Template:
    """How a model that was taught this template is given a conversation."""
    if template is None:
        return continuation
    return lambda tokenizer, messages: Rendered(prompt(template, tokenizer, messages), stop_ids(template, tokenizer))


def fitting(
    template: Template, tokenizer: Tokenizer, messages: Sequence[Message], most_tokens: int
) -> tuple[Rendered, int]:
    """(the conversation, how many of its oldest messages had to be left out to fit); a system message stays.

    Raises ValueError where not even the newest message fits.
    """
    system = [message for message in messages[:1] if message.role == "system"]
    begins = [i for i, message in enumerate(messages) if message.role == "user"]

    def rendered(number: int) -> Rendered:
        return template(tokenizer, [*system, *messages[begins[number] :]])

    first = bisect_left(range(len(begins)), True, key=lambda number: len(rendered(number).tokens) <= most_tokens)
    if first == len(begins):
        n = len(rendered(first - 1).tokens)
        raise ValueError(f"the message takes {n} tokens, and there is room for {max(0, most_tokens)} before an answer")
    return rendered(first), begins[first] - len(system)


def to_json(messages: Sequence[Message]) -> str:
    """What a file holds of a conversation: {"messages": [{"role": ..., "content": ...}, ...]}."""
    rows = [{"role": message.role, "content": message.content} for message in messages]
    return json.dumps({"messages": rows}, indent=1, ensure_ascii=False) + "\n"


def read_conversation(path: str | Path) -> list[Message]:
    """The messages of a file. Raises ValueError where it holds no conversation."""
    rows = read_json(path).get("messages")
    if not isinstance(rows, list):
        raise ValueError(f'{path}: no conversation; {{"messages": [{{"role": ..., "content": ...}}]}} is expected')
    messages: list[Message] = []
    for number, row in enumerate(rows):
        role, content = (row.get("role"), row.get("content")) if isinstance(row, dict) else (None, None)
        if role not in FOLLOWS or not isinstance(content, str):
            raise ValueError(f"{path}: message {number}: role {', '.join(FOLLOWS)} and a content are expected")
        if not may_follow(role, messages):
            before = f"after {messages[-1].role}" if messages else "at the beginning"
            raise ValueError(f"{path}: message {number}: {role} {before}; user and assistant take turns")
        messages.append(Message(role, content))
    return messages


def may_follow(role: Role, messages: Sequence[Message]) -> bool:
    """Whether somebody may speak next: system only at the beginning, then user and assistant in turns."""
    return (messages[-1].role if messages else None) in FOLLOWS[role]
