"""What is asked of a completion is checked before any work, all of it in one report."""

import dataclasses
import math

import pytest

from minillm.config import ConfigError, arguments, build, fields_of
from minillm.generate.params import SamplingParams

BEAMS = {"use_beam_search": True, "num_beams": 4}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", 0),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {1: math.inf}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: None}),
        ("logit_bias", {"word": 1.0}),
        ("logit_bias", [1]),
        ("logit_bias", [(1, 2, 3)]),
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.0),
        ("min_new_tokens", -1),
        ("n", 0),
        ("best_of", 0),
        ("seed", -1),
        ("stop", [""]),
        ("stop", [1]),
        ("stop", 1),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", ["</s>"]),
        ("stop_token_ids", 2),
        ("ignore_eos", 1),
        ("skip_special_tokens", None),
        ("logprobs", -1),
        ("logprobs", True),
        ("prompt_logprobs", -1),
        ("use_beam_search", 0),
        ("num_beams", 0),
        ("length_penalty", math.nan),
        ("length_penalty", 11),
        ("early_stopping", "always"),
    ],
)
def test_impossible_values_name_the_field(field, value):
    with pytest.raises(ValueError, match=f"^{field}: must be .*, not ") as error:
        SamplingParams(**{field: value})
    assert len(str(error.value).splitlines()) == 1


def test_every_field_is_checked():
    for field in fields_of(SamplingParams):
        with pytest.raises(ValueError, match=f"^{field.name}: must be .*, not <object"):
            SamplingParams(**{field.name: object()})


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"n": 3, "best_of": 2}, "best_of: 2 completions are made, and n asks for 3"),
        ({"best_of": 2, "temperature": 0}, "best_of: with temperature 0 all completions are the same"),
        ({"n": 2, "temperature": 0}, "n: with temperature 0 all completions are the same"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "min_new_tokens: 5 is more than max_new_tokens 4"),
        ({"seed": 2**63}, "seed: must be at most"),
        ({"num_beams": 4}, "num_beams: belongs to beam search"),
        ({"length_penalty": 2.0}, "length_penalty: belongs to beam search"),
        ({"early_stopping": "never"}, "early_stopping: belongs to beam search"),
        ({"use_beam_search": True}, "num_beams: beam search needs at least 2"),
        ({**BEAMS, "n": 5}, "n: 5 completions are more than num_beams 4"),
        ({**BEAMS, "stop": "x"}, "stop: beam search ends at tokens, not at text"),
        ({**BEAMS, "temperature": 0.7}, "temperature: belongs to sampling"),
        ({**BEAMS, "top_k": 5}, "top_k: belongs to sampling"),
        ({**BEAMS, "top_p": 0.9}, "top_p: belongs to sampling"),
        ({**BEAMS, "min_p": 0.1}, "min_p: belongs to sampling"),
        ({**BEAMS, "best_of": 4}, "best_of: belongs to sampling"),
    ],
)
def test_impossible_combinations_are_refused_in_words(fields, problem):
    with pytest.raises(ValueError, match=f"^{problem}") as error:
        SamplingParams(**fields)
    assert len(str(error.value).splitlines()) == 1


def test_all_problems_are_told_at_once():
    with pytest.raises(ValueError, match="temperature") as error:
        SamplingParams(temperature=-1, top_p=2, top_k=0, n=3, best_of=2, stop=[""])
    names = [line.split(":")[0] for line in str(error.value).splitlines()]
    assert sorted(names) == ["best_of", "stop", "temperature", "top_k", "top_p"]


def test_a_combination_is_not_blamed_on_a_field_that_already_failed():
    with pytest.raises(ValueError, match="best_of") as error:
        SamplingParams(n=3, best_of=2.5)
    assert len(str(error.value).splitlines()) == 1


def test_equal_params_have_one_hash_however_they_were_given():
    lists = SamplingParams(stop=["a"], stop_token_ids=[3, 4], logit_bias={7: -math.inf, 5: 2})
    tuples = SamplingParams(stop="a", stop_token_ids=(3, 4), logit_bias=((5, 2.0), (7, -math.inf)))
    assert lists == tuples
    assert hash(lists) == hash(tuples)
    assert dataclasses.replace(lists, n=2).logit_bias == ((5, 2), (7, -math.inf))
    assert len({SamplingParams(), SamplingParams(seed=1), lists, tuples}) == 3


def test_eos_is_one_of_the_tokens_that_end_unless_it_is_ignored():
    assert SamplingParams(stop_token_ids=[5]).stop_ids(2) == (2, 5)
    assert SamplingParams(stop_token_ids=[5], ignore_eos=True).stop_ids(2) == (5,)
    assert SamplingParams(stop_token_ids=[5]).stop_ids(None) == (5,)


def test_tokens_outside_the_vocabulary_are_refused():
    params = SamplingParams(stop_token_ids=[3, 10], logit_bias={11: 1})
    with pytest.raises(ValueError, match=r"stop_token_ids: token 10 .*\nlogit_bias: token 11 is outside .* of 10"):
        params.check_vocabulary(10)
    params.check_vocabulary(12)
    with pytest.raises(ValueError, match="logit_bias: forbids all 3 tokens"):
        SamplingParams(logit_bias=dict.fromkeys(range(3), -math.inf)).check_vocabulary(3)


def from_words(*words: str) -> SamplingParams:
    return build(SamplingParams, [arguments(SamplingParams, words)[1]])


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        (["--stop", "Hello, world"], {"stop": "Hello, world"}),
        (["--stop", "\n"], {"stop": "\n"}),
        (["--stop", "[INST]"], {"stop": "[INST]"}),
        (["--stop", '["\\n\\n", ", "]'], {"stop": ["\n\n", ", "]}),
        (["--stop_token_ids", "1,2"], {"stop_token_ids": [1, 2]}),
        (["--logit_bias", "5:-100,7:2.5"], {"logit_bias": {5: -100, 7: 2.5}}),
        (["--logit_bias", '{"5": -100, "7": 2.5}'], {"logit_bias": {5: -100, 7: 2.5}}),
        (["--logit_bias", "5:-inf,7:2.5"], {"logit_bias": {5: -math.inf, 7: 2.5}}),
        (["--presence_penalty", "-1"], {"presence_penalty": -1}),
        (
            ["--use_beam_search", "--num_beams", "2", "--early_stopping", "never"],
            BEAMS | {"num_beams": 2, "early_stopping": "never"},
        ),
        (
            ["--use_beam_search", "--num_beams", "2", "--early_stopping", "true"],
            BEAMS | {"num_beams": 2, "early_stopping": True},
        ),
    ],
)
def test_words_of_the_command_line_mean_what_a_person_expects(words, fields):
    assert from_words(*words) == SamplingParams(**fields)


def test_a_mapping_that_is_none_is_told_how_it_is_written():
    for word in ("5", "5:inf", "5:nan", "5:-infinite"):
        with pytest.raises(ConfigError, match=rf"logit_bias is '{word}'; .* or -inf, as KEY:VALUE,... is expected"):
            from_words("--logit_bias", word)
