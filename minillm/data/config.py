"""The `data` section: where text comes from and how it becomes rows of tokens. Who only reads text has less of it."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Annotated, ClassVar, Literal, NamedTuple

from minillm.data.formats import CONVERSATIONS, Formats, read_columns
from minillm.data.preferences import PREFERENCES


class ValSplit(NamedTuple):
    """What `data.val` says: kind auto, none, tail or hash with a fraction, or path."""

    kind: Literal["auto", "none", "tail", "hash", "path"]
    fraction: float = 0.0
    path: str = ""


PATHS = "files, folders or globs of .txt, .jsonl, .json, .csv, .parquet"


@dataclass(frozen=True)
class TextConfig:
    """Which text is read, and what is a document of it."""

    path: Annotated[str | list[str] | None, PATHS] = None
    document: Annotated[
        Literal["file", "line", "blank"], "one document of a .txt: the file, each line, or what blank lines separate"
    ] = "file"
    text_field: Annotated[str, "field of a JSON row, or column of a table, that holds the text"] = "text"


@dataclass(frozen=True)
class SharedTextConfig(TextConfig):
    """Text that several processes read."""

    workers: Annotated[int | None, "processes that read; none: all cores, one for a small corpus", ">= 1"] = None


@dataclass(frozen=True)
class StoriesOrTextConfig(TextConfig):
    """Text, or the embedded corpus where none is named."""

    path: Annotated[str | list[str] | None, f"{PATHS}; none: embedded stories"] = None
    cache_dir: Annotated[str, "where prepared tokens, and the stories, are kept for the next run"] = ".cache/minillm"


@dataclass(frozen=True)
class DataConfig(StoriesOrTextConfig, SharedTextConfig):
    """What is trained on, and how it is cut into rows."""

    sources: Annotated[
        list[str] | None, "a name for each entry of data.path, which makes it a source; entries may share one"
    ] = None
    weights: Annotated[list[float] | None, "how much is read of each source: a number each, of any sum"] = None
    temperature: Annotated[
        float | None, "share of a source as its tokens to the power 1 / temperature: 1 as they come, 5 more even", "> 0"
    ] = None
    val: Annotated[
        str, "held out: a fraction (the tail of the text), 'hash F' (by each document's hash), a path, 0, or auto"
    ] = "auto"
    seq_len: Annotated[int | None, "tokens in a row; none: chosen for the size of the corpus", ">= 2"] = None
    packing: Annotated[bool, "rows of whole documents that do not see each other; false: one endless text"] = True

    def __post_init__(self):
        problems = self.mixture_problems()
        try:
            if self.val_split().kind == "path" and self.mixed and len(set(self.names())) > 1:
                raise ValueError(f"{self.val!r} is one text for several sources; give a fraction or 'hash F'")
        except ValueError as error:
            problems.append(f"val: {error}")
        if self.workers is not None and self.workers < 1:
            problems.append(f"workers: {self.workers} processes cannot tokenise; give 1 or more")
        if problems:
            raise ValueError("\n".join(problems))

    def val_split(self) -> ValSplit:
        """`val` read: a number is a tail fraction, `hash F` a fraction by hash, anything else a path."""
        text = str(self.val).strip()
        if text == "auto":
            return ValSplit("auto")
        if text.lower() in ("", "none", "false"):
            return ValSplit("none")
        hashed = re.fullmatch(r"hash\s+(\S+)", text)
        try:
            fraction = float(hashed.group(1) if hashed else text)
        except ValueError:
            if hashed:
                raise ValueError(f"{text!r}: a fraction is expected after hash, as in 'hash 0.05'") from None
            return ValSplit("path", path=text)
        if not 0 <= fraction < 1:
            raise ValueError(f"{text!r} is no fraction of the text; give 0 or more and less than 1")
        return ValSplit("hash" if hashed else "tail", fraction) if fraction else ValSplit("none")

    # --- several sources ----------------------------------------------------------------------------------------------

    @property
    def mixed(self) -> bool:
        """Whether each entry of `path` is a source, rather than all of them one corpus."""
        return any(value is not None for value in (self.sources, self.weights, self.temperature))

    def entries(self) -> list[str]:
        """`path` as a list."""
        return [self.path] if isinstance(self.path, str) else self.path or []

    def names(self) -> list[str]:
        """The name of the source that each entry of `path` belongs to."""
        return self.sources if self.sources is not None else unique(map(stem, self.entries()))

    def by_source(self) -> dict[str, "DataConfig"]:
        """A section for each source, by its name, in order of appearance; without `mixed` this one, under no name."""
        if not self.mixed:
            return {"": self}
        paths: dict[str, list[str]] = {}
        for name, entry in zip(self.names(), self.entries()):
            paths.setdefault(name, []).append(entry)
        return {
            name: replace(self, path=path, sources=None, weights=None, temperature=None) for name, path in paths.items()
        }

    def mixture_problems(self) -> list[str]:
        """What is wrong with the fields that say how sources are mixed."""
        if not self.mixed:
            return []
        if not self.entries():
            return ["path: sources, weights and temperature mix its entries; give the text of each source"]
        problems, names = [], list(dict.fromkeys(self.names()))
        if self.sources is not None and len(self.sources) != len(self.entries()):
            problems.append(f"sources: {len(self.sources)} given, but data.path has {len(self.entries())} entries")
        if not all(name.strip() for name in names):
            problems.append("sources: a name is empty")
        if self.weights is not None and not problems and len(self.weights) != len(names):
            given = f"{len(self.weights)} given, but the sources are {', '.join(names)}"
            problems.append(f"weights: {given}; give one for each")
        wrong = [weight for weight in self.weights or [] if not 0 < weight < math.inf]
        if wrong:
            problems.append(f"weights: {wrong[0]:g} is no weight; each must be more than 0, or leave the source out")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            problems.append(f"temperature: is {self.temperature:g}; it must be more than 0")
        if self.weights is not None and self.temperature is not None:
            problems.append("temperature: is given beside weights, and either decides the shares; leave one out")
        return problems


@dataclass(frozen=True)
class ConversationsConfig(DataConfig):
    """Conversations to learn answers from, and how they are cut into rows."""

    formats: ClassVar[Formats] = CONVERSATIONS

    path: Annotated[str | list[str] | None, "files, folders or globs of .jsonl, .json, .csv, .parquet"] = None
    columns: Annotated[
        list[str], "PART=FIELD each, where the format is not a usual one: prompt=ask,response=reply or messages=chat"
    ] = field(default_factory=list)
    max_samples: Annotated[int | None, "of each source, the first so many conversations; none: all", ">= 1"] = None

    def __post_init__(self):
        fixed = {"document": "file", "text_field": "text", "packing": True}
        problems = [
            f"{name}: a row is {self.formats.what}; leave it out"
            for name in fixed
            if getattr(self, name) != fixed[name]
        ]
        for check in (super().__post_init__, lambda: read_columns(self.columns, self.formats)):
            try:
                check()
            except ValueError as error:
                problems += str(error).splitlines()
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(frozen=True)
class PreferencesConfig(ConversationsConfig):
    """Preferences to learn from, and how they are cut into rows."""

    formats: ClassVar[Formats] = PREFERENCES

    columns: Annotated[
        list[str], "PART=FIELD each, where the format is not a usual one: prompt=ask,chosen=good,rejected=bad"
    ] = field(default_factory=list)
    max_samples: Annotated[int | None, "of each source, the first so many preferences; none: all", ">= 1"] = None


def stem(path: str) -> str:
    """A name for what is under a path: its last part that says something, without suffixes and wildcards."""
    parts = (re.sub(r"[^\w.-]+", "-", part.partition(".")[0]).strip("-_") for part in reversed(PurePath(path).parts))
    return next(filter(None, parts), "text")


def unique(names: Iterable[str]) -> list[str]:
    """The names, numbered from 2 on where one comes again: train, train-2."""
    found: dict[str, int] = {}  # the number that each has come to
    for name in names:
        numbered, number = name, found.get(name, 1)
        while numbered in found:
            number += 1
            numbered = f"{name}-{number}"
        found[name] = number
        found.setdefault(numbered, 1)
    return list(found)


# Up to so many bytes of text, that fraction is held out: the share shrinks, so that an evaluation stays short.
VAL_FRACTIONS = ((3e6, 0.05), (3e7, 0.01), (3e8, 0.005), (3e9, 0.001), (float("inf"), 0.0001))


def val_fraction(n_bytes: int) -> float:
    """The tail that `data.val = auto` holds out of a corpus of that many bytes."""
    return next(fraction for most, fraction in VAL_FRACTIONS if n_bytes <= most)
