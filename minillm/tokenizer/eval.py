"""How well a tokenizer packs text: by file, and by the script that most of a document is written in.

Documents are read once, whatever their number, and only sums are kept.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np

from minillm.scripts import script_counts
from minillm.tokenizer.kinds import Tokenizer

BATCH = 2**20  # characters that are encoded in one call
LOSSES_SHOWN = 5
ROWS_SHOWN = 30
CONTEXT = 12  # characters shown of what did not come back


class Text(NamedTuple):
    """A document, or a part of a long one, and where it begins."""

    text: str
    file: str
    line: int


@dataclass
class Sums:
    """What is counted of a set of texts."""

    texts: int = 0
    n_bytes: int = 0
    characters: int = 0
    words: int = 0  # between white space, so that only scripts which write it have as many as they should
    tokens: int = 0
    parts: int = 0  # tokens that hold a part of a character
    unknown: int = 0  # tokens that stand for what the vocabulary cannot write
    lost: int = 0  # texts that do not come back as they were

    def add(self, other: "Sums") -> None:
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


@dataclass
class Measures:
    """What one tokenizer makes of the texts."""

    tokenizer: Tokenizer
    total: Sums = field(default_factory=Sums)
    by_file: dict[str, Sums] = field(default_factory=lambda: defaultdict(Sums))
    by_script: dict[str, Sums] = field(default_factory=lambda: defaultdict(Sums))
    losses: list[str] = field(default_factory=list)  # the first few texts that do not come back: where, and how
    used: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))  # (V,), the ids that occur
    seconds: float = 0.0  # of encoding alone


def measure(tokenizers: Sequence[Tokenizer], texts: Iterable[Text]) -> list[Measures]:
    """What each tokenizer makes of the same texts. Raises ValueError naming the text that one cannot encode."""
    found = [Measures(tokenizer, used=np.zeros(tokenizer.vocab_size, dtype=bool)) for tokenizer in tokenizers]
    classes = [id_classes(tokenizer) for tokenizer in tokenizers]
    for batch in batches(texts):
        scripts = [main_script(text.text) for text in batch]
        for measures, (part, unknown) in zip(found, classes):
            start = time.perf_counter()
            encoded = encode(measures.tokenizer, batch)
            measures.seconds += time.perf_counter() - start
            for text, script, ids in zip(batch, scripts, encoded):
                measures.used[ids] = True
                lost = loss(measures.tokenizer, text, ids)
                sums = Sums(
                    *(1, len(text.text.encode()), len(text.text), len(text.text.split()), len(ids)),
                    *(int(part[ids].sum()), int(unknown[ids].sum()), int(lost is not None)),
                )
                for each in (measures.total, measures.by_file[text.file], measures.by_script[script]):
                    each.add(sums)
                if lost is not None and len(measures.losses) < LOSSES_SHOWN:
                    measures.losses.append(lost)
    return found


def batches(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """The texts, some BATCH characters at a time."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode(tokenizer: Tokenizer, batch: list[Text]) -> list[np.ndarray]:
    try:
        return tokenizer.encode_arrays([text.text for text in batch])
    except ValueError:
        for text in batch:
            try:
                tokenizer.encode(text.text)
            except ValueError as error:
                raise ValueError(f"{text.file}:{text.line}: {error}") from None
        raise


def id_classes(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(V,) twice: True for ids that hold a part of a character; for special ones, that is, of text, the unknown one."""
    part = np.array([not is_utf8(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size)], dtype=bool)
    special = np.zeros(tokenizer.vocab_size, dtype=bool)
    special[list(tokenizer.special_tokens.values())] = True
    return part, special


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def main_script(text: str) -> str:
    """The script of more than half of the letters."""
    counts = script_counts(text)
    if not counts:
        return "no letters"
    name, count = next(iter(counts.items()))
    return name if 2 * count > sum(counts.values()) else "mixed"


def loss(tokenizer: Tokenizer, text: Text, ids: np.ndarray) -> str | None:
    """Where a text first differs from what its ids decode to; None where it comes back exactly."""
    back = tokenizer.decode(ids)
    if back == text.text:
        return None
    at = next((i for i, pair in enumerate(zip(text.text, back)) if pair[0] != pair[1]), min(len(text.text), len(back)))
    was, became = (repr(each[at : at + CONTEXT]) for each in (text.text, back))
    return f"{text.file}:{text.line}: character {at}: {was} comes back as {became}"


# --- for a person -----------------------------------------------------------------------------------------------------


def report(found: Sequence[Measures]) -> str:
    """Tables: what the first tokenizer makes of each file and script; beside another, where there is one."""
    first, *others = found
    lines = summary(first)
    for title, rows in (("by file", first.by_file), ("by script", first.by_script)):
        lines += ["", *table([title, *COLUMNS], [[name, *cells(sums)] for name, sums in shown(rows, first.total)])]
    for other in others:
        lines += ["", f"against {other.tokenizer.kind}, {other.tokenizer.vocab_size:,} ids, below as B:"]
        lines += summary(other)
        rows = [*shown(first.by_file, first.total), *list(shown(first.by_script, first.total))[:-1]]
        theirs = {"all": other.total, **other.by_file, **other.by_script}
        lines += ["", *table(["bytes/token", "A", "B", "tokens A/B"], [compared(n, a, theirs[n]) for n, a in rows])]
    return "\n".join(lines)


COLUMNS = ("texts", "MB", "bytes/token", "chars/token", "tokens/word", "parts", "unknown", "not exact")


def cells(sums: Sums) -> list[str]:
    return [
        f"{sums.texts:,}",
        f"{sums.n_bytes / 1e6:.2f}",
        ratio(sums.n_bytes, sums.tokens),
        ratio(sums.characters, sums.tokens),
        ratio(sums.tokens, sums.words),
        f"{sums.parts / max(1, sums.tokens):.2%}",
        f"{sums.unknown / max(1, sums.tokens):.2%}",
        f"{sums.lost:,}",
    ]


def summary(measures: Measures) -> list[str]:
    total, tokenizer = measures.total, measures.tokenizer
    trip = f"{total.lost:,} of {total.texts:,} texts do NOT come back" if total.lost else "exact"
    speed = f"{total.n_bytes / 1e6 / measures.seconds:.1f} MB/s" if measures.seconds else "-"
    facts = {
        "tokenizer": f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids, hash {tokenizer.hash[:12]}",
        "text": f"{total.n_bytes:,} bytes, {total.characters:,} characters, {total.tokens:,} tokens",
        "ids used": f"{int(measures.used.sum()):,} of {tokenizer.vocab_size:,}",
        "speed": speed,
        "round trip": trip,
    }
    return [f"{name:<15} {fact}" for name, fact in facts.items()] + [f"{'':15} {line}" for line in measures.losses]


def compared(name: str, ours: Sums, theirs: Sums) -> list[str]:
    sides = (ratio(sums.n_bytes, sums.tokens) for sums in (ours, theirs))
    return [name, *sides, ratio(ours.tokens, theirs.tokens)]


def ratio(a: float, b: float) -> str:
    return f"{a / b:.2f}" if b else "-"


def shown(rows: dict[str, Sums], total: Sums) -> Iterator[tuple[str, Sums]]:
    """The rows with most text, the largest first, and at the end all."""
    largest = sorted(rows.items(), key=lambda row: -row[1].n_bytes)
    yield from largest[:ROWS_SHOWN]
    yield "all", total


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Columns of equal width, the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in [head, *rows]
    ]
