"""Preferences prepared once: rendered by a template, and stored as trees with their branches and what is learned."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle, groupby
from pathlib import Path
from typing import Literal

from minillm.data.chat import check_places
from minillm.data.chat_templates import ChatTemplate
from minillm.data.config import PreferencesConfig
from minillm.data.corpus import open_sources
from minillm.data.formats import Layout, layout_of
from minillm.data.mixture import Source
from minillm.data.preferences import PAIR, PREFERENCES, PreferencePair, preference_of
from minillm.data.record_store import Found, Kind, prepare_records
from minillm.data.records import records
from minillm.data.trees import PairsConfig, encode_preferences
from minillm.tokenizer import Tokenizer

Answers = Literal["pairs", "labels"]


def open_preferences(
    data: PreferencesConfig,
    pairs: PairsConfig,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    answers: Answers = "pairs",
) -> list[Source]:
    """The sources of preferences, prepared, with their places in the mixture: what the Loader takes.

    A loss compares `pairs`, or takes answers one by one by their `labels`; a pair is then two of these.
    Raises ValueError naming file and row for what cannot be learned from.
    """
    return open_sources(data, tokenizer, partial(prepare_records, kind=preferences(pairs, template, answers)))


def answers_in(file: str | Path, columns: Mapping[str, str]) -> Answers | None:
    """Whether the rows of a file are pairs or have labels, as its first one says; None where they hold neither."""
    if not columns:
        try:
            layout = layout_of(file, {}, PREFERENCES)
        except ValueError:  # what describes the file describes no preferences
            return None
        _, row = next(iter(records(file)), (0, {}))
        row = row if isinstance(row, Mapping) else {}
        columns = {part: field for part, field in layout.columns.items() if field in row} if layout else row
    if PAIR.keys() & columns.keys():
        return "pairs"
    return "labels" if "label" in columns else None


def preferences(pairs: PairsConfig, template: ChatTemplate, answers: Answers) -> Kind:
    """Rows that hold a preference each."""
    return Kind(
        name="preferences",
        section="dpo",
        marks="branches",
        settings={"template": template.name, "answers": answers, "long": pairs.long, "on_bad": pairs.on_bad},
        depends_on=dataclasses.asdict(template),
        read=partial(read, template, answers),
        said_in=said_in,
        told_apart_by=asked_in,
        encode=partial(encode_preferences, template, pairs.long),
        agreed=("template", "answers"),
        reasons={
            "equal": "have equal answers",
            "empty": "have an empty answer",
            "dropped": "are longer than data.seq_len {seq_len}",
            "emptied": "have no room for an answer in data.seq_len {seq_len}",
            "alike": "have answers that are equal in data.seq_len {seq_len}",
        },
        arranged=apart if answers == "labels" else iter,
    )


def read(template: ChatTemplate, answers: Answers, row: object, layout: Layout | None) -> PreferencePair:
    """The preference of a row. Raises ValueError where there is none, or none that suits template and loss."""
    preference = preference_of(row, layout)
    for part in preference:
        check_places(template, part)
    if answers == "pairs" and not preference.paired:
        raise ValueError("one answer with a label; the loss compares two, chosen and rejected (kto takes labels)")
    return preference


def said_in(preference: PreferencePair) -> str:
    """All that is asked and answered, but for answers to other prompts."""
    return "\n".join(part for said in preference[:3] for one in said for part in (one.content, *one.calls))


def asked_in(preference: PreferencePair) -> str:
    """What is asked; who answers it otherwise is held out together with it."""
    return "\n".join(one.content for one in preference.prompt)


# --- one by one -------------------------------------------------------------------------------------------------------


def apart(found: Iterator[Found]) -> Iterator[Found]:
    """The answers one by one, and beside each an answer to another prompt, by which a loss measures its KL.

    That is of the next prompt of the file, and for the last of an earlier one; none where the file has but one.
    """
    for _, of_file in groupby(found, key=lambda one: one.file):
        prompts = (list(rows) for _, rows in groupby(of_file, key=lambda one: one.example.prompt))
        first = here = next(prompts)
        before: list[Found] = []
        for following in prompts:
            yield from with_others(here, following)
            before, here = here, following
        yield from with_others(here, before if first[0].example.prompt == here[0].example.prompt else first)


def with_others(found: Sequence[Found], others: Sequence[Found]) -> Iterator[Found]:
    """The answers to a prompt one by one, each with one of those to another, if there are any."""
    for one, other in zip(found, cycle(others or [None])):
        for preference in one_by_one(one.example, other and other.example):
            yield one._replace(example=preference)


def one_by_one(one: PreferencePair, other: PreferencePair | None) -> Iterator[PreferencePair]:
    """Each answer of a preference by itself, and one of another."""
    chosen, rejected = (other.chosen, other.rejected) if other else ((), ())
    if one.chosen:
        yield one._replace(rejected=[], mismatched=chosen or rejected)
    if one.rejected:
        yield one._replace(chosen=[], mismatched=rejected or chosen)
