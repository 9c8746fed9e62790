"""From the `data` and `tokenizer` sections to a tokenizer and prepared tokens: all that happens before training."""

import dataclasses
import hashlib
import json
from pathlib import Path

from minillm.data.config import DataConfig
from minillm.data.shards import corpus_files, prepare
from minillm.data.store import Prepared
from minillm.data.stories import write_stories
from minillm.data.text import documents, find_files
from minillm.files import locked
from minillm.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer

STORIES = "stories.jsonl"
GZIP_RATIO = 3  # text is about this much larger than its .gz


def with_path(config: DataConfig) -> DataConfig:
    """The section with a path: without one, that of the embedded corpus, written where it is not there yet."""
    if config.path is not None:
        return config
    path = Path(config.cache_dir).expanduser() / STORIES
    with locked(path.with_suffix(".lock"), wait=True):
        if not path.exists():
            write_stories(path)
    return dataclasses.replace(config, path=str(path))


def corpus_bytes(config: DataConfig) -> int:
    """About how much text there is, from the sizes of the files. Raises ValueError for a path without text."""
    return sum(f.stat().st_size * (GZIP_RATIO if f.suffix == ".gz" else 1) for f in find_files(config.path))


def open_tokenizer(data: DataConfig, config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of the config: loaded from its path, else trained on the corpus once and kept in data.cache_dir."""
    if config.path is not None or config.kind == "byte":
        return train_tokenizer((), config)
    identity = {
        "config": dataclasses.asdict(config),
        "settings": [data.document, data.text_field],
        "files": corpus_files(data),
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(data.cache_dir).expanduser() / f"tokenizer-{key}"
    with locked(folder.with_name(f"{folder.name}.lock"), wait=True):
        if not folder.exists():
            train_tokenizer((document.text for document in documents(find_files(data.path), data)), config).save(folder)
    return load_tokenizer(folder)


def open_corpus(data: DataConfig, config: TokenizerConfig) -> tuple[Tokenizer, Prepared]:
    """The tokenizer, and the tokens of the corpus: made on the first call, opened on later ones."""
    tokenizer = open_tokenizer(data, config)
    return tokenizer, prepare(data, tokenizer)
