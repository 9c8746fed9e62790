"""Conversations prepared once: rendered by a template, and stored with a mask of what is learned."""

import dataclasses
from functools import partial

from minillm.data.chat import check_places
from minillm.data.chat_templates import ChatTemplate
from minillm.data.config import ConversationsConfig
from minillm.data.conversations import Conversation, conversation_of
from minillm.data.corpus import open_sources
from minillm.data.formats import Layout
from minillm.data.masked import TurnsConfig, encode_conversations
from minillm.data.mixture import Source
from minillm.data.record_store import Kind, prepare_records
from minillm.tokenizer import Tokenizer


def open_conversations(
    data: ConversationsConfig, turns: TurnsConfig, template: ChatTemplate, tokenizer: Tokenizer
) -> list[Source]:
    """The sources of conversations, prepared, with their places in the mixture: what the Loader takes.

    Raises ValueError naming file and row for what cannot be learned from.
    """
    return open_sources(data, tokenizer, partial(prepare_records, kind=conversations(turns, template)))


def conversations(turns: TurnsConfig, template: ChatTemplate) -> Kind:
    """Rows that hold a conversation each."""
    return Kind(
        name="conversations",
        section="sft",
        marks="trained",
        settings={"template": template.name} | {name: getattr(turns, name) for name in ("train_on", "long", "on_bad")},
        depends_on=dataclasses.asdict(template),
        read=partial(read, template),
        said_in=said_in,
        told_apart_by=said_in,
        encode=partial(encode_conversations, template, turns.train_on, turns.long),
        agreed=("template", "train_on"),
        reasons={"dropped": "are longer than data.seq_len {seq_len}"},
    )


def read(template: ChatTemplate, row: object, layout: Layout | None) -> Conversation:
    """The conversation of a row. Raises ValueError where there is none, or none that the template has a place for."""
    conversation = conversation_of(row, layout)
    check_places(template, conversation.messages)
    return conversation


def said_in(conversation: Conversation) -> str:
    """All that was said."""
    said = (part for message in conversation.messages for part in (message.content, *message.calls))
    return "\n".join(said) or conversation.text
