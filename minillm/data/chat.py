"""A conversation as tokens by a chat template: which of them are learned, and the prompt that an answer continues.

What was said is text and never becomes a special token, whatever it spells. Text is encoded from one special token to
the next in one piece, as Hugging Face's tokenizers do, so that the ids are those of transformers' apply_chat_template;
but it is cut where an answer begins, since that is where a model begins to write.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np

from minillm.config import nearest
from minillm.data.chat_templates import TEMPLATES, ChatTemplate, Message
from minillm.tokenizer import Tokenizer

TrainOn = Literal["assistant", "last", "all"]
TemplateName = Annotated[
    Literal["auto", *TEMPLATES], "format of a conversation; auto: that of the model, else of its tokenizer, or chatml"
]


# --- a template for a tokenizer ---------------------------------------------------------------------------------------


def find_template(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """The template of that name. Raises ValueError where there is none, or where the tokenizer lacks its tokens."""
    if name not in TEMPLATES:
        raise ValueError(f"template: {name!r} is not known{nearest(name, TEMPLATES)} ({', '.join(TEMPLATES)})")
    if missing := missing_marks(TEMPLATES[name], tokenizer):
        fitting = ", ".join(other for other in TEMPLATES if not missing_marks(TEMPLATES[other], tokenizer))
        raise ValueError(
            f"template: the tokenizer has no {', '.join(missing)}, which {name} needs"
            + (f"; it has what these need: {fitting}" if fitting else "")
        )
    return TEMPLATES[name]


def missing_marks(template: ChatTemplate, tokenizer: Tokenizer) -> list[str]:
    """What a template needs and a tokenizer has not."""
    missing = [mark for mark in template.marks if mark not in tokenizer.special_tokens]
    return missing + ["token to end a text with"] * (tokenizer.eos_id is None)


def check_places(template: ChatTemplate, messages: Sequence[Message]) -> None:
    """Raises ValueError for a message that the template has no place for."""
    for role in ("system", "tool"):
        if getattr(template, role) is None and any(message.role == role for message in messages):
            raise ValueError(f"the template {template.name} has no place for a {role} message")
    if template.about_tools is None and any(message.role == "tools" for message in messages):
        raise ValueError(f"the template {template.name} has no place for tools; tell of them in the system message")
    if template.call is None and any(message.calls for message in messages):
        ways = "write each into what the assistant says"
        raise ValueError(f"the template {template.name} has no format for calls of tools; {ways}")


def stop_ids(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The special tokens that end an answer."""
    return tuple(part for part in parts_of(template.answer, tokenizer) if isinstance(part, int))


# --- rendering --------------------------------------------------------------------------------------------------------


class Rendered(NamedTuple):
    """A conversation as tokens; answers[i] is (start, stop) of what is learned of the i-th."""

    tokens: np.ndarray
    answers: list[tuple[int, int]]

    def learned(self, train_on: TrainOn) -> list[tuple[int, int]]:
        """The answers that are learned."""
        return self.answers[-1:] if train_on == "last" else self.answers

    def trained(self, train_on: TrainOn = "assistant") -> np.ndarray:
        """(tokens,) bool: which tokens are learned; of `all` only the first, which follows nothing, is not."""
        trained = np.full(len(self.tokens), train_on == "all")
        trained[:1] = False
        for start, stop in self.learned(train_on):
            trained[start:stop] = True
        return trained


def render(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message], train_on: TrainOn = "assistant"
) -> tuple[list[int], list[bool]]:
    """(tokens, trained) of a conversation. Raises ValueError for a message that the template has no place for."""
    [rendered] = render_all(template, tokenizer, [messages])
    return rendered.tokens.tolist(), rendered.trained(train_on).tolist()


def prompt(template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The tokens that an answer to the last message continues."""
    asked = stretches(template, read_parts(template, tokenizer), messages, opened=True)
    return join(encode_all([asked], tokenizer)[0]).tokens.tolist()


def render_all(
    template: ChatTemplate, tokenizer: Tokenizer, conversations: Iterable[Sequence[Message]]
) -> list[Rendered]:
    """`render` of many, which is faster."""
    parts = read_parts(template, tokenizer)
    return list(map(join, encode_all([stretches(template, parts, one) for one in conversations], tokenizer)))


class Stretch(NamedTuple):
    """Text that is encoded in one piece, or one special token."""

    text: str
    id: int | None = None
    answer: bool = False  # belongs to what is learned
    goes_on: bool = False  # the text before it does not end with a special token
    first: bool = False  # nothing stands before it


CONTENT = object()  # the place of what was said, among the parts of a template's text
Part = str | int | object  # text, the id of a special token, or CONTENT


def parts_of(text: str, tokenizer: Tokenizer) -> list[Part]:
    """A text of a template, taken apart."""
    ids = {**tokenizer.special_tokens, "{bos}": tokenizer.bos_id, "{eos}": tokenizer.eos_id}
    names = sorted([*ids, "{content}"], key=len, reverse=True)  # the longest of those that begin alike
    found = re.split(f"({'|'.join(map(re.escape, names))})", text)
    return [CONTENT if part == "{content}" else ids.get(part, part) for part in found if part]


def read_parts(template: ChatTemplate, tokenizer: Tokenizer) -> dict[str, list[Part]]:
    """The parts of each text of a template."""
    texts = {value for value in vars(template).values() if isinstance(value, str)}
    return {text: parts_of(text, tokenizer) for text in texts}


def stretches(
    template: ChatTemplate, parts: dict[str, list[Part]], messages: Sequence[Message], opened: bool = False
) -> list[Stretch]:
    """A conversation, cut at special tokens and around answers; `opened`: with the beginning of the next answer."""
    found: list[Stretch] = []
    text, before = "", False

    def end_text() -> None:
        if text:
            goes_on = bool(found) and found[-1].id is None
            found.append(Stretch(text, None, before, goes_on, first=not found))

    for piece, answer in written(template, parts, messages, opened):
        if isinstance(piece, int) or answer != before:
            end_text()
            text, before = "", answer
        if isinstance(piece, int):
            found.append(Stretch("", piece, answer))
        else:
            text += piece
    end_text()
    return found


def written(
    template: ChatTemplate, parts: dict[str, list[Part]], messages: Sequence[Message], opened: bool
) -> Iterator[tuple[str | int, bool]]:
    """(text or id, whether it is learned) of all that a template makes of a conversation, in order."""

    def filled(text: str, said: Sequence[str | int] = (), answer: bool = False) -> Iterator[tuple[str | int, bool]]:
        for part in parts[text]:
            for piece in said if part is CONTENT else [part]:
                yield piece, answer

    def with_text(text: str, content: str) -> list[str | int]:
        return [piece for piece, _ in filled(text, [content])]

    check_places(template, messages)
    tools, system, rest = split_system(template, messages)
    yield from filled(template.begin)
    system_text = ""  # that still has to find its place in what the user says
    if system is not None and template.system_in_user:
        system_text = template.system.replace("{content}", system)
    elif system is not None:
        about_tools = with_text(template.about_tools, tools) if tools else []
        yield from filled(template.system, [system.strip() if template.strips else system, *about_tools])
    for number, (role, content, calls) in enumerate(rest):
        if template.strips:
            content = content.rstrip() if system_text else content.strip()
        if role == "user":
            yield from filled(template.user, [system_text + content])
            system_text = ""
        elif role == "assistant":
            said: list[str | int] = [content]
            for call in calls:
                said += ["\n" if said != [""] else "", *with_text(template.call, call)]
            yield from filled(template.opening)
            yield from filled(template.answer, said, answer=True)
            yield from filled(template.closing)
        elif role == "tool":
            if number == 0 or rest[number - 1].role != "tool":
                yield from filled(template.tools_begin)
            yield from filled(template.tool, [content])
            if number + 1 == len(rest) or rest[number + 1].role != "tool":
                yield from filled(template.tools_end)
    if opened:
        yield from filled(template.opening)


def split_system(template: ChatTemplate, messages: Sequence[Message]) -> tuple[str, str | None, Sequence[Message]]:
    """(the tools that there are, what the system says, the messages after both)."""
    tools, system = "", template.default_system
    if messages and messages[0].role == "tools":
        tools, messages = messages[0].content, messages[1:]
        system = system or ""
    if messages and messages[0].role == "system":
        system, messages = messages[0].content, messages[1:]
    return tools, system, messages


def encode_all(conversations: list[list[Stretch]], tokenizer: Tokenizer) -> list[list[tuple[Stretch, np.ndarray]]]:
    """Each stretch with its ids; texts that begin alike are encoded together."""
    flat = [stretch for conversation in conversations for stretch in conversation]
    outside = [i for i, stretch in enumerate(flat) if stretch.id is None and begins_with_space(stretch, tokenizer)]
    ids = dict(zip(outside, tokenizer.encode_arrays([flat[i].text for i in outside])))
    for i, stretch in enumerate(flat):
        if i not in ids:
            ids[i] = tokenizer.encode_inside(stretch.text) if stretch.id is None else np.array([stretch.id])
    pairs = iter([(stretch, ids[i]) for i, stretch in enumerate(flat)])
    return [[next(pairs) for _ in conversation] for conversation in conversations]


def begins_with_space(stretch: Stretch, tokenizer: Tokenizer) -> bool:
    """Whether a stretch is encoded as the beginning of a text is, which only matters to tokenizers that add a space."""
    if not tokenizer.adds_space or stretch.first:
        return True
    return tokenizer.adds_space_after_special and not stretch.goes_on


def join(encoded: list[tuple[Stretch, np.ndarray]]) -> Rendered:
    """The tokens of a conversation, and where its answers are."""
    answers: list[tuple[int, int]] = []
    at, inside = 0, False
    for stretch, ids in encoded:
        if stretch.answer:
            answers.append((answers.pop()[0] if inside else at, at + len(ids)))
        at, inside = at + len(ids), stretch.answer
    arrays = [ids for _, ids in encoded]
    return Rendered(np.concatenate(arrays) if arrays else np.empty(0, np.int32), answers)
