"""What is written for transformers is the model: the same tensors, the same logits, or nothing."""

import json
from pathlib import Path

import pytest
import torch
from families import CASES, make
from safetensors.torch import load_file

from minillm.cli import dispatch
from minillm.hf.config import choose_family
from minillm.load import check_same_logits, default_params, export, export_hugging_face, load, open_stored, save
from minillm.model.config import ModelConfig
from minillm.model.presets import PRESETS
from minillm.model.transformer import Transformer
from minillm.tokenizer import CharTokenizer

transformers = pytest.importorskip("transformers", reason="the reference library, extra `test`")
TOKENS = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(0))
SHAPE = {"vocab_size": 61, "dim": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}


@pytest.fixture(params=CASES, ids=list(CASES))
def case(request) -> str:
    return request.param


def random_model(**fields) -> Transformer:
    model = Transformer(ModelConfig(**(SHAPE | fields))).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


# not what a model is: where it is from, how it is trained and sampled, and (where no block has a window) from where on
ASIDE = ("dropout", "pdrop", "token_id", "version", "_name_or_path", "dtype", "initializer_range", "max_window_layers")


def assert_same_meaning(before, after) -> None:
    """Two configs of transformers say the same of the model."""
    before, after = before.to_dict(), after.to_dict()
    if before["model_type"] == "gpt2":
        before["n_inner"] = before["n_inner"] or 4 * before["n_embd"]
    names = [name for name in before if not name.endswith(ASIDE)]
    assert {name: after[name] for name in names} == {name: before[name] for name in names}


@torch.no_grad()
def test_there_and_back_changes_no_bit(case, tmp_path):
    model = make(case)
    model.save_pretrained(tmp_path / "theirs")
    export(tmp_path / "theirs", tmp_path / "ours")
    export_hugging_face(tmp_path / "ours", tmp_path / "back")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    if case != "mistral, no window":  # which is a Llama
        assert_same_meaning(model.config, back.config)
    assert back.dtype == torch.float32
    assert torch.equal(back(TOKENS).logits, model(TOKENS).logits)


FAMILY_OF = {
    "llama": {},
    "mistral": {"n_heads": 5, "head_dim": 8},  # transformers has no such Llama
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "window": 8, "window_pattern": "FWW"},
    "ministral": {"window": 8, "window_pattern": "FW"},
    "gemma": {"norm": "rmsnorm_plus_one", "mlp": "geglu", "embed_scale": True},
    "olmo": {"norm": "layernorm_plain", "norm_eps": 1e-5},
    "gpt2": {"norm": "layernorm", "position": "learned", "mlp": "gelu"}
    | {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILY_OF)
def test_our_models_are_read_by_transformers(family, tmp_path):
    model = random_model(**FAMILY_OF[family], vocab_multiple=16, dropout=0.1)
    folder = export_hugging_face(save(model, None, tmp_path / "ours"), tmp_path / "theirs")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.config.model_type == family
    assert theirs.get_input_embeddings().weight.shape[0] == 61
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS), atol=1e-5, rtol=1e-5)


def test_every_preset_can_be_expressed():
    chosen = {name: choose_family(config())[0].model_type for name, config in PRESETS.items()}
    ladder = {name for name in chosen if "-" not in name}
    assert {chosen.pop(name) for name in ladder} == {"qwen3"}
    assert all(name.startswith(family) for name, family in chosen.items())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mlp": "relu2"}, "the nearest is llama, but for mlp 'relu2'"),
        ({"causal": False}, "the nearest is llama, but for causal False"),
        ({"position": "none"}, "the nearest is llama, but for position 'none'"),
        ({"o_bias": True}, "the nearest is llama, but for o_bias True"),
        ({"qk_norm": True, "embed_scale": True}, "the nearest is qwen3, but for embed_scale True"),
        ({"rope_scaling": "ntk", "rope_factor": 2.0}, "the nearest is llama, but for rope_scaling 'ntk'"),
        ({"mlp": "relu2", "n_heads": 5, "head_dim": 8}, "the nearest is mistral, but for mlp 'relu2'"),
        (
            {**FAMILY_OF["gpt2"], "n_heads": 5, "head_dim": 8},
            "the nearest is gpt2, but for n_heads: 5 does not",
        ),
        ({**FAMILY_OF["gpt2"], "n_kv_heads": 2}, "the nearest is gpt2, but for n_kv_heads 2"),
    ],
)
def test_what_no_family_can_express_is_refused_by_field(fields, said, tmp_path):
    save(random_model(**fields), None, tmp_path / "ours")
    with pytest.raises(ValueError, match="no family of Hugging Face's is this model") as error:
        export_hugging_face(tmp_path / "ours", tmp_path / "theirs")
    assert said in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_are_cast_where_that_is_asked(family, dtype, tmp_path):
    model = random_model(**FAMILY_OF[family])
    ours = save(model, None, tmp_path / "ours")
    theirs = export_hugging_face(ours, tmp_path / "theirs", dtype=dtype)
    assert json.loads((theirs / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    smaller = export(ours, tmp_path / "smaller", dtype=dtype)
    expected = dict(model.to(dtype).named_parameters())
    for folder in (theirs, smaller):
        found = dict(load(folder)[0].named_parameters())
        assert all(torch.equal(found[name], expected[name]) and found[name].dtype == dtype for name in expected)
    assert transformers.AutoModelForCausalLM.from_pretrained(theirs).dtype == dtype


def test_weights_too_large_for_a_dtype_are_refused(tmp_path):
    model = random_model()
    with torch.no_grad():
        model.norm.weight.fill_(1e6)
    save(model, None, tmp_path / "ours")
    with pytest.raises(ValueError, match=r"in torch\.float16 the model's logits are no numbers"):
        export_hugging_face(tmp_path / "ours", tmp_path / "theirs", dtype=torch.float16)
    assert not (tmp_path / "theirs").exists()


@torch.no_grad()
def test_large_models_are_written_as_several_files(tmp_path):
    model = random_model()
    save(model, None, tmp_path / "ours")
    folder = export_hugging_face(tmp_path / "ours", tmp_path / "theirs", max_shard_size="20KB")
    files = sorted(folder.glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 3
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    held = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == 4 * sum(parameter.numel() for parameter in model.parameters())
    for file in files:
        tensors = load_file(file)
        assert sum(4 * tensor.numel() for tensor in tensors.values()) <= 20_000 or len(tensors) == 1
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", ["much", "0GB", "5XB", "-1GB", "1.2.3GB"])
def test_a_size_that_is_none_is_refused(size, tmp_path):
    save(random_model(), None, tmp_path / "ours")
    with pytest.raises(ValueError, match=r"max_shard_size: .* is no size; write it as 5GB"):
        export_hugging_face(tmp_path / "ours", tmp_path / "theirs", max_shard_size=size)


def test_the_tokenizer_and_its_ids_go_along(tmp_path):
    tokenizer = CharTokenizer("abcdefgh ")
    save(random_model(vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "ours")
    folder = export_hugging_face(tmp_path / "ours", tmp_path / "theirs")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs("bad cab", add_special_tokens=False)["input_ids"] == list(tokenizer.encode("bad cab"))
    for name in ("config.json", "generation_config.json"):
        said = json.loads((folder / name).read_text())
        assert (said["bos_token_id"], said["eos_token_id"]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert load(folder)[1].encode("bad cab") == tokenizer.encode("bad cab")


def test_what_a_folder_says_of_generation_goes_with_it(tmp_path):
    model = make("llama")
    model.generation_config.temperature = 0.625
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path / "theirs")
    export(tmp_path / "theirs", tmp_path / "ours")
    export_hugging_face(tmp_path / "ours", tmp_path / "back")
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "back").temperature == 0.625


def test_the_tokens_that_end_go_along_where_config_json_alone_names_them(tmp_path):
    make("llama").save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "generation_config.json").unlink()
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [5, 7]}))
    export(tmp_path / "theirs", tmp_path / "ours")
    assert default_params(tmp_path / "ours").stop_token_ids == (5, 7)
    export_hugging_face(tmp_path / "ours", tmp_path / "back")
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "back").eos_token_id == [5, 7]


def test_other_logits_are_noticed(tmp_path):
    one, other = random_model(), random_model()
    with torch.no_grad():
        other.blocks[1].attn.v_proj.weight[3, 5] += 1
    one, same, other = (save(model, None, tmp_path / str(i)) for i, model in enumerate((one, one, other)))
    check_same_logits(open_stored(one), open_stored(same))
    with pytest.raises(ValueError, match="what was written gives other logits than the model"):
        check_same_logits(open_stored(one), open_stored(other))


def test_verbs_import_export_and_generate(tmp_path, capsys):
    tokenizer = CharTokenizer("abcdefgh ")
    save(random_model(vocab_size=tokenizer.vocab_size), tokenizer, tmp_path / "ours")
    ours, theirs, back = (str(tmp_path / name) for name in ("ours", "theirs", "back"))
    assert dispatch(["export", ours, theirs, "--format", "hf", "--dtype", "bf16", "--max_shard_size", "20KB"]) == 0
    assert len(list(Path(theirs).glob("*.safetensors"))) > 2
    assert dispatch(["import", theirs, back, "--dtype", "fp32"]) == 0
    assert f"minillm.load('{back}') reads it" in capsys.readouterr().out
    assert {parameter.dtype for parameter in load(back)[0].parameters()} == {torch.float32}
    texts = []
    for path in (theirs, back):
        dispatch(["generate", path, "--prompt", "bad", "--temperature", "0", "--max_new_tokens", "3"])
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("bad")
    with pytest.raises(ValueError, match="max_shard_size: only --format hf writes several"):
        dispatch(["export", ours, str(tmp_path / "more"), "--max_shard_size", "1GB"])
    with pytest.raises(ValueError, match="no Hugging Face folder"):
        dispatch(["import", ours, str(tmp_path / "more")])


def test_int8_is_of_our_own_format(tmp_path):
    save(random_model(), None, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "int8", quantize="int8")
    with pytest.raises(ValueError, match="int8, which is our own format alone"):
        export_hugging_face(tmp_path / "int8", tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"int8 are not cast to torch\.float16"):
        export(tmp_path / "int8", tmp_path / "half", dtype=torch.float16)


def test_nothing_is_written_over_anything(tmp_path):
    save(random_model(), None, tmp_path / "ours")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="is there already"):
        export_hugging_face(tmp_path / "ours", tmp_path / "theirs")
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["mine.txt"]
