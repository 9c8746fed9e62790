"""How near answers are to what was expected, and which answers are asked for."""

import json
import sys

import pytest
import torch

from minillm.data.chat import prompt
from minillm.data.chat_templates import TEMPLATES, Message
from minillm.data.config import ConversationsConfig, PreferencesConfig
from minillm.data.conversation_store import open_conversations
from minillm.data.masked import TurnsConfig
from minillm.data.preference_store import open_preferences
from minillm.data.trees import PairsConfig
from minillm.eval.answers import (
    METRICS,
    Answered,
    answers_of,
    by_group,
    check_installed,
    exact_match,
    last_answers,
    majority,
)
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tokenizer import ByteTokenizer

TOKENIZER, CHATML = ByteTokenizer(), TEMPLATES["chatml"]


def answered(*pairs, group="g"):
    return [Answered(group, "?", expected, answer) for expected, answer in pairs]


def test_white_space_around_an_answer_does_not_matter():
    assert exact_match(answered((" red", "red\n"), ("red", "re d"), ("red", "Red"), ("", " "))) == 0.5


def test_the_most_common_answer_and_the_groups():
    rows = answered(("a", "a"), ("a", "b"), ("b", "b")) + answered(("c", "a"), group="h")
    assert majority(rows) == 0.5
    assert by_group(rows, exact_match) == {"g": pytest.approx(2 / 3), "h": 0}


@pytest.mark.parametrize("text", ["the cat sat on the mat today", "今天天气很好我们去公园散步吧"])
@pytest.mark.parametrize("metric", ["bleu", "rouge_l"])
def test_bleu_and_rouge_go_from_nothing_in_common_to_all(metric, text):
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_chinese")
    part = text[: len(text) // 2]
    all_of_it, some, nothing, empty = (
        METRICS[metric](answered((text, answer))) for answer in (text, part, "zzz qqq", "")
    )
    assert all_of_it == pytest.approx(1, abs=1e-4)
    assert 0 <= nothing < 0.05 < some < 0.95
    assert empty == 0


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    pytest.importorskip("rouge_chinese")
    # 3 of 4 words given and 3 of 5 expected stand in the same order
    assert METRICS["rouge_l"](answered(("a b c d e", "a x c e"))) == pytest.approx(2 * 3 / (4 + 5), abs=1e-6)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ValueError, match=r"BLEU and ROUGE need sacrebleu: pip install 'minillm\[eval\]'"):
        check_installed(["exact_match", "bleu"])


def test_what_is_asked_are_the_last_answers_and_the_tokens_before_them(tmp_path):
    conversations = [
        [
            Message("user", "one?"),
            Message("assistant", "1"),
            Message("user", f"and {i}?"),
            Message("assistant", f"{i}!"),
        ]
        for i in range(10)
    ]
    rows = [{"messages": [message._asdict() for message in said]} for said in conversations]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = ConversationsConfig(path=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path), seq_len=256, val="0")
    [source] = open_conversations(config, TurnsConfig(), CHATML, TOKENIZER)
    asked = last_answers(source.prepared.train, 5, TOKENIZER)
    chosen = conversations[::2]
    assert [one.prompt for one in asked] == [prompt(CHATML, TOKENIZER, said[:3]) for said in chosen]
    assert [one.expected for one in asked] == [said[3].content for said in chosen]
    assert {one.group for one in asked} == {"a"}
    assert len(last_answers(source.prepared.train, 99, TOKENIZER)) == 10

    shape = ModelConfig(vocab_size=TOKENIZER.vocab_size, dim=16, n_layers=1, n_heads=1, ffn_dim=16, max_seq_len=48)
    torch.manual_seed(0)
    found = answers_of(Transformer(shape), TOKENIZER, asked, (), new_tokens=4)
    assert [one.expected for one in found] == [one.expected for one in asked]
    assert all(one.answer == "" for one in found), "no room after prompts that fill the context"


def test_of_preferences_only_those_with_a_chosen_answer_are_asked(tmp_path):
    """Where good and bad answers alternate, too, as those of pairs do that are taken one by one."""
    rows = [{"prompt": f"{i}?", "chosen": f"{i}!", "rejected": "no"} for i in range(8)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [rows[0] | {"chosen": ""}, *rows[1:]]))
    config = PreferencesConfig(path=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path), seq_len=256, val="0")
    for answers in ("pairs", "labels"):
        [source] = open_preferences(config, PairsConfig(), CHATML, TOKENIZER, answers)
        for count, numbers in ((3, [1, 3, 5]), (9, range(1, 8))):
            asked = last_answers(source.prepared.train, count, TOKENIZER)
            assert [one.expected for one in asked] == [f"{i}!" for i in numbers]
            assert asked[0].prompt == prompt(CHATML, TOKENIZER, [Message("user", "1?")])
