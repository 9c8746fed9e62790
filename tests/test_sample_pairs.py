"""A model's own answers become preferences: the best and the worst by a score, whatever is asked together."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minillm import cli
from minillm.cli.conversation import conversing
from minillm.data.chat_templates import TEMPLATES, Message
from minillm.data.config import PreferencesConfig
from minillm.data.order import make_key
from minillm.data.preference_store import open_preferences
from minillm.data.preferences import preference_of
from minillm.data.prompt_rows import PromptFiles, asked_as, read_prompt
from minillm.data.trees import PairsConfig
from minillm.eval.sample_pairs import AHEAD, Outcome, answered, pair_of, requests, sample_pairs
from minillm.eval.scores import Respondent, Scored, edit_distance, find_score, mean_logprobs, similarity
from minillm.generate.engine import Engine
from minillm.generate.generate import generate
from minillm.generate.params import GREATEST_SEED, SamplingParams
from minillm.load import save
from minillm.log import run_command
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
CHATML = TEMPLATES["chatml"]
HI, HO = Message("user", "hi"), Message("assistant", "ho")
SAID = {*TOKENIZER.encode("abcd"), TOKENIZER.eos_id}
BIAS = {token: -100.0 for token in range(272) if token not in SAID}  # a few letters, and then an end
PARAMS = SamplingParams(n=3, seed=1, max_new_tokens=12, logit_bias=BIAS)
ROWS = [{"question": f"{'what ' * (i % 5)}{i}?", "answer": " " + "abc"[i % 3] * (1 + i % 4)} for i in range(9)]


def make_model(seed=0, max_seq_len=96):
    torch.manual_seed(seed)
    shape = {"dim": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": max_seq_len}
    return Transformer(ModelConfig(vocab_size=272, **shape)).eval()


def respondent(template=None, **shape):
    model = make_model(**shape)
    chat = conversing(template)
    return Respondent(model, TOKENIZER, lambda messages: chat(TOKENIZER, messages), template)


@pytest.fixture(scope="module")
def alice():
    return respondent()


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("rows.jsonl", ROWS)
    return PromptFiles(["rows.jsonl"])


def write(name, rows):
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read(name):
    with open(name, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def sampled(who, files, out="out.jsonl", score="given", params=PARAMS, **options):
    return sample_pairs(who, files, params, find_score(score), out, **options)


def fails(message, *args, **options):
    with pytest.raises(ValueError, match=re.escape(message)):
        sampled(*args, **options)


# --- what is asked, and what is written -------------------------------------------------------------------------------


def say(role, content, **more):
    return {"role": role, "content": content, **more}


TALK = [say("user", "a"), say("assistant", "b"), say("user", "hi")]
SPOKEN = [Message("user", "a"), Message("assistant", "b"), HI]


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "hi"}, [HI], None),
        ({"prompt": "hi", "completion": "ho"}, [HI], "ho"),
        ({"question": "hi", "answer": "ho"}, [HI], "ho"),
        ({"instruction": "hi", "input": "", "output": "ho", "system": "s"}, [Message("system", "s"), HI], "ho"),
        ({"instruction": "hi", "input": "there", "output": ""}, [Message("user", "hi\nthere")], None),
        ({"instruction": "hi", "history": [["a", "b"]]}, SPOKEN, None),
        ({"messages": [*TALK, say("assistant", "ho")]}, SPOKEN, "ho"),
        ({"messages": TALK}, SPOKEN, None),
        ({"prompt": TALK}, SPOKEN, None),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}, [HI], "ho"),
        ({"conversations": [{"from": "human", "value": "hi"}], "chosen": {"from": "gpt", "value": "ho"}}, [HI], "ho"),
        ({"prompt": "hi", "chosen": "ho", "rejected": "no"}, [HI], "ho"),
        ({"prompt": TALK, "chosen": [say("assistant", "ho")], "rejected": "no"}, SPOKEN, "ho"),
    ],
)  # fmt: skip
def test_a_row_of_any_format_asks_something_and_may_give_an_answer(row, prompt, answer):
    found = read_prompt(row)
    assert (found.prompt, found.answer) == (prompt, answer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("hi", "the row is text; an object with fields is expected"),
        ({"title": "hi"}, "the format is not known (found: title)"),
        ({"prompt": None}, 'field "prompt" is null; text is expected'),
        ({"messages": [say("system", "s")]}, "the last message is of system; one of the user, to be answered"),
        ({"messages": []}, "the last message is of nobody"),
        ({"prompt": "hi", "system": "s"}, "the template gemma has no place for a system message"),
    ],
)
def test_a_row_that_asks_nothing_is_named_or_left_out(files, alice, row, message):
    if "template" in message:
        alice = alice._replace(template=TEMPLATES["gemma"])
    write("bad.jsonl", [ROWS[0], row])
    bad = PromptFiles(["rows.jsonl", "bad.jsonl"])
    fails(f"bad.jsonl:2: {message}", alice, bad)
    found = sampled(alice, bad._replace(skip_bad=True))
    assert found.n_prompts == len(ROWS) + 1
    assert [problem.partition(": ")[0] for problem in found.bad] == ["bad.jsonl:2"]


def test_what_is_written_reads_as_the_same_prompt_and_answers():
    calls = say("assistant", "", tool_calls=[{"name": "f", "arguments": {"x": 1}}])
    with_tools = [say("system", "s"), say("user", "a"), calls, say("tool", "1")]
    tools = [{"type": "function", "function": {"name": name}} for name in ("f", "g\u2028h")]
    for row in ({"prompt": "hi"}, {"messages": TALK}, {"messages": with_tools, "tools": tools}):
        prompt = read_prompt(row).prompt
        found = preference_of(asked_as(prompt) | {"chosen": "ho", "rejected": "no"})
        assert found == (prompt, [HO], [Message("assistant", "no")], ())
    assert asked_as([HI]) == {"prompt": "hi"}


def test_pairs_are_what_preference_training_reads(files):
    rows = [{"messages": [say("system", "be brief"), *TALK, say("assistant", row["answer"])]} for row in ROWS]
    write("rows.jsonl", rows)
    found = sampled(respondent(CHATML, max_seq_len=192), files)
    config = PreferencesConfig(path="out.jsonl", cache_dir="cache", seq_len=256, val="0")
    [source] = open_preferences(config, PairsConfig(), CHATML, TOKENIZER)
    assert source.prepared.train.n_documents == found.n_pairs > 0


# --- scores -----------------------------------------------------------------------------------------------------------


def plain_distance(a, b):
    table = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            changed = table[i - 1, j - 1] + (a[i - 1] != b[j - 1])
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, changed)
    return table[len(a), len(b)]


def test_the_edit_distance_is_that_of_the_plain_table():
    words = random.Random(0)
    for _ in range(200):
        a, b = ("".join(words.choices("ab今😀", k=words.randrange(12))) for _ in range(2))
        assert edit_distance(a, b) == plain_distance(a, b)
    assert similarity("", "") == similarity("abc", "abc") == 1
    assert similarity("abcd", "") == 0
    assert similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)


def test_the_given_answer_is_chosen_and_the_least_similar_of_the_models_is_rejected(files, alice):
    sampled(alice, files)
    written = {row["prompt"]: row for row in read("out.jsonl")}
    expected = {}
    for number, row in enumerate(ROWS):  # each asked by itself
        seed = make_key(PARAMS.seed, number) & GREATEST_SEED
        params = replace(PARAMS, seed=seed)
        answers = [one.text for one in generate(alice.model, TOKENIZER, row["question"], params) if one.text]
        given = row["answer"].strip()
        shares = [plain_distance(given, one) / max(len(given), len(one)) for one in answers]
        if answers and max(shares) > 0:
            expected[row["question"]] = (row["answer"], answers[shares.index(max(shares))])
    assert {prompt: (row["chosen"], row["rejected"]) for prompt, row in written.items()} == expected
    assert len(expected) > 5
    assert all(row["rejected_score"] < row["chosen_score"] == 1 for row in written.values())


def test_a_row_without_an_answer_has_nothing_to_compare_with(files, alice):
    write("rows.jsonl", [*ROWS, {"prompt": "hi"}])
    fails("rows.jsonl:10: there is no answer in text to compare others with", alice, files)


@pytest.mark.parametrize("template", [None, CHATML])
def test_logprob_is_the_mean_of_the_answers_tokens_with_its_end(template):
    judge = respondent(template, seed=3)
    asked, stops = judge.ask([HI])
    end = stops[0] if stops else TOKENIZER.eos_id
    tokens = torch.tensor([[*asked, *TOKENIZER.encode("abc"), end]])
    with torch.no_grad():
        logprobs = judge.model(tokens).log_softmax(-1)[0, len(asked) - 1 : -1]
    expected = logprobs.gather(-1, tokens[0, len(asked) :, None]).mean().item()
    assert mean_logprobs(judge, [HI], ["abc", "abc" * 40]) == [pytest.approx(expected, rel=1e-5), None]


@pytest.mark.parametrize("template", [None, CHATML])
def test_many_answers_are_judged_in_few_forwards_as_they_are_one_by_one(template):
    judge, forwards = respondent(template, seed=3), []
    with torch.no_grad():
        for parameter in judge.model.parameters():
            parameter.mul_(3)
    texts = [letter * (1 + number % 7) for number, letter in enumerate("abcd" * 4)] + ["long" * 40, "b"]
    alone = [mean_logprobs(judge, [HI], [text])[0] for text in texts]
    handle = judge.model.register_forward_hook(lambda *_: forwards.append(1))
    found = mean_logprobs(judge, [HI], texts)
    handle.remove()
    assert found == pytest.approx(alone, abs=1e-5)
    assert found.count(None) == 1
    assert len(set(found)) > 15
    assert len(forwards) <= 3
    assert mean_logprobs(judge, [HI], texts) == found
    assert mean_logprobs(judge, [HI], []) == []


def test_the_likeliest_answer_is_chosen_by_its_own_model_or_another(files, alice):
    judge = respondent(seed=5)
    with torch.no_grad():
        for parameter in judge.model.parameters():
            parameter.mul_(3)  # it has opinions
    params = replace(PARAMS, n=4, max_new_tokens=40)
    sampled(alice, files, score="logprob", params=params)
    own = read("out.jsonl")
    sample_pairs(alice, files, params, find_score("logprob", judge), "judged.jsonl")
    judged = read("judged.jsonl")
    assert [row["chosen"] for row in own] != [row["chosen"] for row in judged]
    for who, rows in ((alice, own), (judge, judged)):
        for row in rows:
            for side in ("chosen", "rejected"):
                [expected] = mean_logprobs(who, [Message("user", row["prompt"])], [row[side]])
                if who is judge or len(row[side]) < 40:  # one that was cut has no end
                    assert row[f"{side}_score"] == pytest.approx(expected, abs=1e-5)
            assert row["chosen_score"] > row["rejected_score"]


FUNCTIONS = """
def longest(prompt, answer, row):
    assert row["question"] == prompt
    return len(answer)

def broken(prompt, answer, row):
    return 1 / (row["answer"] != " bb")

def endless(prompt, answer, row):
    return float("inf")
"""


def test_a_function_of_the_users_scores(files, alice):
    Path("score.py").write_text(FUNCTIONS)
    assert sampled(alice, files, score="score.py:longest").n_pairs > 5
    for row in read("out.jsonl"):
        assert (len(row["chosen"]), len(row["rejected"])) == (row["chosen_score"], row["rejected_score"])
        assert len(row["chosen"]) > len(row["rejected"])
    fails("rows.jsonl:2: score.py:broken fails: ZeroDivisionError", alice, files, "b.jsonl", "score.py:broken")
    fails("rows.jsonl:1: score.py:endless gives inf; a finite", alice, files, "c.jsonl", "score.py:endless")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("best", "score: 'best' is none of given, logprob, and no FILE.py:NAME"),
        ("no.py:f", "score: no.py: no such file"),
        ("score.txt:f", "score: score.txt: no Python file"),
        ("score.py:shortest", "score: there is no function shortest in score.py"),
        ("broken.py:f", "score: broken.py fails: NameError: name 'oops' is not defined"),
    ],
)
def test_a_score_that_is_not_there_is_refused(files, name, message):
    for file, text in (("score.py", FUNCTIONS), ("score.txt", FUNCTIONS), ("broken.py", "oops")):
        Path(file).write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        find_score(name)


def scored(*answers):
    return [Scored(text, score, whole) for text, score, whole in answers]


@pytest.mark.parametrize(
    ("answers", "outcome"),
    [
        (scored(("a", 1, True), ("b", 2, True), ("c", 0, True)), ("b", "c")),
        (scored(("a", 1, True), ("b", 2, False), ("c", 0, False)), ("a", "c")),
        (scored(("a", 1, True)), "few"),
        (scored(), "few"),
        (scored(("a", 1, True), (" a\n", 0, False)), "few"),
        (scored((" a", 1, True), ("b ", 0, True)), (" a", "b ")),
        (scored(("a", 1, False), ("b", 2, False)), "cut"),
        (scored(("a", 1, True), ("b", 1, True)), "tied"),
        (scored(("a", 0, True), ("b", 1, False)), "tied"),
        (scored(("a", 1, True), ("b", 0.6, True)), "near"),
    ],
)
def test_the_best_and_the_worst_make_a_pair_unless_there_is_a_reason_against_it(answers, outcome):
    row = read_prompt({"prompt": "hi"})
    found = pair_of(row, answers, margin=0.5)
    if isinstance(outcome, str):
        assert found == Outcome(None, outcome)
    else:
        assert (found.pair["chosen"], found.pair["rejected"]) == outcome


# --- the work ---------------------------------------------------------------------------------------------------------


def test_pairs_do_not_depend_on_what_is_answered_together(files, alice):
    for number, max_rows in enumerate((1, 2, 7, None)):
        sampled(alice, files, f"{number}.jsonl", max_rows=max_rows)
    texts = {Path(f"{number}.jsonl").read_text() for number in range(4)}
    assert len(texts) == 1
    sampled(alice, files, "other.jsonl", params=replace(PARAMS, seed=2))
    assert Path("other.jsonl").read_text() not in texts


def test_no_more_prompts_are_read_than_are_worked_on(files, alice):
    write("rows.jsonl", ROWS * 4)
    read_so_far = []
    asked = (read_so_far.append(one) or one for one in requests(alice, files, PARAMS))
    for number, (row, request) in enumerate(answered(Engine(alice.model, TOKENIZER, max_rows=2), asked)):
        assert len(read_so_far) - number <= AHEAD * 2
        assert request.done
        assert row.row == ROWS[number % len(ROWS)]
    assert number == 4 * len(ROWS) - 1


def test_interrupted_work_goes_on_where_it_stopped(files, alice, tmp_path):
    sampled(alice, files, "whole.jsonl")
    score, asked = find_score("given"), []

    def stopping(row, answers):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.append(row.source)
        return score.scorer(row, answers)

    made_of = {"model": "alice", "n": 3}
    with pytest.raises(KeyboardInterrupt):
        sample_pairs(alice, files, PARAMS, score._replace(scorer=stopping), "out.jsonl", made_of=made_of)
    assert not (tmp_path / "out.jsonl").exists()
    done = tmp_path / ".out.jsonl.partial" / "prompts.jsonl"
    with open(done, "a") as file:
        file.write('[{"prompt": "torn')
    fails("interrupted work that differs in n", alice, files, made_of=made_of | {"n": 4})

    def going_on(row, answers):
        asked.append(row.source)
        return score.scorer(row, answers)

    found = sample_pairs(alice, files, PARAMS, score._replace(scorer=going_on), "out.jsonl", made_of=made_of)
    assert asked == [f"rows.jsonl:{line}" for line in range(1, len(ROWS) + 1)]
    assert found.n_prompts == len(ROWS)
    assert Path("out.jsonl").read_text() == Path("whole.jsonl").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl", "whole.jsonl"]


def test_prompts_without_room_for_an_answer_are_counted(files, alice):
    write("rows.jsonl", [*ROWS, {"question": "x" * 90, "answer": "y"}, {"question": "x" * 300, "answer": "y"}])
    found = sampled(alice, files)
    assert (found.n_prompts, found.dropped["long"]) == (len(ROWS) + 2, 2)
    assert found.n_pairs == len(read("out.jsonl")) == found.n_prompts - sum(found.dropped.values())
    write("rows.jsonl", [{"question": "x" * 300, "answer": "y"}])
    fails("prompts: all 1 leave no room for an answer", alice, files, "no.jsonl")


def test_where_no_prompt_gives_a_pair_nothing_is_written(files, alice, tmp_path):
    fails("none of 9 prompts gives a pair: 9 have scores nearer", alice, files, margin=1.1)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "rows.jsonl"}, "out: rows.jsonl exists; choose another name"),
        ({"out": "out.json"}, "out: out.json: pairs are written as .jsonl"),
        ({"score": "logprob", "params": SamplingParams(n=1)}, "n: 1 answers to a prompt make no pair"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(files, alice, options, message):
    fails(message, alice, files, **options)


# --- the verb ---------------------------------------------------------------------------------------------------------


def minillm(*words):
    return run_command(cli.dispatch, ["data", "sample-pairs", *map(str, words)])


def test_the_verb_makes_pairs_of_a_folder_and_a_file(files, capsys):
    for name, seed in (("alice", 0), ("bob", 5)):
        save(make_model(seed), TOKENIZER, name)
    Path("score.py").write_text(FUNCTIONS)
    bias = ",".join(f"{token}:{bias}" for token, bias in BIAS.items())
    words = ["--n", 3, "--seed", 1, "--max_new_tokens", 12, "--logit_bias", bias]
    assert minillm("alice", "rows.jsonl", "out.jsonl", *words) == 0
    said = capsys.readouterr().out
    assert f"out.jsonl: {len(read('out.jsonl'))} pairs of 9 prompts" in said
    assert minillm("alice", "rows.jsonl", "one.jsonl", "--score", "logprob", "--reward", "bob", *words) == 0
    assert minillm("alice", "rows.jsonl", "two.jsonl", "--score", "score.py:longest", *words) == 0
    assert minillm("alice", "rows.jsonl", "chat.jsonl", "--template", "chatml", *words) == 0
    texts = [Path(f"{name}.jsonl").read_text() for name in ("out", "one", "two", "chat")]
    assert len(set(texts)) == 4

    for options, message in (
        ([], "out: out.jsonl exists"),
        (["--reward", "bob"], "reward: is the model of the score logprob"),
        (["--best_of", 9], "best_of: pairs are made of answers that are sampled"),
        (["--temperature", 0], "n: with temperature 0 all completions are the same"),
    ):
        assert minillm("alice", "rows.jsonl", "out.jsonl", *options) == 1
        assert message in capsys.readouterr().err
