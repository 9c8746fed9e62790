"""From a cursor to batches: which rows a step takes, and which of them this rank computes.

B rows of a micro-batch, T tokens a row.

The cursor counts the samples a run has consumed; it is all the state there is. The k-th sample is a function of
(seed, mixture, k): order.py says which row of which epoch of which source it is, and an epoch of a source has each of
its rows once. Plain rows close the text to a ring and cut it every T tokens from a place that changes each epoch, so
each token is a target exactly once an epoch. Packed rows are those of packing.py: each token but the documents' bos is
a target exactly once.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from minillm.data.batch import Batch
from minillm.data.mixture import Source
from minillm.data.order import epochs_and_rows, sources_and_numbers
from minillm.data.rows import PADDING, Sample, SourceRows, Store, excerpts, gather, plain_spans, plan_of


class Loader:
    """The micro-batches of any step, for one data-parallel rank."""

    def __init__(
        self,
        text: Store | Sequence[Source],
        *,
        seq_len: int,
        packing: bool,
        micro_batch_size: int,
        samples_per_step: int,
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        device: str | torch.device = "cpu",
        prefetch: bool = True,
    ) -> None:
        """Args: `text` is a store, or the sources of a mixture. `micro_batch_size` is a limit: of the sizes that need
        equally many forwards, the smallest is taken, so that little is padded. With `prefetch`, a thread reads the next
        step's rows while this one is computed.

        Raises ValueError where the text is too short for one row, or for one step.
        """
        assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
        numbers = {"seq_len": seq_len, "micro_batch_size": micro_batch_size, "samples_per_step": samples_per_step}
        wrong = [f"{name}: {value} given, at least 1 is needed" for name, value in numbers.items() if value < 1]
        if wrong:
            raise ValueError("; ".join(wrong))
        mixed = isinstance(text, Sequence)
        self.places = [source.places for source in text] if mixed else [1]
        stores = [(source.prepared.train, source.name) for source in text] if mixed else [(text, "")]
        self.rows = [SourceRows(store, seq_len, packing, seed, n, name) for n, (store, name) in enumerate(stores)]
        self.seq_len, self.packing, self.seed = seq_len, packing, seed
        self.samples_per_step, self.tokens_per_step = samples_per_step, samples_per_step * seq_len
        self.dp_rank, self.dp_size, self.device = dp_rank, dp_size, torch.device(device)
        self.forwards = -(-samples_per_step // (micro_batch_size * dp_size))
        self.micro_batch_size = -(-samples_per_step // (self.forwards * dp_size))
        self.samples_per_epoch = sum(rows.per_epoch for rows in self.rows)
        self.targets_per_epoch = sum(rows.targets_per_epoch for rows in self.rows)
        self.check_size()
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch") if prefetch else None
        self.ahead: tuple[int, Future[Batch]] | None = None  # (cursor, its rows), being read

    def check_size(self) -> None:
        for rows in self.rows:
            n = rows.targets_per_epoch
            if n < (
                1 if self.packing and rows.masked else self.seq_len
            ):  # a few conversations are data, few words none
                of_source = f"source {rows.name}: " if rows.name else ""
                has = f"{of_source}the training text has {n:,} tokens"
                lower = f", or lower data.seq_len to at most {n}" if n else ""
                raise ValueError(f"{has}, fewer than one row of data.seq_len {self.seq_len}: give more text{lower}")
        has = f"the training text has {self.targets_per_epoch:,} tokens"
        if self.samples_per_epoch < self.samples_per_step:
            raise ValueError(
                f"{has}, {self.samples_per_epoch} rows of data.seq_len {self.seq_len}, but one step takes "
                f"{self.samples_per_step} rows: give more text, or lower train.batch_tokens "
                f"from {self.tokens_per_step} to at most {self.samples_per_epoch * self.seq_len}"
            )

    def batches(self, cursor: int) -> list[Batch]:
        """This rank's micro-batches of the step whose first sample is `cursor`: on each rank as many, of one shape.

        They are in host memory, page-locked where there is a device to copy them to: what is counted on them makes
        nobody wait for the device.
        """
        ahead, self.ahead = self.ahead, None
        rows = ahead[1].result() if ahead is not None and ahead[0] == cursor else self.read(cursor)
        if self.pool is not None:
            following = cursor + self.samples_per_step
            self.ahead = following, self.pool.submit(self.read, following)
        B = self.micro_batch_size
        return [rows.rows(first, first + B) for first in range(0, self.forwards * B, B)]

    def read(self, cursor: int) -> Batch:
        """This rank's rows of a step, in host memory."""
        mine = [  # dealt like cards
            (self.rows[source].store, self.rows[source].spans(epoch, row))
            for source, epoch, row in self.samples(cursor)[self.dp_rank :: self.dp_size]
        ]
        mine += [(self.rows[0].store, PADDING)] * (self.forwards * self.micro_batch_size - len(mine))
        return gather(mine, self.seq_len, self.packing, can_pin(self.device))

    def samples(self, cursor: int) -> list[tuple[int, int, int]]:
        """(source, epoch of it, row in the epoch) of each sample of a step, over all ranks."""
        k = np.arange(cursor, cursor + self.samples_per_step, dtype=np.int64)
        sources, numbers = sources_and_numbers(k, self.places, self.seed)
        epochs, rows = np.empty_like(k), np.empty_like(k)
        for source in np.unique(sources).tolist():
            here = sources == source
            of = self.rows[source]
            epochs[here], rows[here] = epochs_and_rows(numbers[here], of.per_epoch, of.seed)
        return list(zip(sources.tolist(), epochs.tolist(), rows.tolist()))

    def documents(self, cursor: int) -> list[Sample]:
        """The samples of a step over all ranks, in order, each with the documents it reads."""
        return [
            Sample(k, source, epoch, row, excerpts(self.rows[source].store, self.rows[source].spans(epoch, row)))
            for k, (source, epoch, row) in enumerate(self.samples(cursor), cursor)
        ]

    def texts(self, cursor: int) -> list[str]:
        """Where each piece of a step over all ranks was read: file:line and tokens."""
        pieces = (piece for sample in self.documents(cursor) for piece in sample.excerpts)
        return [f"{piece.source} tokens {piece.start}-{piece.stop - 1}" for piece in pieces]

    def close(self) -> None:
        """End the prefetching thread; `batches` goes on working without it."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
        self.pool = self.ahead = None


def eval_batches(
    store: Store,
    seq_len: int,
    packing: bool,
    micro_batch_size: int,
    device: str | torch.device = "cpu",
    dp_rank: int = 0,
    dp_size: int = 1,
) -> Iterator[Batch]:
    """Every row of a store once, in order, the last batch smaller; each token but the first (packed: but each
    document's first) is a target exactly once.

    Of several ranks each gets its share, padded so that all get equally many batches of equal shapes. They are in host
    memory, page-locked where `device` is an accelerator.
    Raises ValueError where there is no token to predict.
    """
    plan = plan_of(store, seq_len) if packing else None
    n_targets = max(0, store.n_tokens - 1) if plan is None else plan.n_targets
    n_rows = -(-n_targets // seq_len) if plan is None else plan.n_rows
    if n_rows == 0:
        raise ValueError(f"the validation text has {store.n_tokens} tokens, none of which follows another")
    for first in range(0, n_rows, micro_batch_size * dp_size):
        rows = range(first, min(n_rows, first + micro_batch_size * dp_size))
        mine = rows[dp_rank::dp_size]
        spans = [plain_spans(n_targets, seq_len, 0, row) if plan is None else plan.pieces(row) for row in mine]
        spans += [PADDING] * (-(-len(rows) // dp_size) - len(spans))
        yield gather([(store, span) for span in spans], seq_len, plan is not None, can_pin(torch.device(device)))


def can_pin(device: torch.device) -> bool:
    """Whether a copy to the device is faster, and can overlap, from page-locked memory."""
    return device.type != "cpu" and torch.accelerator.is_available()
