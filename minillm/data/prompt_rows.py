"""Prompts from the rows of files, and the pairs that become of them.

A row is a conversation in any of the usual formats, with or without its last answer; of a preference the chosen answer
counts as given. `--columns` and dataset_info.json name other fields, as for conversations.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minillm.data.chat import check_places
from minillm.data.chat_templates import FOLLOWS, ChatTemplate, Message
from minillm.data.conversations import (
    asked_messages,
    check_answers,
    check_order,
    checked_row,
    described_tools,
    said_messages,
)
from minillm.data.formats import CONVERSATIONS, Formats, Layout, layout_of, read_columns, recognised
from minillm.data.records import records

# How prompts are written in each usual format, whatever answers them.
ASKED = {
    name: {part: field for part, field in columns.items() if part != "response"}
    for name, columns in CONVERSATIONS.usual.items()
    if name != "text"
}
PROMPTS = Formats(
    "a prompt",
    {f"{name}, chosen": {**columns, "response": "chosen"} for name, columns in ASKED.items()}
    | {name: CONVERSATIONS.usual[name] for name in ASKED}
    | {f"{name}, no answer": columns for name, columns in ASKED.items()},
    ({"prompt", "response"}, {"messages", "response"}, {"messages"}, {"prompt"}),
    "prompt or messages",
)


class PromptRow(NamedTuple):
    """What is asked in a row of a file, and the answer that it gives."""

    source: str  # file:line
    row: Mapping[str, Any]
    prompt: list[Message]
    answer: str | None  # None: there is none, or it calls tools


class PromptFiles(NamedTuple):
    """Files of prompts, and how they are read."""

    files: Sequence[Path]
    columns: Sequence[str] = ()  # PART=FIELD each, where the format is not a usual one
    max_samples: int | None = None
    skip_bad: bool = False
    answered: bool = False  # a row without an answer is a bad one
    template: ChatTemplate | None = None  # and so is one that this has no place for

    def rows(self, bad: list[str] | None = None) -> Iterator[PromptRow]:
        """The prompts, in order; what is wrong with rows that are skipped joins `bad`.

        Raises ValueError naming file and line.
        """
        columns = read_columns(self.columns, PROMPTS)
        found = 0
        for file in self.files:
            layout = layout_of(file, columns, PROMPTS)
            for line, row in records(file):
                if found == self.max_samples:
                    return
                source = f"{file}:{line}"
                try:
                    prompt_row = read_prompt(row, layout, source)
                    if self.template is not None:
                        check_places(self.template, prompt_row.prompt)
                    if self.answered and prompt_row.answer is None:
                        raise ValueError("there is no answer in text to compare others with")
                except ValueError as error:
                    problem = f"{source}: {error}"
                    if not self.skip_bad:
                        raise ValueError(f"{problem}; fix the row, or leave out such rows with --on_bad skip") from None
                    if bad is not None:
                        bad.append(problem)
                    continue
                found += 1
                yield prompt_row


def read_prompt(row: object, layout: Layout | None = None, source: str = "") -> PromptRow:
    """What a row asks. Raises ValueError, without the place of the row, where nothing is asked."""
    row = checked_row(row)
    layout = layout or recognised(row, PROMPTS)
    messages, field = [*asked_messages(row, layout)], layout.columns.get("response")
    if field is not None and row.get(field) not in (None, "", []):
        messages += said_messages(row, "response", "assistant", layout)
    answer = messages.pop() if messages and messages[-1].role == "assistant" else None
    last = messages[-1].role if messages else None
    if last not in FOLLOWS["assistant"]:
        raise ValueError(f"the last message is of {last or 'nobody'}; one of the user, to be answered, is missing")
    check_order([*messages, Message("assistant", "")])
    check_answers(messages)
    tools = described_tools(row, layout.columns.get("tools"))
    text = None if answer is None or answer.calls or not answer.content.strip() else answer.content
    return PromptRow(source, row, [*tools, *messages], text)


def asked_as(prompt: Sequence[Message]) -> dict[str, Any]:
    """The fields of a row that say what is asked: a text where there is but one question, else messages."""
    tools = [json.loads(line) for one in prompt if one.role == "tools" for line in one.content.split("\n")]
    said = [one for one in prompt if one.role != "tools"]
    alone = len(said) == 1 and said[0].role == "user"
    return {"prompt": said[0].content if alone else list(map(as_row, said))} | ({"tools": tools} if tools else {})


def as_row(message: Message) -> dict[str, Any]:
    """A message as files hold it."""
    calls = [json.loads(call) for call in message.calls]
    return {"role": message.role, "content": message.content} | ({"tool_calls": calls} if calls else {})
