"""The loader: the samples of a run are one stream, however many ranks, micro-batches and restarts it is dealt over."""

import random
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from minillm.data.config import DataConfig
from minillm.data.inspect import inspect_lines
from minillm.data.loader import Loader, eval_batches
from minillm.data.shards import prepare
from minillm.losses import IGNORE_INDEX
from minillm.tokenizer import TokenizerConfig, train_tokenizer


class CountingStore:
    """A corpus whose token at place i is i, so that each token of a batch says where it came from."""

    def __init__(self, lengths):
        self.document_offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.n_tokens = int(self.document_offsets[-1])

    def tokens(self, start, stop):
        assert 0 <= start < stop <= self.n_tokens
        return np.arange(start, stop, dtype=np.uint32)

    def source(self, document):
        return f"book.txt:{document + 1}"


def documents(n=60, seed=0):
    return CountingStore(np.random.default_rng(seed).integers(2, 40, n))


def loader(store=None, packing=False, seq_len=16, micro_batch_size=2, samples_per_step=8, seed=1, **more):
    return Loader(
        store or documents(),
        seq_len=seq_len,
        packing=packing,
        micro_batch_size=micro_batch_size,
        samples_per_step=samples_per_step,
        seed=seed,
        **more,
    )


def rows_of(batches):
    """The rows with anything to learn, as tuples of all their fields."""
    rows = []
    for batch in batches:
        for i in range(len(batch.tokens)):
            if (batch.targets[i] != IGNORE_INDEX).any():
                rows.append(tuple(tuple(field[i].tolist()) for field in batch if field is not None))
    return rows


def targets_of(batches):
    return [t for batch in batches for t in batch.targets.flatten().tolist() if t != IGNORE_INDEX]


def epoch_batches(one):
    """The micro-batches of the first epoch, a sample a step."""
    assert one.samples_per_step == 1
    return [batch for k in range(one.samples_per_epoch) for batch in one.batches(k)]


def same(a, b):
    assert len(a) == len(b)
    return all(
        (x is None and y is None) or torch.equal(x, y) for one, other in zip(a, b) for x, y in zip(one, other)
    )  # fmt: skip


both = pytest.mark.parametrize("packing", [False, True], ids=["plain", "packed"])


@pytest.mark.parametrize("n_tokens", [16, 17, 31, 32, 33, 500])
def test_plain_rows_have_each_token_as_target_once_an_epoch(n_tokens):
    one = loader(CountingStore([n_tokens]), samples_per_step=1)
    assert sorted(targets_of(epoch_batches(one))) == list(range(n_tokens))
    assert one.targets_per_epoch == n_tokens


def test_plain_rows_are_stretches_of_the_text_closed_to_a_ring():
    store = documents()
    for batch in epoch_batches(loader(store, samples_per_step=1)):
        real = batch.targets != IGNORE_INDEX
        assert torch.equal(batch.targets[real], (batch.tokens[real] + 1) % store.n_tokens)
        assert torch.equal(batch.tokens[:, 1:][real[:, 1:]], batch.targets[:, :-1][real[:, 1:]])
        assert batch.positions is None
        assert batch.doc_ids is None


def test_packed_rows_have_each_token_but_bos_as_target_once_an_epoch():
    store = documents()
    one = loader(store, packing=True, samples_per_step=1)
    targets = targets_of(epoch_batches(one))
    assert sorted(targets) == sorted(set(range(store.n_tokens)) - set(store.document_offsets.tolist()))
    assert one.targets_per_epoch == len(targets)


def test_packed_rows_restart_positions_in_each_piece_and_padding_is_a_piece_of_its_own():
    store = CountingStore([5, 30, 9, 21, 2, 11, 40])
    seen_padding = 0
    for batch in epoch_batches(loader(store, packing=True, samples_per_step=1)):
        tokens, targets, positions, doc_ids = (field[0].tolist() for field in batch[:4])
        for t in range(16):
            starts_piece = t == 0 or doc_ids[t] != doc_ids[t - 1]
            assert positions[t] == (0 if starts_piece else positions[t - 1] + 1)
            assert doc_ids[t] == (0 if t == 0 else doc_ids[t - 1] + starts_piece)
            if targets[t] == IGNORE_INDEX:
                assert tokens[t] == 0
                assert all(target == IGNORE_INDEX for target in targets[t:])
                assert len(set(doc_ids[t:])) == 1
                seen_padding += 1
            else:
                assert targets[t] == tokens[t] + 1
                assert starts_piece or targets[t - 1] == tokens[t]
    assert seen_padding


@both
def test_each_sample_comes_once_an_epoch_and_epochs_differ(packing):
    one = loader(packing=packing, samples_per_step=1)
    n = one.samples_per_epoch
    epochs = [[rows_of(one.batches(k))[0] for k in range(e * n, e * n + n)] for e in range(3)]
    assert all(len(set(rows)) == n for rows in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    if packing:  # the rows of a plan, in another order
        assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    else:  # the text is cut at other places
        assert set(epochs[0]).isdisjoint(epochs[1])


@both
@pytest.mark.parametrize(
    ("micro_batch_size", "ranks"), [(1, 1), (3, 1), (8, 1), (1, 8), (2, 3), (8, 3), (3, 2), (1, 11)]
)
def test_ranks_and_micro_batches_do_not_change_the_samples_of_a_step(packing, micro_batch_size, ranks):
    store = documents()
    stream = loader(store, packing, samples_per_step=1)
    dealt = [
        loader(store, packing, micro_batch_size=micro_batch_size, dp_rank=rank, dp_size=ranks) for rank in range(ranks)
    ]
    for cursor in range(0, 3 * stream.samples_per_epoch, 8):
        batches = [rank.batches(cursor) for rank in dealt]
        assert len({(len(step), step[0].tokens.shape) for step in batches}) == 1
        assert all(batch.tokens.shape == step[0].tokens.shape for step in batches for batch in step)
        assert batches[0][0].tokens.shape[0] <= micro_batch_size
        found = [row for step in batches for row in rows_of(step)]
        expected = [row for k in range(cursor, cursor + 8) for row in rows_of(stream.batches(k))]
        assert Counter(found) == Counter(expected)


@both
def test_a_run_goes_on_with_another_number_of_ranks_and_misses_nothing(packing):
    store = documents()
    stream = loader(store, packing, samples_per_step=1)
    cursor, found = 0, []
    for ranks, steps, samples_per_step in [(4, 3, 8), (1, 2, 8), (3, 4, 7), (2, 5, 8)]:
        dealt = [
            loader(store, packing, samples_per_step=samples_per_step, dp_rank=rank, dp_size=ranks)
            for rank in range(ranks)
        ]
        for _ in range(steps):
            found += [row for rank in dealt for row in rows_of(rank.batches(cursor))]
            cursor += samples_per_step
    assert cursor > stream.samples_per_epoch
    assert Counter(found) == Counter(row for k in range(cursor) for row in rows_of(stream.batches(k)))


def test_no_more_is_padded_than_the_ranks_leave_over():
    for samples, size, ranks in [(8, 8, 1), (12, 5, 1), (8, 8, 3), (7, 2, 2), (2, 4, 8)]:
        one = loader(micro_batch_size=size, samples_per_step=samples, dp_size=ranks)
        assert one.micro_batch_size <= size
        assert one.forwards == -(-samples // (size * ranks))
        assert one.forwards * one.micro_batch_size * ranks - samples < one.forwards * ranks


def test_rows_that_pad_a_step_have_nothing_to_learn():
    for packing in (False, True):
        step = [loader(packing=packing, micro_batch_size=1, samples_per_step=4, dp_rank=r, dp_size=3) for r in range(3)]
        batches = [rank.batches(0) for rank in step]
        assert [[bool((b.targets != IGNORE_INDEX).any()) for b in rank] for rank in batches] == [
            [True, True],
            [True, False],
            [True, False],
        ]
        padding = batches[2][1]
        assert not padding.tokens.any()
        if packing:
            assert padding.positions.tolist() == [list(range(16))]
            assert not padding.doc_ids.any()


@both
def test_batches_are_a_function_of_the_cursor(packing):
    store = documents()
    ahead, plain = loader(store, packing), loader(store, packing, prefetch=False)
    cursors = [*range(0, 80, 8), *random.Random(0).choices(range(500), k=30)]
    for cursor in cursors:
        first = ahead.batches(cursor)
        assert same(first, plain.batches(cursor))
        assert same(first, loader(store, packing).batches(cursor))


def test_another_seed_gives_another_order():
    store = documents()
    for packing in (False, True):
        assert not same(loader(store, packing, seed=1).batches(0), loader(store, packing, seed=2).batches(0))


def test_batches_are_int64_and_contiguous():
    for packing in (False, True):
        for batch in loader(packing=packing).batches(0):
            fields = [field for field in batch if field is not None]
            assert len(fields) == (4 if packing else 2)
            assert all(field.dtype == torch.int64 and field.is_contiguous() for field in fields)


class BreakingStore(CountingStore):
    broken = False

    def tokens(self, start, stop):
        if self.broken:
            raise ValueError("shard-00003.npy: truncated")
        return super().tokens(start, stop)


def test_an_error_while_reading_ahead_is_raised_by_the_step_that_needs_it():
    store = BreakingStore([400])
    one = loader(store)
    one.batches(0)
    one.ahead[1].result()  # step 8 was read while all was well
    store.broken = True
    one.batches(8)
    with pytest.raises(ValueError, match=r"shard-00003\.npy: truncated"):
        one.batches(16)
    store.broken = False
    assert same(one.batches(16), loader(store).batches(16))


def test_the_reading_thread_ends_with_its_loader():
    before = set(threading.enumerate())
    closed, dropped = loader(), loader()
    expected = loader(prefetch=False).batches(8)
    for one in (closed, dropped):
        one.batches(0)
    threads = set(threading.enumerate()) - before
    assert len(threads) == 2
    closed.close()
    closed.close()
    assert same(closed.batches(8), expected)
    del dropped, one
    for thread in threads:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in threads)


@both
def test_documents_say_where_each_token_of_a_step_comes_from(packing):
    store = documents()
    one = loader(store, packing, micro_batch_size=8, prefetch=False)
    for cursor in (0, 8, 200):
        (batch,) = one.batches(cursor)
        samples = one.documents(cursor)
        assert [sample.k for sample in samples] == list(range(cursor, cursor + 8))
        assert [sample.epoch for sample in samples] == [sample.k // one.samples_per_epoch for sample in samples]
        for row, sample in zip(batch.tokens, samples):
            told = [0] * 16
            for column, document, source, start, stop in sample.excerpts:
                assert source == f"book.txt:{document + 1}"
                first, end = store.document_offsets[document : document + 2]
                assert 0 <= start < stop <= end - first
                told[column : column + stop - start] = range(first + start, first + stop)
            assert row.tolist() == told


def test_inspect_prints_the_source_the_tokens_and_the_text_of_each_piece():
    class Numbers:
        def decode(self, ids, skip_special=True):
            return "\n".join(map(str, ids))

    store = CountingStore([6, 12])
    one = loader(store, packing=True, samples_per_step=1)
    lines = list(inspect_lines(one, 0, Numbers(), width=20))
    assert lines[0] == "sample 0: epoch 0, row 0, 16 tokens"
    assert lines[1].split() == ["0", "book.txt:1", "tokens", "0-4", r"0\n1\n2\n3\n4"]
    assert lines[2].split() == ["5", "book.txt:2", "tokens", "0-10", r"6\n7\n8\n9\n10\n11\…"]


@both
def test_rows_of_prepared_text_spell_the_text_across_shards(tmp_path, packing):
    texts = [f"{i} " + "years of rain. " * (i % 9) for i in range(40)]
    (tmp_path / "a.txt").write_text("\n".join(texts))
    tokenizer = train_tokenizer([], TokenizerConfig(kind="byte"))
    config = DataConfig(path=str(tmp_path / "a.txt"), document="line", val="0", cache_dir=str(tmp_path / "cache"))
    store = prepare(config, tokenizer, shard_tokens=100).train
    assert len(store.shards) > 10
    one = loader(store, packing, samples_per_step=1)
    learned = Counter(targets_of(epoch_batches(one)))
    expected = Counter(store.tokens(0, store.n_tokens).tolist())
    assert learned == expected - Counter({tokenizer.bos_id: 40 if packing else 0})
    lines = list(inspect_lines(one, 0, tokenizer))
    assert any(text[:20] in line for text in texts for line in lines)
    assert f"{tmp_path}/a.txt:" in lines[1]
    assert len(list(tmp_path.glob("cache/*/packing-16-*"))) == packing


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("n_tokens", [2, 9, 16, 17, 33, 200])
def test_evaluation_predicts_each_token_once_in_order(n_tokens, ranks):
    store = CountingStore([n_tokens])
    dealt = [list(eval_batches(store, 16, False, 2, dp_rank=rank, dp_size=ranks)) for rank in range(ranks)]
    assert len({tuple(batch.tokens.shape for batch in batches) for batches in dealt}) == 1
    targets = [t for batches in dealt for t in targets_of(batches)]
    assert sorted(targets) == list(range(1, n_tokens))
    if ranks == 1:
        assert targets == sorted(targets)


@pytest.mark.parametrize("ranks", [1, 3])
def test_evaluation_of_packed_rows_predicts_each_token_but_bos_once(ranks):
    store = documents()
    batches = [batch for rank in range(ranks) for batch in eval_batches(store, 16, True, 4, "cpu", rank, ranks)]
    assert sorted(targets_of(batches)) == sorted(set(range(store.n_tokens)) - set(store.document_offsets.tolist()))
    assert all(batch.doc_ids is not None for batch in batches)


def test_evaluation_makes_the_last_batch_smaller_rather_than_padding_it():
    assert [batch.tokens.shape[0] for batch in eval_batches(CountingStore([16 * 7 + 1]), 16, False, 3)] == [3, 3, 1]


@both
@pytest.mark.parametrize("lengths", [[], [1]])
def test_evaluation_without_a_token_to_predict_says_so(packing, lengths):
    with pytest.raises(ValueError, match=f"validation text has {sum(lengths)} tokens"):
        list(eval_batches(CountingStore(lengths), 16, packing, 2))


def test_conversations_need_not_fill_a_row():
    class Masked(CountingStore):
        def trained(self, start, stop):
            return np.arange(start, stop) % 2

    one = loader(Masked([4, 5]), packing=True, samples_per_step=1)
    (batch,) = one.batches(0)
    assert batch.tokens.shape == (1, 16)
    assert one.targets_per_epoch == 3 + 4
    assert int((batch.targets != IGNORE_INDEX).sum()) == 4


@both
def test_a_corpus_smaller_than_one_row_is_refused_with_the_sizes(packing):
    with pytest.raises(ValueError, match=r"has 15 tokens, fewer than one row of data\.seq_len 16.*at most 15"):
        loader(CountingStore([15 + packing]), packing, samples_per_step=1)
    assert loader(CountingStore([16 + packing]), packing, samples_per_step=1).samples_per_epoch == 1
    with pytest.raises(ValueError, match="has 0 tokens"):
        loader(CountingStore([]), packing)


@both
def test_a_corpus_smaller_than_one_step_is_refused_with_the_sizes(packing):
    with pytest.raises(
        ValueError, match=r"4 rows .* one step takes 8 rows.*train\.batch_tokens from 128 to at most 64"
    ):
        loader(CountingStore([50 + packing]), packing)


@pytest.mark.parametrize("name", ["seq_len", "micro_batch_size", "samples_per_step"])
def test_sizes_are_at_least_one(name):
    with pytest.raises(ValueError, match=f"{name}: 0 given"):
        loader(**{name: 0})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs a GPU")
def test_batches_on_an_accelerator_are_those_on_the_cpu():
    device = torch.accelerator.current_accelerator()
    store = documents()
    there, here = loader(store, True, device=device), loader(store, True)
    for cursor in range(0, 80, 8):
        moved = there.batches(cursor)
        assert all(field.is_pinned() for batch in moved for field in batch if field is not None)
        moved = [batch.to(device) for batch in moved]
        assert moved[0].tokens.device.type == device.type
        assert same([batch.to("cpu") for batch in moved], here.batches(cursor))
