"""Folders of the Hugging Face hub: the same model as in transformers, whatever the family, or a clear refusal."""

import pytest
import torch
from families import CASES, make

from minillm.load import load

transformers = pytest.importorskip("transformers", reason="the reference library, extra `test`")
TOKENS = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=CASES, ids=list(CASES))
def case(request) -> str:
    return request.param


def saved(case: str, folder, **changes):
    """A folder that transformers wrote."""
    make(case, **changes).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_logits_are_those_of_transformers(case, tmp_path):
    theirs = make(case)
    theirs.save_pretrained(tmp_path)
    ours, tokenizer = load(tmp_path)
    assert tokenizer is None
    assert not ours.training
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, atol=1e-4, rtol=1e-5)
