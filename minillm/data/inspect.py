"""From a batch back to its documents: what `minillm data inspect` prints of any step of a run."""

from collections.abc import Iterator

from minillm.data.loader import Loader
from minillm.tokenizer import Tokenizer


def inspect_lines(loader: Loader, cursor: int, tokenizer: Tokenizer, width: int = 100) -> Iterator[str]:
    """A few lines for each sample: where each piece of its row comes from, and how it reads (`width` characters)."""
    for sample in loader.documents(cursor):
        used = sum(excerpt.stop - excerpt.start for excerpt in sample.excerpts)
        padding = f", {loader.seq_len - used} padding" if used < loader.seq_len else ""
        rows = loader.rows[sample.source]
        source = f"source {rows.name}, " if rows.name else ""
        yield f"sample {sample.k}: {source}epoch {sample.epoch}, row {sample.row}, {used} tokens{padding}"
        for excerpt in sample.excerpts:
            first = int(rows.store.document_offsets[excerpt.document])
            ids = rows.store.tokens(first + excerpt.start, first + excerpt.stop).tolist()
            text = repr(tokenizer.decode(ids, skip_special=False))[1:-1]
            shown = text if len(text) <= width else f"{text[: width - 1]}…"
            yield f"  {excerpt.column:>6}  {excerpt.source}  tokens {excerpt.start}-{excerpt.stop - 1}  {shown}"
