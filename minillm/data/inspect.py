"""From a batch, or a store, back to its documents: what `minillm data inspect` prints."""

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from minillm.data.loader import Loader
from minillm.data.rows import beside
from minillm.data.store import TokenStore
from minillm.data.trees import CHOSEN, Tree, read_tree
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
            if beside(rows.store, "branches", 0, 0) is not None:
                yield place
                yield from tree_lines(read_tree(rows.store, excerpt.document), tokenizer, width, colour)
            else:
                start, stop = first + excerpt.start, first + excerpt.stop
                yield f"{place}  {shown(rows.store, start, stop, tokenizer, width, colour)}"


def document_lines(
    store: TokenStore, count: int, tokenizer: Tokenizer, width: int = 1000, colour: bool = False
) -> Iterator[str]:
    """The first documents of a store: where each comes from, and how it reads."""
    for number in range(min(count, store.n_documents)):
        start, stop = store.document_offsets[number : number + 2].tolist()
        place = f"{store.source(number)}  {stop - start} tokens"
        if beside(store, "branches", 0, 0) is not None:
            yield place
            yield from tree_lines(read_tree(store, number), tokenizer, width, colour)
        else:
            yield f"{place}  {shown(store, start, stop, tokenizer, width, colour)}"


def shown(store: TokenStore, start: int, stop: int, tokenizer: Tokenizer, width: int, colour: bool) -> str:
    """Tokens start .. stop - 1 as text in a line; where not all are learned, with marks around those that are."""
    tokens, trained = store.tokens(start, stop), beside(store, "trained", start, stop)
    marks = ("", "") if trained is None else around(CHOSEN, colour)
    return text_of(tokens, np.zeros(len(tokens)) if trained is None else trained, tokenizer, width, marks)


def tree_lines(tree: Tree, tokenizer: Tokenizer, width: int, colour: bool) -> Iterator[str]:
    """A prompt and its answers, a line each, with marks around what is learned."""
    yield f"{BRANCHES[0]:>15}  {text_of(tree.prompt, np.zeros(len(tree.prompt)), tokenizer, width, ('', ''))}"
    for branch, tokens, learned in tree.answers:
        text = text_of(tokens, learned, tokenizer, width, around(branch, colour))
        yield f"{BRANCHES[branch]:>15}  {text}"


def around(branch: int, colour: bool) -> tuple[str, str]:
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
