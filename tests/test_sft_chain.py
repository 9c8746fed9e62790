"""A model of Hugging Face's goes through every command, to one that transformers reads and that is the same."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from published_templates import QWEN

import dpo
import minillm
import sft
from minillm import cli
from minillm.data.chat import find_template, prompt, render, stop_ids
from minillm.data.chat_templates import Message
from minillm.data.conversations import conversation_of
from minillm.data.preferences import preference_of
from minillm.hf.export import QWEN2_WORDS
from minillm.load import export_hugging_face
from minillm.log import run_command
from minillm.tokenizer import load_tokenizer

transformers = pytest.importorskip("transformers", reason="the reference library, extra `test`")
ROWS = 24
CUT = {"type": "Split", "pattern": {"Regex": QWEN2_WORDS}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
# How Qwen2.5 cuts a text, which transformers does for every qwen2 whatever its tokenizer.json says.
RULES = {
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [CUT, BYTES]},
}


def run(command, *words):
    assert run_command(command, list(map(str, words))) == 0


def write_theirs(folder: Path, tokenizer: Path) -> None:
    """A model of Qwen2.5's shape with random weights, a real vocabulary, Qwen2.5's rules and template."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"intermediate_size": 48, "max_position_embeddings": 256, "tie_word_embeddings": True}
    config = transformers.Qwen2Config(vocab_size=6400, bos_token_id=1, eos_token_id=2, **shape)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    described = json.loads((tokenizer / "tokenizer_config.json").read_text()) | {"chat_template": QWEN}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    (folder / "tokenizer.json").write_text(json.dumps(json.loads((tokenizer / "tokenizer.json").read_text()) | RULES))


def stripped(messages) -> list[Message]:
    """Without white space where an answer begins: transformers makes one token of it and of the end of the prompt."""
    return [Message(message.role, message.content.strip()) for message in messages]


def real_rows(folder: Path, name: str) -> list[dict[str, list[Message]]]:
    """Some short rows of real text: conversations, or pairs."""
    rows = json.loads((folder / name).read_text())
    if name == "alpaca_zh.json":
        short = [row for row in rows if len(row["instruction"] + row["output"]) < 150]
        return [{"messages": stripped(conversation_of(row).messages)} for row in short[:ROWS]]
    pairs = [preference_of(row) for row in sorted(rows, key=lambda row: len(str(row)))[:ROWS]]
    return [
        {"messages": stripped(one.prompt), "chosen": stripped(one.chosen), "rejected": stripped(one.rejected)}
        for one in pairs
    ]


@pytest.fixture(scope="module", params=[(sft.main, "alpaca_zh.json"), (dpo.main, "dpo_zh.json")], ids=["sft", "dpo"])
def learned(request, real_data) -> tuple[Callable, list[dict[str, list[Message]]]]:
    """A script, and what it learns from."""
    script, name = request.param
    return script, real_rows(real_data, name)


@pytest.fixture(scope="module")
def conversations(learned) -> list[list[Message]]:
    return [[*row["messages"], *row.get("chosen", [])] for row in learned[1]]


@pytest.fixture(scope="module")
def chain(tmp_path_factory, real_data, learned) -> Path:
    """Every command once, one after the other."""
    folder, (script, rows) = tmp_path_factory.mktemp("chain"), learned
    write_theirs(folder / "theirs", real_data / "hf_tokenizer")
    said = [{part: [one._asdict() for one in row[part]] for part in row} for row in rows]
    (folder / "chats.json").write_text(json.dumps(said, ensure_ascii=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("minillm.recipe.wiring.peak_flops", lambda *_: 1e10)
        run(cli.dispatch, "import", "theirs", "ours")
        learning = ["--lora.r", 4, "--data.seq_len", 256, "--train.batch_tokens", 512, "--optim.lr", 1e-2]
        running = ["--run.dir", "run", "--run.device", "cpu", "--train.max_steps", 6, "--log.curves", "false"]
        run(script, "--model.path", "ours", "--data.path", "chats.json", "--data.val", 0, *learning, *running)
        run(cli.dispatch, "merge", "run", "merged")
        run(cli.dispatch, "export", "merged", "back", "--format", "hf")
    return folder


@pytest.fixture(scope="module")
def ours(chain):
    return minillm.load(chain / "run")


@pytest.fixture(scope="module")
def theirs(chain):
    model = transformers.AutoModelForCausalLM.from_pretrained(chain / "back")
    return model.eval(), transformers.AutoTokenizer.from_pretrained(chain / "back")


@torch.no_grad()
def test_what_was_tuned_and_merged_has_the_same_logits_in_transformers(ours, theirs, chain, conversations):
    tokens = torch.tensor([render(find_template("qwen", ours[1]), ours[1], conversations[0])[0]])
    expected = ours[0](tokens)
    torch.testing.assert_close(theirs[0](tokens).logits, expected, atol=1e-5, rtol=1e-4)
    base, _ = minillm.load(chain / "ours")
    assert (base(tokens) - expected).abs().max() > 0.1, "something was learned"
    assert theirs[0].config.model_type == "qwen2"


def test_transformers_renders_conversations_as_they_were_trained_on(ours, theirs, conversations):
    tokenizer, template = ours[1], find_template("qwen", ours[1])
    for messages in conversations:
        dicts = [message._asdict() for message in messages]
        assert render(template, tokenizer, messages)[0] == theirs[1].apply_chat_template(dicts, return_dict=False)
        asked = theirs[1].apply_chat_template(dicts[:-1], add_generation_prompt=True, return_dict=False)
        assert prompt(template, tokenizer, messages[:-1]) == asked


@torch.no_grad()
def test_transformers_answers_alike(ours, theirs, conversations, capsys, chain):
    tokenizer, template = ours[1], find_template("qwen", ours[1])
    asked = prompt(template, tokenizer, conversations[0][:-1])
    stops = stop_ids(template, tokenizer)
    params = minillm.SamplingParams(temperature=0, max_new_tokens=24, stop_token_ids=stops)
    answer = minillm.generate(*ours, asked, params).text
    found = theirs[0].generate(torch.tensor([asked]), max_new_tokens=24, do_sample=False)[0, len(asked) :]
    assert answer
    assert theirs[1].decode(found, skip_special_tokens=True) == answer
    assert set(stops) <= set(theirs[0].generation_config.eos_token_id)
    said = conversations[0][0].content
    capsys.readouterr()
    run(cli.dispatch, "generate", chain / "back", "--prompt", said, "--temperature", 0, "--max_new_tokens", 24)
    assert capsys.readouterr().out == answer + "\n"


@torch.no_grad()
def test_adapters_go_to_peft_and_come_back(ours, chain, conversations, capsys):
    peft = pytest.importorskip("peft", reason="needs peft, of the extra `test`")
    run(cli.dispatch, "export", chain / "run", chain / "adapters", "--format", "peft")
    tokens = torch.tensor([render(find_template("qwen", ours[1]), ours[1], conversations[0])[0]])
    base = transformers.AutoModelForCausalLM.from_pretrained(chain / "theirs")
    theirs = peft.PeftModel.from_pretrained(base, chain / "adapters").eval()
    torch.testing.assert_close(theirs(tokens).logits, ours[0](tokens), atol=1e-5, rtol=1e-4)
    run(cli.dispatch, "import", chain / "adapters", chain / "again", "--base", chain / "theirs")
    again, tokenizer = minillm.load(chain / "again")
    torch.testing.assert_close(again(tokens), ours[0](tokens), atol=1e-5, rtol=1e-4)
    assert tokenizer.hash == ours[1].hash
    run(cli.dispatch, "import", chain / "adapters", chain / "once more")  # on the base that they name
    assert "logits are the same" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export", "merged", "out", "--format", "peft"], "has no adapters; --format hf writes the whole model"),
        (["export", "run", "out", "--format", "peft", "--dtype", "bf16"], "dtype: adapters are written as they are"),
        (["import", "theirs", "out", "--base", "ours"], "holds no adapters of peft's; leave it out"),
        (["import", "alone", "out"], "alone: does not say which model its adapters belong to; give it with --base"),
        (["import", "alone", "out", "--base", "nowhere"], "alone: the model that its adapters belong to is not there"),
        (["export", "alone", "out"], "alone: holds adapters of peft's alone; `minillm import alone OUT` makes one"),
    ],
    ids=str,
)
def test_what_has_no_adapters_or_no_base_is_told(chain, monkeypatch, capsys, words, said):
    monkeypatch.chdir(chain)
    Path("alone").mkdir(exist_ok=True)
    Path("alone/adapter_config.json").write_text("{}")
    capsys.readouterr()
    assert run_command(cli.dispatch, words) == 1
    assert said in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_tokenizer_that_transformers_takes_for_another_is_named(chain, real_data, caplog):
    tokenizer = load_tokenizer(real_data / "hf_tokenizer")
    model, _ = minillm.load(chain / "ours")
    minillm.save(model, tokenizer, chain / "other")
    for name, told in (("other", True), ("merged", False)):
        caplog.clear()
        folder = export_hugging_face(chain / name, chain / f"{name} exported")
        assert ("PreTrainedTokenizerFast.from_pretrained reads it" in caplog.text) == told
        text = "2026 years. 年年年\n"
        auto, fast = (getattr(transformers, kind) for kind in ("AutoTokenizer", "PreTrainedTokenizerFast"))
        ids = minillm.load(chain / name)[1].encode(text)
        assert fast.from_pretrained(folder).encode(text) == ids
        assert (auto.from_pretrained(folder).encode(text) == ids) != told
