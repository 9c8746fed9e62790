"""Every bias, penalty and filter does to a distribution what its source says, and what is drawn follows it."""

import math

import pytest
import torch

from minillm.generate.filters import (
    TokenCounts,
    adjust_logits,
    apply_min_p,
    apply_temperature,
    apply_top_k,
    apply_top_p,
    choose,
    exclude,
    filter_logits,
)
from minillm.generate.params import SamplingParams

V = 50
PROMPTS = [[1, 2, 2, 3], [4], [5, 49], [0, 1, 2]]
NEW = [[3, 7, 7, 7], [8, 8, 9, 4], [10, 11, 12, 13], [0, 0, 0, 0]]


def random_logits(rows: int = 8, vocab: int = V, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(3)) * 3).to(dtype)


def counts_of(prompts: list[list[int]], new: list[list[int]], vocab: int = V) -> TokenCounts:
    counts = TokenCounts.empty(len(prompts), vocab)
    for row, prompt in enumerate(prompts):
        counts.begin(row, prompt)
    for tokens in zip(*new):
        counts.add(torch.arange(len(prompts)), torch.tensor(tokens))
    return counts


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is the reference; extra `test`")


# --- one at a time, beside transformers -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_filters_equal_those_of_transformers(transformers, dtype):
    logits = random_logits(dtype=dtype)
    for k in (1, 2, 7, 50, 60):
        assert torch.equal(apply_top_k(logits, k), transformers.TopKLogitsWarper(k)(None, logits))
    for p in (1e-6, 0.1, 0.5, 0.9, 0.999):
        assert torch.equal(apply_top_p(logits, p), transformers.TopPLogitsWarper(p)(None, logits))
    for p in (1e-6, 0.01, 0.1, 0.5, 1.0):
        assert torch.equal(apply_min_p(logits, p), transformers.MinPLogitsWarper(p)(None, logits))
    for temperature in (0.1, 0.7, 1.0, 3.0):
        theirs = transformers.TemperatureLogitsWarper(temperature)(None, logits)
        torch.testing.assert_close(apply_temperature(logits, temperature).softmax(-1), theirs.softmax(-1))


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 10.0])
def test_repetition_penalty_equals_that_of_transformers(transformers, penalty):
    logits = random_logits(4)
    counts = counts_of(PROMPTS, NEW)
    ours = adjust_logits(logits, SamplingParams(repetition_penalty=penalty), counts)
    for row, (prompt, new) in enumerate(zip(PROMPTS, NEW)):
        processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
        assert torch.equal(ours[row : row + 1], processor(torch.tensor([prompt + new]), logits[row : row + 1]))


def test_logit_bias_equals_that_of_transformers(transformers):
    logits = random_logits()
    bias = {0: 2.5, 7: -100.0, 49: -math.inf, 8: 0.0}
    theirs = transformers.SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})
    expected = theirs(torch.zeros(8, 1, dtype=torch.int64), logits)
    assert torch.equal(adjust_logits(logits, SamplingParams(logit_bias=bias)), expected)


def test_min_new_tokens_equals_that_of_transformers(transformers):
    logits = random_logits(4)
    processor = transformers.MinNewTokensLengthLogitsProcessor(3, 2, torch.tensor([4, 9]))
    params = SamplingParams(min_new_tokens=2)
    for length in range(4):
        expected = processor(torch.zeros(4, 3 + length, dtype=torch.int64), logits)
        new_tokens = torch.full((4,), length)
        assert torch.equal(adjust_logits(logits, params, new_tokens=new_tokens, stop_ids=(4, 9)), expected)


def test_all_together_equal_those_of_transformers_in_the_order_of_the_page(transformers):
    logits = random_logits(4)
    params = SamplingParams(
        logit_bias={3: 4.0, 9: -2.0},
        repetition_penalty=1.2,
        min_new_tokens=9,
        temperature=0.7,
        top_k=10,
        top_p=0.8,
        min_p=0.1,
    )
    new_tokens = torch.full((4,), 4)
    ours = filter_logits(adjust_logits(logits, params, counts_of(PROMPTS, NEW), new_tokens, (6,)), params)
    for row, (prompt, new) in enumerate(zip(PROMPTS, NEW)):
        theirs, text = logits[row : row + 1], torch.tensor([prompt + new])
        for processor in (
            transformers.SequenceBiasLogitsProcessor({(3,): 4.0, (9,): -2.0}),
            transformers.RepetitionPenaltyLogitsProcessor(1.2),
            transformers.MinNewTokensLengthLogitsProcessor(len(prompt), 9, torch.tensor([6])),
            transformers.TemperatureLogitsWarper(0.7),
            transformers.TopKLogitsWarper(10),
            transformers.TopPLogitsWarper(0.8),
            transformers.MinPLogitsWarper(0.1),
        ):
            theirs = processor(text, theirs)
        torch.testing.assert_close(ours[row].softmax(-1), theirs[0].softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("presence", "frequency"), [(0.5, 0.0), (0.0, 0.7), (1.5, -0.3), (-2.0, 2.0)])
def test_presence_and_frequency_penalties_follow_openai(presence, frequency, dtype):
    """mu[j] -> mu[j] - c[j] * frequency - (1 if c[j] > 0 else 0) * presence, c[j]: how often j was sampled before."""
    logits = random_logits(4, dtype=dtype)
    params = SamplingParams(presence_penalty=presence, frequency_penalty=frequency)
    got = adjust_logits(logits, params, counts_of(PROMPTS, NEW))
    expected = logits.clone()
    for row in range(4):
        for token in range(V):
            times = NEW[row].count(token)  # the prompt does not count
            expected[row, token] -= times * frequency + (1 if times > 0 else 0) * presence
    torch.testing.assert_close(got, expected, rtol=1e-15 if dtype == torch.float64 else 1e-6, atol=1e-7)


# --- what each one means ----------------------------------------------------------------------------------------------


def test_top_p_of_a_flat_distribution_over_many_tokens(transformers):
    """Where more tokens are needed than are looked at first, in one of the rows."""
    logits = random_logits(4, 5000, torch.float64) * torch.tensor([[0.1], [1.0], [0.01], [2.0]])
    for p in (0.5, 0.9):
        assert torch.equal(apply_top_p(logits, p), transformers.TopPLogitsWarper(p)(None, logits))
    assert (apply_top_p(logits, 0.9).isfinite().sum(-1) > 1024).tolist() == [True, False, True, False]


def test_top_p_keeps_the_fewest_that_reach_p():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    for p, kept in [(1e-300, [1]), (0.4, [1]), (0.6, [1, 3]), (0.8, [1, 2, 3]), (0.95, [0, 1, 2, 3])]:
        assert apply_top_p(logits, p).isfinite().nonzero().flatten().tolist() == kept


def test_min_p_is_a_share_of_the_most_likely_token():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    for p, kept in [(1.0, [1]), (0.45, [1, 3]), (0.28, [1, 2, 3]), (0.1, [0, 1, 2, 3])]:
        assert apply_min_p(logits, p).isfinite().nonzero().flatten().tolist() == kept


def test_temperature_scales_the_distances_between_logits():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert apply_temperature(logits, 0.5).tolist() == [[-4, 0, -2]]
    for tiny in (1e-30, 5e-324):
        assert filter_logits(logits, SamplingParams(temperature=tiny)).softmax(-1).tolist() == [[0, 1, 0]]
    flat = filter_logits(torch.tensor([[1.0, -math.inf, 2.0]]), SamplingParams(temperature=1e300)).softmax(-1)
    assert flat.tolist() == [[0.5, 0, 0.5]]


def test_ties_stay_together():
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    assert apply_top_k(logits, 2).isfinite().tolist() == [[True, True, True, True, False]]
    assert apply_min_p(logits, math.exp(-1.001)).isfinite().tolist() == [[True, True, True, True, False]]
    assert apply_top_p(logits, 0.7).isfinite().tolist() == [[True, True, True, True, False]]


def test_bias_of_minus_100_all_but_excludes_and_minus_infinity_does():
    logits = torch.zeros(1, 3)
    probs = adjust_logits(logits, SamplingParams(logit_bias={0: -100, 1: -math.inf})).double().softmax(-1)[0]
    assert 0 < probs[0] < 1e-43
    assert probs[1] == 0


def test_a_row_that_may_only_stop_stops_before_its_minimum():
    logits = torch.tensor([[-math.inf, 1.0, -math.inf], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    got = exclude(logits, [1], torch.tensor([True, True, False]))
    assert got.tolist() == [[-math.inf, 1, -math.inf], [0, -math.inf, 2], [0, 1, 2]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_worked_on_in_fp32(dtype):
    logits = random_logits(dtype=dtype)
    params = SamplingParams(temperature=0.8, top_p=0.9, repetition_penalty=1.1)
    counts = counts_of(PROMPTS * 2, NEW * 2)
    adjusted = adjust_logits(logits, params, counts)
    assert adjusted.dtype == torch.float32
    assert torch.equal(adjusted, adjust_logits(logits.float(), params, counts))
    uniform = torch.rand(8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(choose(logits, params, uniform, counts), choose(logits.float(), params, uniform, counts))


def test_nothing_is_nan_with_one_token_left():
    logits = torch.full((4, V), -math.inf)
    logits[:, 7] = torch.tensor([-1e30, 0.0, 5.0, 1e30])
    params = SamplingParams(
        temperature=0.01,
        top_k=3,
        top_p=0.5,
        min_p=0.5,
        repetition_penalty=100,
        presence_penalty=2,
        frequency_penalty=2,
        logit_bias={3: 100, 4: -math.inf, 7: -100},
        min_new_tokens=9,
    )
    args = counts_of(PROMPTS, NEW), torch.full((4,), 4), (7, 8)
    probs = filter_logits(adjust_logits(logits, params, *args), params).softmax(-1)
    assert probs.isfinite().all()
    assert (probs[:, 7] == 1).all()
    for u in (0.0, 0.5, 1 - 2**-24):
        assert choose(logits, params, torch.full((4,), u), *args).tolist() == [7] * 4


def test_logits_given_are_left_as_they_are():
    logits = random_logits(4)
    before = logits.clone()
    params = SamplingParams(
        logit_bias={1: 1}, repetition_penalty=2, presence_penalty=1, min_new_tokens=9, top_k=4, top_p=0.5, min_p=0.2
    )
    choose(logits, params, torch.full((4,), 0.5), counts_of(PROMPTS, NEW), torch.full((4,), 4), (3,))
    assert torch.equal(logits, before)


# --- which tokens there have been -------------------------------------------------------------------------------------


def test_a_row_that_begins_again_forgets():
    counts = counts_of(PROMPTS, NEW)
    counts.begin(1, [6, V + 3])  # a model may have more tokens than its logits here
    assert counts.in_prompt[1].nonzero().tolist() == [[6]]
    assert not counts.new[1].any()
    assert counts.new[0, 7] == 3


def test_rows_are_taken_in_any_order():
    logits = random_logits(4)
    params = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.5)
    counts = counts_of(PROMPTS, NEW)
    whole = adjust_logits(logits, params, counts)
    rows = [2, 0, 2]
    taken = counts.take(rows)
    assert torch.equal(adjust_logits(logits[rows], params, taken), whole[rows])
    taken.add(torch.tensor([0]), torch.tensor([1]))
    assert counts.new[2, 1] == 0  # a copy


# --- the draw ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.0, top_k=5),
        SamplingParams(top_p=0.9),
        SamplingParams(temperature=1.5, min_p=0.05),
        SamplingParams(temperature=1.5, top_k=8, top_p=0.7),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "min_p", "together"],
)
def test_sampled_frequencies_match_the_distribution(params):
    """Chi-square over 20,000 draws, and nothing outside the distribution's support."""
    logits = random_logits(1, 12)
    probs = filter_logits(logits, params).softmax(-1)[0]
    n = 20_000
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0))
    counts = choose(logits.expand(n, -1), params, uniform).bincount(minlength=12)
    assert not counts[probs == 0].any()
    support = probs > 0
    expected = probs[support] * n
    chi_square = ((counts[support] - expected) ** 2 / expected).sum().item()
    degrees = int(support.sum()) - 1
    assert degrees > 1
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)  # five standard deviations above the mean


def test_choice_stays_inside_the_support_at_the_edges_of_the_unit_interval():
    logits = torch.full((1, 1000), -math.inf)
    logits[0, 300:700] = torch.randn(400, generator=torch.Generator().manual_seed(0))
    for u in (0.0, 1e-30, 1 - 2**-24, 1.0):
        token = choose(logits, SamplingParams(), torch.tensor([u])).item()
        assert 300 <= token < 700


def test_temperature_zero_is_the_most_likely_token_after_penalties():
    logits = random_logits(4)
    for u in (0.0, 0.99):
        chosen = choose(logits, SamplingParams(temperature=0), torch.full((4,), u))
        assert torch.equal(chosen, logits.argmax(-1))
    favourite = logits.argmax(-1)
    counts = counts_of([[token] for token in favourite.tolist()], [[]] * 4)
    params = SamplingParams(temperature=0, repetition_penalty=100)
    assert (choose(logits, params, torch.zeros(4), counts) != favourite).all()


def test_a_row_is_chosen_alike_alone_and_among_others():
    logits = random_logits()
    params = SamplingParams(top_k=20, top_p=0.9, min_p=0.01)
    uniform = torch.rand(8, generator=torch.Generator().manual_seed(1))
    together = choose(logits, params, uniform).tolist()
    assert together == [choose(logits[i : i + 1], params, uniform[i : i + 1]).item() for i in range(8)]
