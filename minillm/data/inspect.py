"""From a batch, or a store, back to its documents: what `minillm data inspect` prints."""

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from minillm.data.loader import Loader
from minillm.data.rows import beside
from minillm.data.store import TokenStore
from minillm.tokenizer import Tokenizer

BRANCHES = ("prompt", "chosen", "rejected", "another's")
COLOURS = ("", "\x1b[32m", "\x1b[31m", "\x1b[33m")  # in a terminal, of what is learned in a branch: green, red, yellow
END = "\x1b[0m"


def inspect_lines(
    loader: Loader, cursor: int, tokenizer: Tokenizer, width: int = 100, colour: bool = False
) -> Iterator[str]:
    """A few lines for each sample: where each piece of its row comes from, and how it reads (`width` characters)."""
    for sample in loader.documents(cursor):
        used = sum(excerpt.stop - excerpt.start for excerpt in sample.excerpts)
        padding = f", {loader.seq_len - used} padding" if used < loader.seq_len else ""
        rows = loader.rows[sample.source]
        source = f"source {rows.name}, " if rows.name else ""
        yield f"sample {sample.k}: {source}epoch {sample.epoch}, row {sample.row}, {used} tokens{padding}"
        for excerpt in sample.excerpts:
            first = int(rows.store.document_offsets[excerpt.document])
            place = f"  {excerpt.column:>6}  {excerpt.source}  tokens {excerpt.start}-{excerpt.stop - 1}"
            yield from shown(rows.store, place, first + excerpt.start, first + excerpt.stop, tokenizer, width, colour)


def document_lines(
    store: TokenStore, count: int, tokenizer: Tokenizer, width: int = 1000, colour: bool = False
) -> Iterator[str]:
    """The first documents of a store: where each comes from, and how it reads."""
    for number in range(min(count, store.n_documents)):
        start, stop = store.document_offsets[number : number + 2].tolist()
        place = f"{store.source(number)}  {stop - start} tokens"
        yield from shown(store, place, start, stop, tokenizer, width, colour)


def shown(
    store: TokenStore, place: str, start: int, stop: int, tokenizer: Tokenizer, width: int, colour: bool
) -> Iterator[str]:
    """A line with a place and the text of its tokens start .. stop - 1; a tree has another for each of its parts.

    Where not all is learned there are marks around what is.
    """
    tokens = store.tokens(start, stop)
    trained, branches = (beside(store, name, start, stop) for name in ("trained", "branches"))
    if branches is None:
        marks = ("", "") if trained is None else marks_of(1, colour)
        trained = np.zeros(len(tokens), np.uint8) if trained is None else trained
        yield f"{place}  {text_of(tokens, trained, tokenizer, width, marks)}"
        return
    yield place
    begins = np.flatnonzero(np.diff(branches, prepend=0))  # of answers, each with the prompt's last token before it
    ends = [*begins[1:].tolist(), len(tokens)]
    prompt = tokens[: begins[0] + 1]
    yield f"{BRANCHES[0]:>15}  {text_of(prompt, np.zeros(len(prompt), np.uint8), tokenizer, width, ('', ''))}"
    for begin, end in zip(begins.tolist(), ends):
        branch, answer = int(branches[begin]), slice(begin + 1, end)
        text = text_of(tokens[answer], trained[answer], tokenizer, width, marks_of(branch, colour))
        yield f"{BRANCHES[branch]:>15}  {text}"


def marks_of(branch: int, colour: bool) -> tuple[str, str]:
    """What stands around what is learned: in a terminal a colour."""
    return (COLOURS[branch], END) if colour else ("⟦", "⟧")


def text_of(tokens: np.ndarray, trained: np.ndarray, tokenizer: Tokenizer, width: int, marks: tuple[str, str]) -> str:
    """Tokens in a line of at most `width` characters, with marks around those that are learned."""
    text, left = "", width
    for learned, pairs in groupby(zip(tokens.tolist(), trained.tolist()), key=lambda pair: pair[1]):
        piece = repr(tokenizer.decode([id for id, _ in pairs], skip_special=False))[1:-1]
        piece = piece if len(piece) <= left else f"{piece[: left - 1]}…"
        text += f"{marks[0]}{piece}{marks[1]}" if learned else piece
        left -= len(piece)
        if left <= 0:
            break
    return text
