"""Packing: no target lost or doubled, rows full, the plan computed once and whole or not there."""

import errno
import json
import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from minillm.data import packing
from minillm.data.packing import best_fit, cut, plan_rows
from minillm.data.writing import GrowingArray


def offsets_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths)])


def lognormal_offsets(n, seed=0):
    return offsets_of(np.random.default_rng(seed).lognormal(4.5, 1.2, n).astype(int) + 2)


def targets_of(plan):
    """The corpus positions that are targets, row by row and piece by piece."""
    return [
        start + 1 + i for row in range(plan.n_rows) for start, n in zip(*plan.pieces(row)) for i in range(n)
    ]  # fmt: skip


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b))


def test_documents_are_cut_at_the_row_length():
    ((starts, lengths),) = cut(np.array([0, 9, 11, 12, 12, 18]), seq_len=4)  # 8 inputs, 1, 0, 0, 5
    assert starts.tolist() == [0, 4, 9, 12, 16]
    assert lengths.tolist() == [4, 4, 1, 4, 1]


@pytest.mark.parametrize("window", [1, 2, 3, 5, 7])
def test_cutting_a_window_at_a_time_makes_the_same_pieces(window, monkeypatch):
    offsets = offsets_of([1, 1, 30, 2, 1, 17, 5, 1, 9, 1])
    whole = next(cut(offsets, seq_len=4))
    monkeypatch.setattr(packing, "WINDOW", window)
    windows = list(cut(offsets, seq_len=4))
    assert {len(starts) for starts, _ in windows[:-1]} <= {window}
    assert same(whole, [np.concatenate(arrays) for arrays in zip(*windows)])


def test_memory_does_not_grow_with_the_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 2**14)
    offsets = offsets_of([20_000] * 200)  # a million pieces in a few documents
    tracemalloc.start()
    plan = plan_rows(offsets, 4, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(plan.starts) == 10**6
    assert peak < 8 * 2**20, f"{peak / 2**20:.1f} MiB"


@pytest.mark.parametrize("seq_len", [1, 5, 64, 4096])
def test_each_token_but_the_first_of_a_document_is_a_target_once(seq_len):
    offsets = offsets_of([2, 3, 1, 0, 70, 64, 65, 66, 129, 400, *np.random.default_rng(0).integers(2, 90, 300)])
    plan = plan_rows(offsets, seq_len)
    expected = set(range(offsets[-1])) - set(offsets[:-1].tolist())
    targets = targets_of(plan)
    assert len(targets) == len(expected) == plan.n_targets
    assert set(targets) == expected


def test_pieces_stay_inside_their_document_and_rows_inside_their_length():
    offsets = lognormal_offsets(2000)
    plan = plan_rows(offsets, 100)
    starts, lengths = np.array(plan.starts), np.array(plan.lengths)
    document = np.searchsorted(offsets, starts, side="right") - 1
    assert lengths.min() >= 1
    assert (starts + lengths < offsets[document + 1]).all()  # the last target, one after the inputs, is inside too
    assert np.add.reduceat(lengths, plan.rows[:-1]).max() <= 100
    assert all(list(plan.pieces(row)[0]) == sorted(plan.pieces(row)[0]) for row in range(plan.n_rows))
    firsts = [plan.pieces(row)[0][0] for row in range(plan.n_rows)]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_packed_as_one_by_one(seed):
    """The grouped method fills rows exactly as best fit decreasing written down plainly."""
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 80))
    lengths = rng.integers(1, capacity + 1, 500) if seed % 2 else np.minimum(rng.geometric(0.1, 500), capacity)
    plain: list[list[int]] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [row for row in plain if sum(row) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            plain.append([length])
    row_of, n_rows = best_fit(lengths, capacity)
    rows = [lengths[row_of == row].tolist() for row in range(n_rows)]
    assert sorted(sum(row) for row in rows) == sorted(sum(row) for row in plain)


@pytest.mark.parametrize("seq_len", [512, 2048, 8192])
def test_rows_of_web_like_documents_are_over_98_percent_full(seq_len):
    assert plan_rows(lognormal_offsets(50_000), seq_len).fill(seq_len) > 0.98


def test_real_documents_fill_rows_over_98_percent(real_data):
    fields = {"c4.jsonl": "text", "gsm8k_train.jsonl": "answer", "tang_poems.jsonl": "text"}
    for name, field in fields.items():
        lines = (real_data / name).read_text(encoding="utf-8").splitlines()
        plan = plan_rows(offsets_of([len(json.loads(line)[field].encode()) + 2 for line in lines]), 1024)
        assert plan.fill(1024) > 0.98, (name, plan.fill(1024))


def test_a_corpus_of_many_windows_is_packed_window_by_window(monkeypatch):
    offsets = lognormal_offsets(3000)
    monkeypatch.setattr(packing, "WINDOW", 256)
    largest = []
    monkeypatch.setattr(packing, "best_fit", lambda lengths, T: largest.append(len(lengths)) or best_fit(lengths, T))
    plan = plan_rows(offsets, 64)
    assert max(largest) <= 256
    assert len(largest) > 10
    assert sorted(targets_of(plan)) == sorted(set(range(offsets[-1])) - set(offsets[:-1].tolist()))
    assert plan.fill(64) > 0.9


def test_a_stored_plan_is_the_computed_one_and_is_not_computed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "WINDOW", 1000)
    offsets = lognormal_offsets(3000)
    first = plan_rows(offsets, 128, tmp_path)
    assert same(first, plan_rows(offsets, 128))
    monkeypatch.setattr(packing, "best_fit", None)  # whoever calls it fails
    again = plan_rows(offsets, 128, tmp_path)
    assert same(first, again)
    assert isinstance(again.starts.base, np.memmap)


def test_plans_of_other_documents_or_row_lengths_stand_side_by_side(tmp_path):
    one, other = lognormal_offsets(100), lognormal_offsets(100, seed=1)
    for offsets in (one, other):
        for seq_len in (32, 64):
            assert same(plan_rows(offsets, seq_len, tmp_path), plan_rows(offsets, seq_len))
    assert len(list(tmp_path.glob("packing-*/plan.json"))) == 4


def test_a_plan_that_was_interrupted_is_not_there(tmp_path, monkeypatch):
    offsets = lognormal_offsets(1000)
    monkeypatch.setattr(packing, "WINDOW", 300)
    calls = []

    def dies_in_the_third_window(lengths, capacity):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return best_fit(lengths, capacity)

    monkeypatch.setattr(packing, "best_fit", dies_in_the_third_window)
    with pytest.raises(KeyboardInterrupt):
        plan_rows(offsets, 64, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["packing.lock"]
    left_by_a_kill = tmp_path / f".packing-64-{packing.fingerprint(offsets)}.99999999.tmp"
    left_by_a_kill.mkdir()
    monkeypatch.setattr(packing, "best_fit", best_fit)
    assert same(plan_rows(offsets, 64, tmp_path), plan_rows(offsets, 64))
    assert not left_by_a_kill.exists()


def test_where_a_plan_cannot_be_stored_it_is_kept_in_memory(tmp_path, monkeypatch, caplog):
    offsets = lognormal_offsets(100)

    def refuse(handle):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("minillm.files.os.fsync", refuse)
    assert same(plan_rows(offsets, 64, tmp_path), plan_rows(offsets, 64))
    assert "read-only" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["packing.lock"]


@pytest.mark.parametrize("name", ["rows.npy", "starts.npy", "lengths.npy", "plan.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_a_damaged_plan_is_computed_again(tmp_path, name, damage):
    offsets = lognormal_offsets(200)
    plan_rows(offsets, 64, tmp_path)
    (file,) = tmp_path.glob(f"packing-*/{name}")
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "other":
        file.write_bytes(b"{}")
    else:
        file.unlink()
    assert same(plan_rows(offsets, 64, tmp_path), plan_rows(offsets, 64))
    assert file.read_bytes() == content


def test_of_several_that_need_a_plan_at_once_one_computes_it(tmp_path, monkeypatch):
    offsets = lognormal_offsets(20_000)
    calls = []
    monkeypatch.setattr(packing, "best_fit", lambda lengths, T: calls.append(1) or best_fit(lengths, T))
    with ThreadPoolExecutor(4) as pool:
        plans = list(pool.map(lambda _: plan_rows(offsets, 64, tmp_path), range(4)))
    assert len(calls) == 1
    assert all(same(plan, plans[0]) for plan in plans)


@pytest.mark.parametrize("offsets", [[0], [0, 0], [0, 1, 2]])
def test_a_corpus_without_a_target_has_a_plan_without_rows(tmp_path, offsets):
    for plan in (plan_rows(np.array(offsets), 8), plan_rows(np.array(offsets), 8, tmp_path)):
        assert (plan.n_rows, plan.n_targets) == (0, 0)


def test_an_array_may_be_written_without_knowing_its_length(tmp_path):
    array = GrowingArray(tmp_path / "a.npy", "<i4")
    for i in range(1000):
        array.append(np.arange(i))
    array.close()
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.concatenate([np.arange(i) for i in range(1000)]))
