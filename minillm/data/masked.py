"""Conversations as stored documents: their tokens, which of them are learned, and what is left out of long ones.

A conversation that is longer than a row is cut after an answer, never inside one, so that each that is learned ends as
it should; where not even its first answer fits, it is dropped. What comes after the last answer teaches nothing.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np

from minillm.data.chat import Rendered, TemplateName, TrainOn, render_all, stop_ids
from minillm.data.chat_templates import ChatTemplate
from minillm.data.conversations import Conversation
from minillm.tokenizer import Tokenizer


@dataclass(frozen=True)
class TurnsConfig:
    """What of a conversation is learned, and in which format it is given to the model."""

    template: TemplateName = "auto"
    train_on: Annotated[TrainOn, "what is learned: each answer of the assistant, the last, or all that is said"] = (
        "assistant"
    )
    long: Annotated[
        Literal["cut", "drop"], "a conversation longer than data.seq_len: cut after the last answer that fits, or drop"
    ] = "cut"
    on_bad: Annotated[
        Literal["error", "skip"], "a row that is no conversation: end with its place, or leave it out"
    ] = "error"


class Masked(NamedTuple):
    """Documents on their way from a worker to the files."""

    tokens: np.ndarray  # of all documents
    marks: np.ndarray  # uint8 a token: 1 where it is learned
    lengths: np.ndarray  # tokens of each document
    numbers: np.ndarray  # which of the conversations that were given each document is
    counts: dict[str, int]


def encode_conversations(
    template: ChatTemplate,
    train_on: TrainOn,
    long: str,
    tokenizer: Tokenizer,
    seq_len: int,
    conversations: Sequence[Conversation],
) -> Masked:
    """The documents of some conversations, in order, those left out that cannot be learned from."""
    spoken = iter(render_all(template, tokenizer, [one.messages for one in conversations if one.messages]))
    rendered = [next(spoken) if one.messages else plain_text(one.text, tokenizer) for one in conversations]
    ends = set(stop_ids(template, tokenizer)) | {tokenizer.eos_id}
    counts: Counter[str] = Counter()
    numbers, tokens, trained = [], [], []
    for number, (conversation, whole) in enumerate(zip(conversations, rendered)):
        # A row reads one token more than it has places. Plain text may go on in another row.
        limit = seq_len + 1 if conversation.messages else len(whole.tokens)
        kept = shortened(whole, limit, train_on, long)
        counts.update(tokens=len(whole.tokens))
        if kept is None:
            counts.update(dropped=1, truncated=len(whole.tokens))
            continue
        if kept.answers != whole.answers:
            counts.update(cut=1, truncated=len(whole.tokens) - len(kept.tokens))
        numbers.append(number)
        tokens.append(kept.tokens)
        trained.append(kept.trained(train_on))
        last = [stop - 1 for _, stop in kept.learned(train_on)]
        ended = sum(bool(trained[-1][at]) and int(kept.tokens[at]) in ends for at in last)
        counts.update(stored=len(kept.tokens), trained=int(trained[-1].sum()), answers=len(last), ended=ended)
    return Masked(
        np.concatenate([np.empty(0, np.int64), *tokens]),
        np.concatenate([np.empty(0, np.uint8), *trained]),
        np.array(list(map(len, tokens)), dtype=np.int64),
        np.array(numbers, dtype=np.int64),
        dict(counts),
    )


def plain_text(text: str, tokenizer: Tokenizer) -> Rendered:
    """A text that nobody said, as training on text has it: all of it is learned, and its end."""
    tokens = np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id])
    return Rendered(tokens, [(1, len(tokens))])


def shortened(whole: Rendered, limit: int, train_on: TrainOn, long: str) -> Rendered | None:
    """What of a conversation is stored: at most `limit` tokens, up to the end of an answer; None where none fits."""
    last = whole.answers[-1][1]
    end = len(whole.tokens) if train_on == "all" else last
    if end <= limit:
        return Rendered(whole.tokens[:end], whole.answers)
    fitting = [answer for answer in whole.answers if answer[1] <= limit]
    if (long == "drop" and len(fitting) < len(whole.answers)) or not fitting:
        return None
    return Rendered(whole.tokens[: fitting[-1][1]], fitting)
