"""From a batch, or a store, back to its documents: what `minillm data inspect` prints."""

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from minillm.data.loader import Loader
from minillm.data.store import TokenStore
from minillm.tokenizer import Tokenizer

LEARNED = {True: ("\x1b[32m", "\x1b[0m"), False: ("⟦", "⟧")}  # around what is learned: in a terminal green


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
            text = shown(rows.store, first + excerpt.start, first + excerpt.stop, tokenizer, width, colour)
            yield f"  {excerpt.column:>6}  {excerpt.source}  tokens {excerpt.start}-{excerpt.stop - 1}  {text}"


def document_lines(
    store: TokenStore, count: int, tokenizer: Tokenizer, width: int = 1000, colour: bool = False
) -> Iterator[str]:
    """The first documents of a store, a line each: where it comes from, and how it reads."""
    for number in range(min(count, store.n_documents)):
        start, stop = store.document_offsets[number : number + 2].tolist()
        text = shown(store, start, stop, tokenizer, width, colour)
        yield f"{store.source(number)}  {stop - start} tokens  {text}"


def shown(store: TokenStore, start: int, stop: int, tokenizer: Tokenizer, width: int, colour: bool) -> str:
    """Tokens start .. stop - 1 as text in a line; where not all are learned, with marks around those that are."""
    mask = store.trained(start, stop) if hasattr(store, "trained") else None
    if mask is None:
        mask, marks = np.zeros(stop - start, np.uint8), ("", "")
    else:
        marks = LEARNED[colour]
    ids, text, left = store.tokens(start, stop).tolist(), "", width
    for learned, pairs in groupby(zip(ids, mask.tolist()), key=lambda pair: pair[1]):
        piece = repr(tokenizer.decode([id for id, _ in pairs], skip_special=False))[1:-1]
        piece = piece if len(piece) <= left else f"{piece[: left - 1]}…"
        text += f"{marks[0]}{piece}{marks[1]}" if learned else piece
        left -= len(piece)
        if left <= 0:
            break
    return text
