"""How well a model predicts a text: read, tokenised and evaluated a stretch at a time, so that no text is too long.

The documents are those of training: read by the same rules, bos in front of each and eos behind, in rows of the same
kinds. A stretch is some documents as one array of tokens; one that a document is too long for is cut where a row would
end anyway, so that every row reads what it would read if the text were held whole.

    files ──► blocks ──► tokens ──► stretches ──► batches ──► evaluate
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from torch import nn
from tqdm import tqdm

from minillm.data.batch import Batch
from minillm.data.config import SharedTextConfig
from minillm.data.loader import eval_batches
from minillm.data.shards import SMALL_CORPUS, check_ends
from minillm.data.text import blocks, named_files
from minillm.data.tokenise import Encoded, Job, encode_block
from minillm.data.workers import Workers, count_workers
from minillm.eval.perplexity import evaluate
from minillm.losses import IGNORE_INDEX
from minillm.objectives import NextTokenAccuracy
from minillm.plan import micro_batch_size as rows_of_a_forward
from minillm.tokenizer import Tokenizer

STRETCH = 2**20  # tokens: a few MB, and so many rows that the last one, which may be short, costs little
TOKEN = np.dtype("<u4")


@dataclass(frozen=True)
class EvalTextConfig(SharedTextConfig):
    """The text to predict, and how it is cut into rows."""

    seq_len: Annotated[
        int | None, "tokens in a row; none: those of the run, or else the model's max_seq_len", ">= 1"
    ] = None
    packing: Annotated[bool, "rows of whole documents that do not see each other; false: one endless text"] = True


class Stretch(NamedTuple):
    """Consecutive tokens of the text, in memory: what `eval_batches` reads."""

    array: np.ndarray
    document_offsets: np.ndarray  # (n_documents + 1,): document i is tokens offsets[i] .. offsets[i + 1] - 1
    n_read: int  # bytes of the files, read since the stretch before

    @property
    def n_tokens(self) -> int:
        """How many tokens there are."""
        return len(self.array)

    @property
    def n_targets(self) -> int:
        """How many of them are predicted: all but the first of each document."""
        return self.n_tokens - len(self.document_offsets) + 1

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens start .. stop - 1."""
        return self.array[start:stop]


@dataclass
class Seen:
    """What was read of the text so far."""

    documents: int = 0
    n_bytes: int = 0

    def counting(self, encoded: Iterable[Encoded]) -> Iterator[Encoded]:
        """The blocks, counted as they pass."""
        for block in encoded:
            self.documents += int(block.pieces.starts.sum())
            self.n_bytes += int(block.pieces.n_bytes.sum())
            yield block


def evaluate_text(
    model: nn.Module,
    tokenizer: Tokenizer | None,
    text: EvalTextConfig,
    micro_batch_size: int | None = None,
    progress: bool | None = None,
) -> dict[str, float]:
    """How well a model predicts every token of a text, in bounded memory.

    Args:
        text: which files, what a document is, how long rows are; where `seq_len` is None, the model's max_seq_len.
        micro_batch_size: rows a forward; None: as many as keep the device busy.
        progress: whether a bar is shown; None: where there is a terminal.

    Returns: val_loss (nats a token), perplexity, val_bpb (bits a byte of the text), val_accuracy (the share of tokens
        that were the most likely), and how many tokens, bytes and documents there were. The eos of a document is a
        token that is predicted, and has no bytes.

    Run it inside the autocast whose precision is meant. Raises ValueError, before the model is asked anything, for a
    tokenizer or rows that do not fit it; and, naming file and line, for text that cannot be read.
    """
    seq_len = text.seq_len or model.config.max_seq_len
    check_fit(model, tokenizer, seq_len)
    files = text_files(text)
    size = sum(file.stat().st_size for file in files)
    device = next(model.parameters()).device
    rows = micro_batch_size or 2 * rows_of_a_forward(seq_len, STRETCH, device)  # no gradients are kept: more fits
    seen = Seen()

    def batches(encoded: Iterable[Encoded], bar: tqdm) -> Iterator[Batch]:
        for stretch in stretches(seen.counting(encoded), seq_len, text.packing):
            for batch in eval_batches(stretch, seq_len, text.packing, rows, device):
                yield batch
                bar.update(stretch.n_read * int((batch.targets != IGNORE_INDEX).sum()) / stretch.n_targets)
        if not seen.documents:
            raise ValueError(f"data.path: no text in {', '.join(map(str, files[:5]))}, so there is nothing to evaluate")

    disable = None if progress is None else not progress
    with (
        Workers(count_workers(text.workers, size, SMALL_CORPUS)) as workers,
        tqdm(total=size, unit="B", unit_scale=True, desc="evaluating", disable=disable, leave=False) as bar,
    ):
        jobs = (Job(block, False) for file in files for block in blocks(file, text))
        encoded = workers.map(partial(encode_block, text, tokenizer, TOKEN), jobs)
        objective = NextTokenAccuracy(model.config.vocab_size)
        result = evaluate(model, batches(encoded, bar), objective, device=device)
    bits = result["val_loss"] * result["tokens"] / math.log(2)
    return result | {"val_bpb": bits / seen.n_bytes, "bytes": seen.n_bytes, "documents": seen.documents}


def text_files(text: EvalTextConfig) -> list[Path]:
    """The files of the text. Raises ValueError where there are none."""
    if not text.path:
        raise ValueError("data.path: no path given; name files, folders or globs of text")
    return named_files("data.path", text.path)


def check_fit(model: nn.Module, tokenizer: Tokenizer | None, seq_len: int) -> None:
    """Raises ValueError for a model that cannot be evaluated so."""
    config = model.config
    if not config.causal:
        raise ValueError("a bidirectional model (causal = false) sees the tokens that it would have to predict")
    if tokenizer is None:
        raise ValueError("there is no tokenizer beside the model, so it cannot read text")
    check_ends(tokenizer)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}; not a pair")
    if seq_len > config.max_seq_len:
        raise ValueError(
            f"data.seq_len: {seq_len} is longer than the model's max_seq_len {config.max_seq_len}; give at most that"
        )


def stretches(encoded: Iterable[Encoded], seq_len: int, packing: bool) -> Iterator[Stretch]:
    """The tokens of all blocks, about STRETCH at a time; without packing, all documents are one.

    The last document of a stretch goes on in the next one where a row of it ends: with that row's last target.
    """
    held: list[np.ndarray] = []
    offsets = [] if packing else [0]
    n_held = n_read = 0
    for block in encoded:
        pieces = block.pieces
        if packing:
            begins = n_held + np.cumsum(pieces.lengths) - pieces.lengths
            offsets += begins[pieces.starts].tolist()
        held.append(pieces.tokens)
        n_held, n_read = n_held + len(pieces.tokens), n_read + block.n_read
        if n_held > max(STRETCH, seq_len):
            tokens, last = np.concatenate(held), offsets[-1]
            full = (n_held - 1 - last) // seq_len  # rows of the last document; where there is none, all of it goes on
            cut = last + full * seq_len
            ends = [*offsets, cut + 1] if full else offsets
            yield Stretch(tokens[: ends[-1]], np.array(ends), n_read)
            held, offsets, n_held, n_read = [tokens[cut:]], [0], n_held - cut, 0
    if n_held > len(offsets):
        yield Stretch(np.concatenate(held), np.array([*offsets, n_held]), n_read)
