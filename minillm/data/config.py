"""The `data` section: where text comes from and how it becomes rows of tokens."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple


class ValSplit(NamedTuple):
    """What `data.val` says: kind auto, none, tail or hash with a fraction, or path."""

    kind: Literal["auto", "none", "tail", "hash", "path"]
    fraction: float = 0.0
    path: str = ""


@dataclass(frozen=True)
class DataConfig:
    """What is trained on, and how it is cut into rows."""

    path: Annotated[
        str | list[str] | None, "files, folders or globs of .txt, .jsonl, .json, .csv, .parquet; none: embedded stories"
    ] = None
    document: Annotated[
        Literal["file", "line", "blank"], "one document of a .txt: the file, each line, or what blank lines separate"
    ] = "file"
    text_field: Annotated[str, "field of a JSON row, or column of a table, that holds the text"] = "text"
    val: Annotated[
        str, "held out: a fraction (the tail of the text), 'hash F' (by each document's hash), a path, 0, or auto"
    ] = "auto"
    seq_len: Annotated[int | None, "tokens in a row; none: chosen for the size of the corpus", ">= 2"] = None
    packing: Annotated[bool, "rows of whole documents that do not see each other; false: one endless text"] = True
    cache_dir: Annotated[str, "where prepared tokens are kept for the next run"] = ".cache/minillm"
    workers: Annotated[int | None, "processes that tokenise; none: all cores, one for a small corpus", ">= 1"] = None

    def __post_init__(self):
        problems = []
        try:
            self.val_split()
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


# Up to so many bytes of text, that fraction is held out: the share shrinks, so that an evaluation stays short.
VAL_FRACTIONS = ((3e6, 0.05), (3e7, 0.01), (3e8, 0.005), (3e9, 0.001), (float("inf"), 0.0001))


def val_fraction(n_bytes: int) -> float:
    """The tail that `data.val = auto` holds out of a corpus of that many bytes."""
    return next(fraction for most, fraction in VAL_FRACTIONS if n_bytes <= most)
