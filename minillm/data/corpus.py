"""From the `data` and `tokenizer` sections to a tokenizer and prepared tokens: all that happens before training."""

import dataclasses
import hashlib
import json
from pathlib import Path

from minillm.data.config import DataConfig
from minillm.data.shards import corpus_files, prepare, size_of_text
from minillm.data.store import Prepared, is_prepared, open_prepared
from minillm.data.stories import write_stories
from minillm.data.text import documents, find_files
from minillm.files import atomic_directory, locked
from minillm.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer

STORIES = "stories-2.jsonl"  # a new number whenever the stories change, so that a cache never holds older ones


def with_path(config: DataConfig) -> DataConfig:
    """The section with a path: without one, that of the embedded corpus, written where it is not there yet."""
    if config.path is not None:
        return config
    folder = Path(config.cache_dir).expanduser() / "stories"
    with locked(folder.with_name("stories.lock"), wait=True):
        if not (folder / STORIES).exists():
            with atomic_directory(folder) as temporary:
                write_stories(temporary / STORIES)
    return dataclasses.replace(config, path=str(folder / STORIES))


def prepared_folder(config: DataConfig) -> Path | None:
    """The folder of prepared tokens that data.path names, if it does."""
    paths = [config.path] if isinstance(config.path, str) else config.path or []
    return Path(paths[0]) if len(paths) == 1 and is_prepared(paths[0]) else None


def corpus_bytes(config: DataConfig) -> int:
    """About how much text there is, from the sizes of the files. Raises ValueError for a path without text."""
    if folder := prepared_folder(config):
        return sum(split["n_bytes"] for split in open_prepared(folder).info["splits"].values())
    return size_of_text(find_files(config.path))


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
            texts = (document.text for document in documents(find_files(data.path), data))
            tokenizer = train_tokenizer(texts, config)
            with atomic_directory(folder) as temporary:
                tokenizer.save(temporary)
    return load_tokenizer(folder)


def open_corpus(data: DataConfig, config: TokenizerConfig) -> tuple[Tokenizer, Prepared]:
    """The tokenizer, and the tokens of the corpus: made on the first call, opened on later ones."""
    data = with_path(data)
    tokenizer = open_tokenizer(data, config)
    prepared = prepare(data, tokenizer)
    if not (prepared.directory / "tokenizer.json").exists():
        tokenizer.save(prepared.directory)  # so that the folder is enough to train on
    return tokenizer, prepared


def content_hash(prepared: Prepared) -> str:
    """A hash of the tokens themselves and of their split: the same for the same text under another name."""
    splits = prepared.info["splits"].values()
    parts = [part["sha256"] for split in splits for part in (*split["shards"], split["offsets"])]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()
