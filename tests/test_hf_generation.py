"""generation_config.json: a model is sampled from as its folder says, and ends where it says."""

import json
import logging

import pytest
import torch

from minillm import ModelConfig, SamplingParams, Transformer, cli, default_params, generate, load, save
from minillm.cli.model import Generate, params_of_folder
from minillm.hf import read_generation_config
from minillm.load import export
from minillm.log import run_command
from minillm.tokenizer import ByteTokenizer


@pytest.fixture
def folder(tmp_path):
    """A saved model that writes long texts: its logits are far apart."""
    model = Transformer(ModelConfig(vocab_size=272, dim=16, n_layers=1, n_heads=2, max_seq_len=64))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    return save(model, ByteTokenizer(), tmp_path / "model")


def say(folder, **values):
    (folder / "generation_config.json").write_text(json.dumps(values))


def test_a_model_ends_at_each_of_the_tokens_that_its_folder_names(folder):
    model, tokenizer = load(folder)
    free = generate(model, tokenizer, "hen", SamplingParams(temperature=0, max_new_tokens=20)).tokens
    early, late = free[4], next(token for token in free[5:] if token not in free[:5])
    for ends, last in [([late, early], 4), ([late], free.index(late)), (early, free.index(early))]:
        say(folder, do_sample=False, eos_token_id=ends)
        found = generate(model, tokenizer, "hen", default_params(folder))
        assert (found.tokens, found.finish_reason) == (free[: min(last, free.index(found.tokens[-1])) + 1], "stop")
        assert found.tokens[-1] in (early, late)


def test_what_is_said_becomes_the_fields_of_the_same_meaning(folder, caplog):
    assert read_generation_config(folder) == {}
    assert default_params(folder) == SamplingParams()
    say(folder, temperature=0.6, top_p=0.9, top_k=0, min_p=None, repetition_penalty=1.1, do_sample=True, eos_token_id=2)
    expected = SamplingParams(temperature=0.6, top_p=0.9, repetition_penalty=1.1, stop_token_ids=(2,))
    assert default_params(folder) == expected
    say(
        folder, do_sample=False, temperature=0.6, top_k=20, max_new_tokens=2048, bos_token_id=1, _from_model_config=True
    )
    with caplog.at_level(logging.WARNING, "minillm"):
        assert default_params(folder) == SamplingParams(temperature=0)
        assert caplog.text == ""
        say(folder, num_beams=4, typical_p=0.5)
        assert default_params(folder) == SamplingParams()
    assert "generation_config.json: not followed: num_beams, typical_p" in caplog.text


def test_what_transformers_writes_by_default_is_no_reason_to_warn(tmp_path, caplog):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=16, **shape))
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "minillm"):
        assert default_params(tmp_path).stop_token_ids == (2,)
    assert caplog.text == ""


def test_what_is_off_is_no_reason_to_warn(folder, caplog):
    transformers = pytest.importorskip("transformers")
    defaults = transformers.GenerationConfig._get_default_generation_params()
    off = {name: value for name, value in defaults.items() if not name.startswith(("num_assistant", "assistant_"))}
    say(folder, **off | {"target_lookbehind": None, "top_k": 0, "do_sample": True})
    with caplog.at_level(logging.WARNING, "minillm"):
        assert default_params(folder) == SamplingParams()
        assert caplog.text == ""
        say(folder, num_beams=1, no_repeat_ngram_size=3)
        default_params(folder)
    assert "not followed: no_repeat_ngram_size" in caplog.text


def test_an_end_beyond_the_vocabulary_is_ignored_with_a_warning(folder, caplog):
    say(folder, eos_token_id=[5, 272])
    with caplog.at_level(logging.WARNING, "minillm"):
        params = default_params(folder)
    assert params.stop_token_ids == (5,)
    assert "eos_token_id 272 is beyond the vocabulary of 272: ignored" in caplog.text
    generate(*load(folder), "hen", params)


def test_without_the_file_the_ends_are_those_of_config_json(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": [7, 8]}))
    assert read_generation_config(tmp_path) == {"stop_token_ids": (7, 8)}


@pytest.mark.parametrize("values", [{"temperature": -1}, {"eos_token_id": "</s>"}, {"top_p": 2}])
def test_a_value_that_cannot_be_names_the_file(folder, values):
    say(folder, **values)
    with pytest.raises(ValueError, match=r"model/generation_config\.json: "):
        default_params(folder)


def test_the_command_line_has_the_last_word(folder, capsys):
    def said(*words):
        assert run_command(cli.dispatch, ["generate", str(folder), "--prompt", "hen", "--seed", "3", *words]) == 0
        return capsys.readouterr().out

    say(folder, do_sample=False, repetition_penalty=1.5)
    greedy = said("--max_new_tokens", "12")
    assert greedy == said("--max_new_tokens", "12", "--temperature", "0", "--repetition_penalty", "1.5")
    assert greedy != said("--max_new_tokens", "12", "--repetition_penalty", "1")
    assert greedy != said("--max_new_tokens", "12", "--temperature", "1")
    say(folder, temperature=-1)
    assert run_command(cli.dispatch, ["generate", str(folder), "--top_q", "1"]) != 0
    assert "top_q is not a field" in capsys.readouterr().err


def test_beam_search_leaves_out_how_to_sample(folder):
    say(folder, temperature=0.6, top_k=20, repetition_penalty=1.5)
    values = params_of_folder(Generate(path=str(folder), use_beam_search=True, num_beams=2)).values
    assert values["repetition_penalty"] == 1.5
    assert values.keys().isdisjoint({"temperature", "top_k", "top_p", "min_p"})
    assert params_of_folder(Generate(path=str(folder))).values["temperature"] == 0.6


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_an_exported_model_keeps_how_it_is_sampled_from(folder, tmp_path, quantize):
    say(folder, temperature=0.6, eos_token_id=[2, 5])
    out = export(folder, tmp_path / "out", quantize=quantize)
    assert default_params(out) == SamplingParams(temperature=0.6, stop_token_ids=(2, 5))
    load(out)  # its manifest knows the file
