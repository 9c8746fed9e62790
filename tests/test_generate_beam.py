"""Beam search finds what transformers' finds, token for token, whenever it ends and however it is scored."""

import itertools
import math

import pytest
import torch

from minillm.generate.beam import BeamSearch
from minillm.generate.filters import TokenCounts, adjust_logits
from minillm.generate.params import SamplingParams

V, PAD = 14, 13
LENGTH = 9


@pytest.fixture(scope="module")
def model():
    transformers = pytest.importorskip("transformers", reason="transformers is the reference; extra `test`")
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).double().eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.5)
    return model


@torch.no_grad()
def search(model, prompt: list[int], params: SamplingParams, stop_ids: tuple[int, ...], length: int = LENGTH):
    """BeamSearch driven the plain way: every row's whole text through the model at every step. (found, steps)"""
    beams, rows = BeamSearch(params, stop_ids, length), [prompt]
    steps = 0
    counts = TokenCounts.empty(1, V)
    counts.begin(0, prompt)
    while rows:
        steps += 1
        log_probs = model(torch.tensor(rows)).logits[:, -1].log_softmax(-1)
        new_tokens = torch.full((len(rows),), len(rows[0]) - len(prompt))
        parents, tokens = beams.advance(adjust_logits(log_probs, params, counts, new_tokens, stop_ids))
        rows = [[*rows[parent], token] for parent, token in zip(parents, tokens)]
        counts = counts.take(parents)
        counts.add(torch.arange(len(parents)), torch.tensor(tokens, dtype=torch.int64))
    return beams.hypotheses(), steps


def reference(model, prompt: list[int], params: SamplingParams, stop_ids: tuple[int, ...], **more):
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        num_beams=params.num_beams,
        num_return_sequences=params.n,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=PAD,
        max_new_tokens=LENGTH,
        return_dict_in_generate=True,
        output_scores=True,
        **more,
    )
    return out.sequences[:, len(prompt) :].tolist(), out.sequences_scores.tolist()


def check(model, prompt: list[int], params: SamplingParams, stop_ids: tuple[int, ...], **more):
    found, _ = search(model, prompt, params, stop_ids)
    sequences, scores = reference(model, prompt, params, stop_ids, **more)
    width = len(sequences[0])
    assert [h.tokens + [PAD] * (width - len(h.tokens)) for h in found] == sequences
    assert [h.score for h in found] == pytest.approx(scores, rel=1e-5)
    assert [h.finished for h in found] == [h.tokens[-1] in stop_ids for h in found]
    return found


CASES = [  # prompt, num_beams, n, stop_ids
    ([1, 2, 3], 2, 1, ()),
    ([7], 4, 4, (4,)),
    ([1, 2, 3], 5, 3, (4,)),
    ([7], 2, 2, (4, 9, 11)),
    ([6, 2], 4, 2, (4, 9, 11)),
]


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [0.5, 1.0, 2.0, 0.0, -1.0])
def test_tokens_and_scores_equal_those_of_transformers(model, early_stopping, length_penalty):
    ends = set()
    for prompt, num_beams, n, stop_ids in CASES:
        params = SamplingParams(
            use_beam_search=True, num_beams=num_beams, n=n, early_stopping=early_stopping, length_penalty=length_penalty
        )
        ends |= {hypothesis.finished for hypothesis in check(model, prompt, params, stop_ids)}
    assert ends == {True, False}  # by a stop token, and by the length


def test_early_stopping_ends_sooner_and_may_miss_the_best(model):
    steps, scores = {}, {}
    for early_stopping in (True, False, "never"):
        params = SamplingParams(use_beam_search=True, num_beams=4, early_stopping=early_stopping)
        found, steps[early_stopping] = search(model, [6, 2], params, (4,), length=20)
        scores[early_stopping] = found[0].score
    assert steps[True] < steps[False] < steps["never"]
    assert scores[True] == scores[False] < scores["never"]


def test_penalties_work_on_log_probabilities_as_in_transformers(model):
    params = SamplingParams(
        use_beam_search=True, num_beams=4, n=4, repetition_penalty=1.4, min_new_tokens=5, logit_bias={4: 2.0, 6: -3.0}
    )
    more = {"repetition_penalty": 1.4, "min_new_tokens": 5, "sequence_bias": {(4,): 2.0, (6,): -3.0}}
    for prompt in ([1, 2, 3], [7], [4, 4]):
        found = check(model, prompt, params, (4,), **more)
        assert all(len(h.tokens) > 5 for h in found)


def test_the_whole_space_is_searched_with_enough_beams(model):
    """With as many beams as there are beginnings, the best completion of all is found."""
    params = SamplingParams(use_beam_search=True, num_beams=V * V, n=3, length_penalty=0.0)
    found, _ = search(model, [5], params, (), length=3)
    texts = torch.tensor(list(itertools.product(range(V), repeat=3)))
    with torch.no_grad():
        log_probs = model(torch.cat([torch.full((len(texts), 1), 5), texts], 1)).logits[:, :-1].log_softmax(-1)
    sums = log_probs.gather(2, texts[:, :, None]).sum((1, 2))
    best = sums.topk(3)
    assert [h.tokens for h in found] == texts[best.indices].tolist()
    assert [h.score for h in found] == pytest.approx(best.values.tolist())


def test_tokens_that_are_excluded_are_no_candidates():
    params = SamplingParams(use_beam_search=True, num_beams=3, n=3)
    beams = BeamSearch(params, (), 2)
    log_probs = torch.full((1, 5), -math.inf)
    log_probs[0, 2:4] = math.log(0.5)
    assert beams.advance(log_probs) == ([0, 0], [2, 3])
    assert beams.advance(log_probs.expand(2, -1)) == ([], [])
    assert [h.tokens[0] for h in beams.hypotheses()] in (
        [2, 2, 3],
        [2, 3, 3],
        [2, 3, 2],
        [3, 2, 2],
        [3, 3, 2],
        [3, 2, 3],
    )
