"""From the `data` and `tokenizer` sections to a tokenizer and prepared tokens: all that happens before training."""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from minillm.data.config import ConversationsConfig, DataConfig, PreferencesConfig, StoriesOrTextConfig
from minillm.data.mixture import PLACES, Source, refuse_too_many, shares, whole_places
from minillm.data.shards import corpus_files, prepare, size_of_text
from minillm.data.store import Prepared, is_prepared, marks_of, open_prepared, read_index
from minillm.data.stories import write_pairs, write_questions, write_stories
from minillm.data.text import documents, named_files
from minillm.files import atomic_directory, locked
from minillm.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer

logger = logging.getLogger("minillm")

Section = TypeVar("Section", bound=StoriesOrTextConfig)
Result = TypeVar("Result")
Rows = TypeVar("Rows", bound=ConversationsConfig)
QUESTIONS = "questions-1"
PAIRS = "pairs-1"
STORIES = "stories-2.jsonl"  # a new number whenever the stories change, so that a cache never holds older ones


def with_path(config: Section) -> Section:
    """The section with a path: without one, that of the embedded corpus, written where it is not there yet."""
    if config.path is not None:
        return config
    folder = Path(config.cache_dir).expanduser() / "stories"
    with locked(folder.with_name("stories.lock"), wait=True):
        if not (folder / STORIES).exists():
            with atomic_directory(folder) as temporary:
                write_stories(temporary / STORIES)
    return dataclasses.replace(config, path=str(folder / STORIES))


def with_questions(config: ConversationsConfig) -> ConversationsConfig:
    """The section with a path: without one, questions about the embedded corpus, written where they are not there yet.

    What is held out of them are questions that no story of the corpus answers.
    """
    return with_rows(config, QUESTIONS, write_questions)


def with_pairs(config: PreferencesConfig) -> PreferencesConfig:
    """The section with a path: without one, pairs of answers to questions as `with_questions` has them."""
    return with_rows(config, PAIRS, write_pairs)


def with_rows(config: Rows, name: str, write: Callable[[Path], None]) -> Rows:
    """The section with a path: without one, that of rows about the embedded corpus, with those that are held out."""
    if config.path is not None:
        return config
    folder = Path(config.cache_dir).expanduser() / name
    with locked(folder.with_name(f"{name}.lock"), wait=True):
        if not folder.exists():
            with atomic_directory(folder) as temporary:
                write(temporary)
    val = str(folder / "heldout") if config.val_split().kind == "auto" else config.val
    return dataclasses.replace(config, path=str(folder / "train.jsonl"), val=val)


def prepared_folder(config: DataConfig) -> Path | None:
    """The folder of prepared tokens that data.path, or the path of a source, is; the first of several."""
    paths = [source.entries() for source in config.by_source().values()]
    return next((Path(path[0]) for path in paths if len(path) == 1 and is_prepared(path[0])), None)


def corpus_bytes(config: DataConfig) -> int:
    """About how much text there is, from the sizes of the files. Raises ValueError for a path without text."""
    if config.mixed:
        return sum(map(corpus_bytes, config.by_source().values()))
    if folder := prepared_folder(config):
        return sum(split["n_bytes"] for split in open_prepared(folder).info["splits"].values())
    return size_of_text(named_files("data.path", config.path))


def open_tokenizer(data: DataConfig, config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of the config: loaded from its path, else trained on the corpus once and kept in data.cache_dir."""
    if config.path is not None or config.kind == "byte":
        return train_tokenizer((), config)
    if folder := prepared_folder(data):
        return load_tokenizer(folder)
    identity = {
        "config": dataclasses.asdict(config),
        "settings": [data.document, data.text_field],
        "files": corpus_files(data),
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(data.cache_dir).expanduser() / f"tokenizer-{key}"
    with locked(folder.with_name(f"{folder.name}.lock"), wait=True):
        if not folder.exists():
            texts = (document.text for document in documents(named_files("data.path", data.path), data))
            tokenizer = train_tokenizer(texts, config)
            with atomic_directory(folder) as temporary:
                tokenizer.save(temporary)
    return load_tokenizer(folder)


def open_corpus(data: DataConfig, config: TokenizerConfig) -> tuple[Tokenizer, list[Source]]:
    """The tokenizer, and the tokens of each source: made on the first call, opened on later ones."""
    data = with_path(data)
    tokenizer = open_tokenizer(data, config)
    return tokenizer, open_sources(data, tokenizer)


def open_sources(
    data: DataConfig, tokenizer: Tokenizer, prepare: Callable[[DataConfig, Tokenizer], Prepared] = prepare
) -> list[Source]:
    """The sources with their places in the mixture; a corpus that is not mixed is a single one, without a name."""
    sections = data.by_source()
    refuse_too_many(len(sections))
    if data.mixed:
        refuse_shared_files(of_each(source_files, sections))
    found = of_each(lambda section: prepare(section, tokenizer), sections)
    for prepared in found.values():
        if not (prepared.directory / "tokenizer.json").exists():
            tokenizer.save(prepared.directory)  # so that the folder is enough to train on
    sizes = [prepared.train.n_tokens for prepared in found.values()]
    wanted = shares(sizes, data.weights, data.temperature)
    places = whole_places(wanted)
    for name, share, count in zip(found, wanted, places):
        if count > 2 * share * PLACES:
            logger.warning("source %s: %.3g%% of the samples is the least, not %.3g%%", name, 100 / PLACES, 100 * share)
    return [Source(name, count, prepared) for (name, prepared), count in zip(found.items(), places)]


def of_each(function: Callable[[DataConfig], Result], sections: dict[str, DataConfig]) -> dict[str, Result]:
    """function(section) of each source, whose name stands before what is wrong with it."""
    found = {}
    for name, section in sections.items():
        try:
            found[name] = function(section)
        except ValueError as error:
            if not name:
                raise
            raise ValueError(f"source {name}: {error}") from None
    return found


def source_files(section: DataConfig) -> list[str]:
    """The files of a source, or those that its prepared tokens were made of."""
    if folder := prepared_folder(section):
        return [file["path"] for file in read_index(folder)["files"]]
    return [str(path) for path in named_files("data.path", section.path)]


def refuse_shared_files(files: dict[str, list[str]]) -> None:
    """Raises ValueError where two sources have a file in common: one would train on what the other holds out."""
    owners: dict[str, str] = {}
    for name, paths in files.items():
        for path in paths:
            owner = owners.setdefault(os.path.abspath(path), name)
            if owner != name:
                raise ValueError(
                    f"data.path: {path} is in source {owner} and in source {name}; put it into one of them "
                    "and give that a larger weight"
                )


def identity(sources: list[Source]) -> dict[str, str | None]:
    """What a run that is continued must agree on: the tokens of every source, and how they are mixed."""
    hashes = [content_hash(source.prepared) for source in sources]
    if len(sources) == 1:
        return {"data_hash": hashes[0], "data.mixture": None}
    places = ", ".join(f"{source.name} {source.places}" for source in sources)
    mixture = f"{places} of {PLACES} samples, each source in its own order"
    return {"data_hash": hashlib.sha256(" ".join(hashes).encode()).hexdigest(), "data.mixture": mixture}


def content_hash(prepared: Prepared) -> str:
    """A hash of the tokens themselves and of their split: the same for the same text under another name."""
    splits = prepared.info["splits"].values()
    parts = [part["sha256"] for split in splits for part in (*split["shards"], split["offsets"])]
    parts += [mark["sha256"] for split in splits for mark in marks_of(split)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()
