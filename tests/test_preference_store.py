"""Preferences are stored once as trees: a prompt and its answers, each of which goes on from the end of the prompt."""

import numpy as np
import pytest
import torch

from minillm.data.loader import Loader, eval_batches
from minillm.data.rows import gather
from minillm.losses import IGNORE_INDEX
from minillm.model.masks import restart_positions


class Trees:
    """A store of prompts p with two answers c and r; of learned tokens, log p is minus the token."""

    def __init__(self, documents):
        tokens, branches, trained, self.document_offsets = [], [], [], [0]
        for p, c, r in documents:
            tokens += [*p, *c, p[-1], *r]
            branches += [0] * (len(p) - 1) + [1] * (1 + len(c)) + [2] * (1 + len(r))
            trained += [0] * len(p) + [1] * len(c) + [0] + [1] * len(r)
            self.document_offsets.append(len(tokens))
        self.document_offsets, self.n_tokens = np.array(self.document_offsets), len(tokens)
        self.read = {
            "tokens": np.array(tokens, np.uint16),
            "branches": np.array(branches, np.uint8),
            "trained": np.array(trained, np.uint8),
            "reference": np.where(trained, -np.array(tokens), 7).astype(np.float32),
        }

    def __getattr__(self, name):
        if name not in self.read:
            raise AttributeError(name)
        return lambda start, stop: self.read[name][start:stop]

    def source(self, document):
        return f"trees:{document + 1}"


def test_a_row_of_trees_says_of_each_token_its_target_branch_and_position():
    store = Trees([([1, 2, 3, 4], [10, 11], [20, 21]), ([5], [12], [22, 23])])
    batch = gather([(store, ([0, 9], [8, 4]))], 14, True)
    ignored = IGNORE_INDEX
    expected = {
        "tokens": [1, 2, 3, 4, 10, 11, 4, 20, 5, 12, 5, 22, 0, 0],
        "targets": [ignored] * 3 + [10, 11, ignored, 20, 21, 12, ignored, 22, 23] + [ignored] * 2,
        "positions": [0, 1, 2, 3, 4, 5, 3, 4, 0, 1, 0, 1, 0, 1],
        "doc_ids": [0] * 8 + [1] * 4 + [2] * 2,
        "branches": [0, 0, 0, 1, 1, 1, 2, 2, 1, 1, 2, 2, 0, 0],
        "reference": [0, 0, 0, -10, -11, 0, -20, -21, -12, 0, -22, -23, 0, 0],
    }
    for name, values in expected.items():
        assert getattr(batch, name)[0].tolist() == values, name
    assert {str(field.dtype) for field in batch[:5]} == {"torch.int64"}
    assert batch.reference.dtype == torch.float32


def test_positions_are_those_that_the_model_would_count():
    """Also where the shared prompt is empty, so that a document begins with an answer."""
    rng = np.random.default_rng(0)
    store = Trees([[list(rng.integers(50, size=n)) for n in rng.integers(1, 7, size=3)] for _ in range(20)])
    starts, lengths = store.document_offsets[:-1], np.diff(store.document_offsets) - 1
    rows = [(list(starts[i : i + 4]), list(lengths[i : i + 4])) for i in range(0, 20, 4)]
    batch = gather([(store, row) for row in rows], 90, True)
    assert torch.equal(batch.positions, restart_positions(batch.doc_ids, batch.branches))


def test_without_trees_or_a_reference_the_fields_are_none():
    store = Trees([([1, 2, 3, 4], [10, 11], [20, 21])])
    del store.read["branches"], store.read["reference"]
    batch = gather([(store, ([0], [8]))], 8, True)
    assert batch.positions[0].tolist() == list(range(8))
    assert batch.branches is None
    assert batch.reference is None
    assert gather([(store, ([0], [8]))], 8, False)[2:] == (None,) * 4


@pytest.mark.parametrize("dp_size", [1, 2])
def test_every_learned_token_of_a_tree_is_a_target_once_with_its_branch_and_reference(dp_size):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, (50, 3)).tolist()
    store = Trees([[rng.integers(1, 999, n).tolist() for n in each] for each in lengths])
    loader = [
        Loader(store, seq_len=32, packing=True, micro_batch_size=2, samples_per_step=8, seed=0, dp_rank=rank,
               dp_size=dp_size, prefetch=False).batches(0)
        for rank in range(dp_size)
    ]  # fmt: skip
    assert {batch.tokens.shape for batches in loader for batch in batches} == {(2, 32)}
    batches = [batch for rank in range(dp_size) for batch in eval_batches(store, 32, True, 3, "cpu", rank, dp_size)]
    learned = torch.cat([batch.targets[batch.targets != IGNORE_INDEX] for batch in batches])
    found = torch.cat([batch.branches[batch.targets != IGNORE_INDEX] for batch in batches])
    reference = torch.cat([batch.reference[batch.targets != IGNORE_INDEX] for batch in batches])
    trained = store.read["trained"] == 1
    pairs = zip(store.read["tokens"][trained].tolist(), store.read["branches"][trained].tolist())
    assert sorted(zip(learned.tolist(), found.tolist())) == sorted(pairs)
    assert torch.equal(reference, -learned.float())
