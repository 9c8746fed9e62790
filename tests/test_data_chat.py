"""Chat templates: their tokens are those of transformers, text stays text, and what is learned is what is said."""

import json
import random

import pytest
from published_templates import PUBLISHED

from minillm.data.chat import check_places, find_template, prompt, render, render_all, stop_ids
from minillm.data.chat_templates import TEMPLATES, Message
from minillm.data.jinja import choose_template, exported, jinja, recognise
from minillm.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    HFTokenizer,
    TokenizerConfig,
    hugging_face_files,
    load_tokenizer,
    train_tokenizer,
)

WORDS = "the hen saw a fox and ran home. Who ran? 一只母鸡。 USER ASSISTANT [INST] system user assistant model\n"
RENAMED = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
RENAMED += ["<start_of_turn>", "<end_of_turn>", "<tool_call>", "</tool_call>", "<tool_response>"]


SYSTEM = Message("system", "Be brief.\nAnswer well.")
HI = [Message("user", "the hen  saw"), Message("assistant", "a fox!\n\nIt ran")]
MORE = [Message("user", "Who  ran? "), Message("assistant", "  一只母鸡\n")]
TOOLS = [Message("tool", "5 hens"), Message("tool", "0 foxes"), Message("assistant", "five")]
COUNT = {"type": "function", "function": {"name": "count", "parameters": {"type": "object", "properties": {}}}}
SPELL = {"type": "function", "function": {"name": "spell", "description": "«一只» it"}}
OFFERED = Message("tools", "\n".join(json.dumps(tool, ensure_ascii=False) for tool in (COUNT, SPELL)))
CALL = '{"name": "count", "arguments": {"of": "hens", "n": [1, null]}}'
OTHER = '{"name": "spell", "arguments": {"word": "一只\\n"}}'
CALLED = [HI[0], Message("assistant", "", (CALL,)), *TOOLS]
CALLED += [MORE[0], Message("assistant", "I look.", (CALL, OTHER)), *TOOLS[1:]]
CONVERSATIONS = {
    "turn": HI,
    "turns": HI + MORE + HI,
    "system": [SYSTEM, *HI, *MORE],
    "padded": [Message("user", "\n the hen "), Message("assistant", " a fox ")],
    "tools": [*HI, *TOOLS, *MORE],
    "calls": [SYSTEM, *CALLED, *HI],
    "offers": [OFFERED, *HI],
    "offers, told": [OFFERED, SYSTEM, *CALLED],
}


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return train_tokenizer([WORDS] * 20, TokenizerConfig(vocab_size=450))


def definition_of(bpe, changes=None) -> dict:
    """A tokenizer.json that has the special tokens of every family."""
    text = hugging_face_files(bpe)["tokenizer.json"]
    for number, name in enumerate(RENAMED):
        text = text.replace(f"<|reserved_{number}|>", name)
    return json.loads(text) | (changes or {})


PREFIXES = {
    "none": {},
    "prepend": {
        "normalizer": {"type": "Prepend", "prepend": " "},
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
    },
}


def in_transformers(folder, description: str):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(description)
    marks = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(marks))
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=PREFIXES)
def pair(bpe, request, tmp_path_factory):
    """(ours, that of transformers) of one file; `prepend` adds a space as those of Llama 2 and Mistral do."""
    description = json.dumps(definition_of(bpe, PREFIXES[request.param]))
    theirs = in_transformers(tmp_path_factory.mktemp("tokenizer"), description)
    ours = HFTokenizer(description, {"bos_token": "<s>", "eos_token": "</s>"})
    assert ours.adds_space == (request.param == "prepend")
    return ours, theirs


def dicts(messages):
    """As transformers is given them; the tools are apart."""
    found = [{"role": message.role, "content": message.content} for message in messages if message.role != "tools"]
    for row, message in zip(found, (message for message in messages if message.role != "tools")):
        if message.calls:
            row["tool_calls"] = [{"type": "function", "function": json.loads(call)} for call in message.calls]
    return found


def tools_of(messages):
    return [json.loads(tool) for one in messages if one.role == "tools" for tool in one.content.split("\n")] or None


def theirs_of(theirs, messages, name, text, **options):
    theirs.chat_template, before = text, theirs.bos_token
    if name == "llama-3":  # its text says bos_token, which is this one
        theirs.bos_token = "<|begin_of_text|>"
    options |= {"tools": tools_of(messages), "tokenize": True, "return_dict": False}
    found = theirs.apply_chat_template(dicts(messages), **options)
    theirs.bos_token = before
    return found


def fits(name, messages):
    try:
        check_places(TEMPLATES[name], messages)
    except ValueError:
        return False
    return True


CASES = [(name, kind) for name in TEMPLATES for kind in CONVERSATIONS if fits(name, CONVERSATIONS[kind])]
PUBLISHED_CASES = [
    case for case in CASES if case[0] in PUBLISHED and case != ("chatml", "calls")
]  # which is silent there


@pytest.mark.parametrize(("name", "kind"), PUBLISHED_CASES)
def test_tokens_are_those_of_the_published_template(pair, name, kind):
    ours, theirs = pair
    tokens, trained = render(TEMPLATES[name], ours, CONVERSATIONS[kind])
    assert tokens == theirs_of(theirs, CONVERSATIONS[kind], name, PUBLISHED[name])
    assert len(trained) == len(tokens)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_tokens_and_prompt_are_those_of_the_jinja_text_that_is_exported(pair, name, kind):
    ours, theirs = pair
    messages, template = CONVERSATIONS[kind], TEMPLATES[name]
    text = jinja(template, ours)
    assert render(template, ours, messages)[0] == theirs_of(theirs, messages, "", text)
    asked = messages[:-1]
    assert prompt(template, ours, asked) == theirs_of(theirs, asked, "", text, add_generation_prompt=True)


# --- what is learned --------------------------------------------------------------------------------------------------


def learned(tokenizer, name, messages, train_on="assistant"):
    """What is learned, as text; of stretches that do not touch one each."""
    tokens, trained = render(TEMPLATES[name], tokenizer, messages, train_on)
    stretches, before = [], False
    for token, now in zip(tokens, trained):
        if now:
            stretches = stretches if before else [*stretches, []]
            stretches[-1].append(token)
        before = now
    return [tokenizer.decode(stretch, skip_special=False) for stretch in stretches]


ENDS = {
    "chatml": "{}<|im_end|>",
    "qwen": "{}<|im_end|>",
    "llama-2": " {} </s>",
    "llama-3": "{}<|eot_id|>",
    "vicuna": " {}</s>",
    "gemma": "{}<end_of_turn>",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_are_learned_with_their_end_and_nothing_else(bpe, name):
    tokenizer = HFTokenizer(json.dumps(definition_of(bpe)), {"bos_token": "<s>", "eos_token": "</s>"})
    messages, end = CONVERSATIONS["turns"], ENDS.get(name, "{}</s>")
    said = [one.content.strip() if TEMPLATES[name].strips else one.content for one in messages]
    expected = [end.format(text) for text in said[1::2]]
    assert learned(tokenizer, name, messages) == expected
    assert learned(tokenizer, name, messages, "last") == expected[-1:]
    tokens, trained = render(TEMPLATES[name], tokenizer, messages, "all")
    assert trained == [False] + [True] * (len(tokens) - 1)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_prompt_is_the_beginning_of_what_is_trained_on_and_the_answer_ends_with_a_stop(pair, name, kind):
    ours, _ = pair
    template, messages = TEMPLATES[name], CONVERSATIONS[kind]
    tokens, trained = render(template, ours, messages, "last")
    asked = prompt(template, ours, messages[:-1])
    assert tokens[: len(asked)] == asked
    assert trained.index(True) == len(asked)
    last = max(i for i, learned in enumerate(trained) if learned)
    assert (tokens[last],) == stop_ids(template, ours)


# --- text is never control --------------------------------------------------------------------------------------------


def test_special_tokens_that_are_spelled_in_what_was_said_stay_text(real_data, bpe):
    """1,000 messages and more: the special ids are exactly those of the same conversation with harmless messages."""
    dice = random.Random(5)
    for tokenizer in (bpe, ByteTokenizer(), load_tokenizer(real_data / "hf_tokenizer")):
        control = set(tokenizer.special_tokens.values())
        names = [*tokenizer.special_tokens, "<|im_", "start|>", "\n", " ", "{content}", "{eos}", "hen", "system"]
        for _ in range(67):  # of five messages
            roles = ["system", "user", "assistant", "user", "assistant"]
            wild = [Message(role, "".join(dice.choices(names, k=dice.randrange(1, 9)))) for role in roles]
            tame = [Message(role, "hen") for role in roles]
            for name in ("chatml", "plain", "zephyr"):
                found, expected = (render(TEMPLATES[name], tokenizer, said)[0] for said in (wild, tame))
                assert [id for id in found if id in control] == [id for id in expected if id in control]


def test_what_was_said_comes_back_whole(bpe):
    tokens, _ = render(TEMPLATES["chatml"], bpe, [Message("user", "<|im_end|>{bos}\n"), Message("assistant", "</s>")])
    text = bpe.decode(tokens, skip_special=False)
    assert text == "<|im_start|>user\n<|im_end|>{bos}\n<|im_end|>\n<|im_start|>assistant\n</s><|im_end|>\n"


# --- real text --------------------------------------------------------------------------------------------------------


def test_real_conversations_have_the_ids_that_transformers_gives(real_data):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    ours = load_tokenizer(real_data / "hf_tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(real_data / "hf_tokenizer")
    rows = [row for name in ("en", "zh") for row in json.loads((real_data / f"alpaca_{name}.json").read_text())[:60]]
    conversations = [
        [Message("user", row["instruction"] + row["input"]), Message("assistant", row["output"]), *HI] for row in rows
    ]
    for name in ("qwen", "chatml"):
        theirs.chat_template = PUBLISHED[name]
        for messages, rendered in zip(conversations, render_all(TEMPLATES[name], ours, conversations)):
            expected = theirs.apply_chat_template(dicts(messages), tokenize=True, return_dict=False)
            assert rendered.tokens.tolist() == expected
        expected = theirs.apply_chat_template(
            dicts(conversations[0][:1]), tokenize=True, return_dict=False, add_generation_prompt=True
        )
        assert prompt(TEMPLATES[name], ours, conversations[0][:1]) == expected


def test_a_tokenizer_whose_template_is_not_known_is_exported_with_the_one_that_was_taught(real_data, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    ours = load_tokenizer(real_data / "hf_tokenizer")
    chat = exported("qwen", ours)
    for name, content in hugging_face_files(ours, chat_template=chat.jinja).items():
        (tmp_path / name).write_text(content)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [SYSTEM, *HI, *HI]
    assert theirs_of(theirs, messages, "", theirs.chat_template) == render(TEMPLATES["qwen"], ours, messages)[0]
    assert chat.stop_ids == (theirs.eos_token_id,)
    assert recognise(theirs.chat_template, load_tokenizer(tmp_path)) == "qwen"
    came = HFTokenizer(ours.description, ours.config | {"chat_template": PUBLISHED["qwen"]})
    assert exported("qwen", came).jinja == PUBLISHED["qwen"]


def test_an_answer_that_begins_with_white_space_begins_with_a_token_of_its_own(real_data):
    """There transformers has one token for the end of the prompt and the beginning of the answer."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    ours = load_tokenizer(real_data / "hf_tokenizer")
    theirs = transformers.AutoTokenizer.from_pretrained(real_data / "hf_tokenizer")
    messages = [HI[0], Message("assistant", "  home")]
    tokens, trained = render(TEMPLATES["chatml"], ours, messages)
    expected = theirs_of(theirs, messages, "", PUBLISHED["chatml"])
    assert tokens != expected
    assert ours.decode(tokens, skip_special=False) == ours.decode(expected, skip_special=False)
    asked = theirs_of(theirs, messages[:1], "", PUBLISHED["chatml"], add_generation_prompt=True)
    assert expected[: len(asked)] != asked == tokens[: trained.index(True)]


# --- which template ---------------------------------------------------------------------------------------------------


def test_known_templates_are_recognised_by_their_text(bpe):
    assert {name: recognise(text + "\n", bpe) for name, text in PUBLISHED.items()} == {name: name for name in PUBLISHED}
    tokenizer = HFTokenizer(json.dumps(definition_of(bpe)))
    assert {recognise(jinja(template, tokenizer), tokenizer) for template in TEMPLATES.values()} == set(TEMPLATES)
    assert recognise(PUBLISHED["qwen"].replace("Qwen", "Kwen"), bpe) is None


def test_the_template_is_the_one_that_the_model_was_taught_or_that_came_with_it(bpe):
    description = json.dumps(definition_of(bpe))
    came = HFTokenizer(description, {"chat_template": PUBLISHED["gemma"], "eos_token": "</s>"})
    several = [{"name": "default", "template": PUBLISHED["zephyr"]}, {"name": "tools", "template": "?"}]
    assert choose_template("auto", bpe).name == "chatml"
    assert choose_template("auto", came).name == "gemma"
    assert choose_template("auto", HFTokenizer(description, {"chat_template": several})).name == "zephyr"
    assert choose_template("auto", came, taught="llama-3").name == "llama-3"
    assert choose_template("plain", bpe, taught="plain").name == "plain"
    with pytest.raises(ValueError, match="chatml is given, but the model was taught plain; leave it out"):
        choose_template("chatml", bpe, taught="plain")
    unknown = HFTokenizer(description, {"chat_template": "{{ messages }}"})
    with pytest.raises(ValueError, match="came with the tokenizer is none that is known; name the nearest of chatml,"):
        choose_template("auto", unknown)
    assert choose_template("qwen", unknown).name == "qwen"


def test_a_template_that_the_tokenizer_has_no_tokens_for_is_refused(bpe):
    missing = "has no <start_of_turn>, <end_of_turn>, which gemma needs; it has what these need: chatml, qwen, llama-2,"
    with pytest.raises(ValueError, match=missing):
        find_template("gemma", bpe)
    with pytest.raises(ValueError, match="'chatlm' is not known; did you mean chatml"):
        find_template("chatlm", bpe)


def test_a_message_without_a_place_is_refused(bpe):
    tokenizer = HFTokenizer(json.dumps(definition_of(bpe)))
    with pytest.raises(ValueError, match="the template gemma has no place for a system message"):
        render(TEMPLATES["gemma"], tokenizer, [SYSTEM, *HI])
    with pytest.raises(ValueError, match="the template zephyr has no place for a tool message"):
        render(TEMPLATES["zephyr"], tokenizer, [*HI, *TOOLS])
    with pytest.raises(ValueError, match="the template llama-3 has no format for calls of tools; write each into"):
        render(TEMPLATES["llama-3"], tokenizer, CALLED)
    with pytest.raises(ValueError, match="the template chatml has no place for tools; tell of them in the system"):
        render(TEMPLATES["chatml"], tokenizer, [OFFERED, *HI])


def test_a_call_is_learned_and_is_json_where_a_family_has_no_format_for_it(bpe):
    expected = {"qwen": f"<tool_call>\n{CALL}\n</tool_call><|im_end|>", "chatml": CALL + "<|im_end|>"}
    for name, text in expected.items():
        tokens, trained = render(TEMPLATES[name], bpe, CALLED[:2])
        assert bpe.decode([id for id, now in zip(tokens, trained) if now], skip_special=False) == text
