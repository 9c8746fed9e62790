"""Folders of the Hugging Face hub: the same model as in transformers, whatever the family, or a clear refusal."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import CASES, edit_config, make
from safetensors.torch import load_file, save_file

from minillm.generate.beam import BeamSearch
from minillm.generate.generate import generate
from minillm.generate.params import SamplingParams
from minillm.load import load, load_weights
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tokenizer import ByteTokenizer

transformers = pytest.importorskip("transformers", reason="the reference library, extra `test`")
TOKENS = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=CASES, ids=list(CASES))
def case(request) -> str:
    return request.param


def saved(case: str, folder: Path, **how) -> Path:
    """A folder as transformers writes it."""
    make(case).save_pretrained(folder, **how)
    return folder


def change_tensors(folder: Path, change) -> None:
    """Let a function change the tensors of a folder, by name."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def same_weights(a: Transformer, b: Transformer) -> bool:
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


# --- the same model ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_are_those_of_transformers(case, tmp_path):
    theirs = make(case)
    theirs.save_pretrained(tmp_path)
    ours, tokenizer = load(tmp_path)
    assert tokenizer is None
    assert not ours.training
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, atol=1e-4, rtol=1e-5)


GREEDY, BEAMS = {"temperature": 0}, {"use_beam_search": True, "num_beams": 4}


@torch.no_grad()
def differing(theirs, folder: Path, prompts: list[list[int]], n: int, how: dict) -> list[list[int]]:
    """The prompts that n tokens continue differently, together here and one at a time there."""
    theirs.save_pretrained(folder)
    ours, _ = load(folder)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float64}
    found = generate(ours, None, prompts, SamplingParams(max_new_tokens=n, **how))
    beams = how.get("num_beams", 1)
    expected = [theirs.generate(torch.tensor([p]), do_sample=False, max_new_tokens=n, num_beams=beams) for p in prompts]
    return [p for p, one, text in zip(prompts, found, expected) if one.tokens != text[0, len(p) :].tolist()]


@torch.no_grad()
def closest_beams(theirs, prompt: list[int], n: int) -> float:
    """The smallest distance between log-probabilities that a search with their logits ranks, over their size."""
    search = BeamSearch(SamplingParams(**BEAMS), (), n)
    texts, closest = [prompt], math.inf
    while texts:
        log_probs = theirs(torch.tensor(texts)).logits[:, -1].log_softmax(-1)
        before = torch.tensor([beam.log_prob for beam in search.rows], dtype=log_probs.dtype)
        ranked = (log_probs + before[:, None]).flatten().topk(9).values  # of which 8 are looked at
        closest = min(closest, ((ranked[:-1] - ranked[1:]) / ranked[:-1].abs()).min().item())
        texts = [[*texts[parent], token] for parent, token in zip(*search.advance(log_probs))]
    return closest


@pytest.mark.parametrize("how", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_text_in_double_precision_is_that_of_transformers(case, how, tmp_path):
    assert not differing(make(case).double(), tmp_path, [TOKENS[0, :3].tolist(), TOKENS[1, :26].tolist()], 16, how)


@pytest.mark.soak
@pytest.mark.parametrize("how", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_twenty_prompts_are_continued_by_the_64_tokens_of_transformers(case, how, tmp_path):
    """But for beams that fp32 cannot tell apart, in which transformers ranks them whatever the model computes in."""
    theirs = make(case, **{"n_positions" if case.startswith("gpt2") else "max_position_embeddings": 128}).double()
    g = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 61, (length,), generator=g).tolist() for length in range(1, 60, 3)]
    tied = differing(theirs, tmp_path, prompts, 64, how)
    assert len(tied) <= (how is BEAMS)
    rounding = 64 * torch.finfo(torch.float32).eps / 2  # half an eps in each of 64 sums
    assert all(closest_beams(theirs, prompt, 64) < rounding for prompt in tied)


def as_transformers_4(folder: Path) -> Path:
    """The same config in the spelling of the version before."""
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    theta, kind = rope.pop("rope_theta"), rope["rope_type"]
    scaling = None if kind == "default" else rope
    if kind == "linear":
        scaling = {"type": "linear", "factor": rope["factor"]}
    without = ("rope_parameters", "dtype", "layer_types")
    return edit_config(folder, without, rope_theta=theta, rope_scaling=scaling, torch_dtype="float32")


@pytest.mark.parametrize("case", ["llama", "llama, linear", "llama, llama3", "llama, yarn", "qwen2, later windows"])
def test_both_spellings_of_a_config_are_one_model(case, tmp_path):
    five, _ = load(saved(case, tmp_path))
    four, _ = load(as_transformers_4(tmp_path))
    assert four.config == five.config
    assert same_weights(four, five)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_stays(dtype, tmp_path):
    make("llama, tied").to(dtype).save_pretrained(tmp_path)
    model, _ = load(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.lm_head.weight is model.embed.weight


def test_many_files_are_read_as_one(case, tmp_path):
    whole, _ = load(saved(case, tmp_path / "one"))
    many = saved(case, tmp_path / "many", max_shard_size="20KB")
    assert len(list(many.glob("model-*.safetensors"))) > 2
    assert same_weights(load(many)[0], whole)


@pytest.mark.parametrize("case", ["gpt2", "llama, tied"])
def test_a_model_saved_without_its_head_is_read(case, tmp_path):
    model = make(case)
    model.save_pretrained(tmp_path / "whole")
    model.base_model.save_pretrained(tmp_path / "base")
    names = load_file(tmp_path / "base" / "model.safetensors")
    assert not any(name.startswith(("model.", "transformer.")) for name in names)
    assert same_weights(load(tmp_path / "base")[0], load(tmp_path / "whole")[0])


def test_links_of_the_hub_cache_are_followed(tmp_path):
    folder = saved("llama", tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for file in folder.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert same_weights(load(tmp_path / "snapshot")[0], load(folder)[0])


def test_training_starts_from_it_in_a_dtype_of_its_own(tmp_path):
    make("gpt2").bfloat16().save_pretrained(tmp_path)
    stored, _ = load(tmp_path)
    model = Transformer(stored.config)
    load_weights(tmp_path, model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert same_weights(model.bfloat16(), stored)
    with pytest.raises(ValueError, match="has another shape"):
        load_weights(tmp_path, Transformer(ModelConfig(61, dim=32)))


def test_peak_memory_is_one_model(tmp_path):
    """67 MB of embedding, and matrices that are stored transposed, loaded and written by a process of its own."""
    config = transformers.GPT2Config(vocab_size=32768, n_embd=512, n_layer=2, n_head=4, n_positions=16)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in transformers.GPT2LMHeadModel(config).named_parameters()}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    script = """
import resource, sys
from minillm.load import export_hugging_face, load
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load(sys.argv[1])
export_hugging_face(sys.argv[1], sys.argv[1] + "/out")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    result = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) / 1e6
    assert int(result.stdout) < 1.3 * size


# --- weights that are not those of the config -------------------------------------------------------------------------


def test_all_that_is_wrong_with_the_weights_is_in_one_report(tmp_path):
    saved("llama", tmp_path)

    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 4)
        tensors["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(32, 32, dtype=torch.int8)
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(3)

    change_tensors(tmp_path, change)
    with pytest.raises(ValueError, match=r"not those that its config\.json describes") as error:
        load(tmp_path)
    assert str(error.value).splitlines()[1:] == [
        "  1 missing: model.norm.weight",
        "  1 not of this model: model.layers.7.mlp.up_proj.weight",
        "  2 different: model.layers.0.mlp.up_proj.weight is F32 [3, 4], [48, 32] of floats is expected, "
        "model.layers.1.self_attn.q_proj.weight is I8 [32, 32], [32, 32] of floats is expected",
    ]


@pytest.mark.parametrize(
    ("case", "buffers"),
    [
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]),
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.2.attn.masked_bias"]),
    ],
)
def test_buffers_of_old_files_are_no_weights(case, buffers, tmp_path):
    before, _ = load(saved(case, tmp_path))
    change_tensors(tmp_path, lambda tensors: tensors.update({name: torch.zeros(4, 4) for name in buffers}))
    assert same_weights(load(tmp_path)[0], before)


def test_a_tied_head_may_be_stored_again_but_not_be_another(tmp_path):
    before, _ = load(saved("llama, tied", tmp_path))
    embed = before.embed.weight.detach().clone()
    change_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embed}))
    assert same_weights(load(tmp_path)[0], before)
    embed[60, 31] += 1
    change_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": embed}))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load(tmp_path)


def test_a_folder_without_weights_says_what_to_do(tmp_path):
    saved("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no weights; looked for model\.safetensors"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"to read pytorch_model\.bin may run any code .*save_pretrained"):
        load(tmp_path)


def test_damaged_files_are_refused_by_name(tmp_path):
    saved("llama", tmp_path, max_shard_size="20KB")
    first = sorted(tmp_path.glob("model-*.safetensors"))[0]
    whole = first.read_bytes()
    for damaged in (whole[:-1], whole[:20], b"", b"\xff" * 64, whole[:8] + b"x" + whole[9:]):
        first.write_bytes(damaged)
        with pytest.raises(ValueError, match=first.name):
            load(tmp_path)
    for length in (len(whole) - 1, 20):
        first.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"{first.name}: .*(truncated.* {length}|{length}: truncated)"):
            load(tmp_path)
    first.unlink()
    with pytest.raises(ValueError, match=f"{first.name}: is missing"):
        load(tmp_path)
    first.write_bytes(whole)
    load(tmp_path)


@pytest.mark.parametrize(
    ("index", "problem"),
    [
        ("{", "not valid JSON"),
        ('{"weight_map": 3}', "does not name a file of this folder"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "does not name a file of this folder"),
        ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "lists what its files do not hold: a"),
    ],
)
def test_an_index_that_leads_nowhere_is_refused(index, problem, tmp_path):
    saved("llama", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=rf"model\.safetensors\.index\.json: .*{problem}"):
        load(tmp_path)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    ByteTokenizer().save(saved("llama", tmp_path))
    with pytest.raises(ValueError, match="its model has 61 tokens, the tokenizer beside it 272"):
        load(tmp_path)
