"""`minillm tokenizer ...`: train one, say what one is, measure it."""

from dataclasses import dataclass, field
from typing import Annotated

from minillm.cli.verb import Verb
from minillm.data.config import StoriesOrTextConfig
from minillm.data.corpus import with_path
from minillm.data.text import documents, named_files
from minillm.files import free_directory
from minillm.tokenizer import TokenizerConfig, describe, load_tokenizer, train_tokenizer
from minillm.tokenizer.eval import Text, measure, report


@dataclass(frozen=True)
class TokenizerTrain:
    """Options of `tokenizer train`."""

    out: Annotated[str, "folder to write"]
    data: StoriesOrTextConfig = field(default_factory=StoriesOrTextConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)


@dataclass(frozen=True)
class TokenizerInfo:
    """Options of `tokenizer info`."""

    path: Annotated[str, "tokenizer folder or run"]


@dataclass(frozen=True)
class TokenizerEval:
    """Options of `tokenizer eval`."""

    path: Annotated[str, "tokenizer folder or run"]
    against: Annotated[str | None, "another tokenizer to set beside it"] = None
    data: StoriesOrTextConfig = field(default_factory=StoriesOrTextConfig)


def tokenizer_train(options: TokenizerTrain) -> None:
    """Train a tokenizer on text and save it."""
    out = free_directory(options.out)
    data = with_path(options.data)
    texts = (document.text for document in documents(named_files("data.path", data.path), data))
    tokenizer = train_tokenizer(texts, options.tokenizer)
    tokenizer.save(out)
    print(f"{options.out}\n{describe(tokenizer)}")


def tokenizer_info(options: TokenizerInfo) -> None:
    """Say what a tokenizer is."""
    print(describe(load_tokenizer(options.path)))


def tokenizer_eval(options: TokenizerEval) -> None:
    """Measure how well a tokenizer packs text, and whether the text comes back."""
    tokenizers = [load_tokenizer(path) for path in (options.path, options.against) if path is not None]
    data = with_path(options.data)
    found = documents(named_files("data.path", data.path), data)
    measures = measure(tokenizers, (Text(document.text, document.file, document.line) for document in found))
    if not measures[0].total.texts:
        raise ValueError(f"data.path: no text in {data.path}, so there is nothing to measure")
    print(report(measures))


VERBS = {
    "tokenizer train": Verb(tokenizer_train, TokenizerTrain, ["out"], "OUT --data.path TEXT: train a tokenizer"),
    "tokenizer info": Verb(tokenizer_info, TokenizerInfo, ["path"], "PATH: what a tokenizer is"),
    "tokenizer eval": Verb(
        tokenizer_eval, TokenizerEval, ["path"], "PATH --data.path TEXT [--against OTHER]: how well it packs text"
    ),
}
