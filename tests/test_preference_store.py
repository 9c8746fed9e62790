"""Preferences are stored once as trees: a prompt and its answers, each of which goes on from the end of the prompt."""

import json
import re
from itertools import pairwise, product

import numpy as np
import pytest
import torch

import minillm
from minillm import cli
from minillm.data.chat import missing_marks, prompt, render_all
from minillm.data.chat_templates import TEMPLATES, Message
from minillm.data.config import ConversationsConfig, PreferencesConfig
from minillm.data.conversation_store import open_conversations
from minillm.data.inspect import document_lines
from minillm.data.loader import Loader, eval_batches
from minillm.data.masked import TurnsConfig
from minillm.data.preference_store import open_preferences
from minillm.data.preferences import PreferencePair
from minillm.data.rows import gather, plan_of
from minillm.data.shards import describe
from minillm.data.store import verify
from minillm.data.trees import PairsConfig, read_tree, shortened, trees
from minillm.log import run_command
from minillm.losses import IGNORE_INDEX
from minillm.model.config import ModelConfig
from minillm.model.masks import restart_positions
from minillm.model.transformer import Transformer
from minillm.tokenizer import ByteTokenizer, load_tokenizer

TOKENIZER = ByteTokenizer()
CHATML = TEMPLATES["chatml"]
PAIRS = PairsConfig()
CHAT = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]


class Trees:
    """A store of prompts p with two answers c and r; of learned tokens, log p is minus the token."""

    def __init__(self, documents):
        tokens, branches, trained, self.document_offsets = [], [], [], [0]
        for p, c, r in documents:
            tokens += [*p, *c, p[-1], *r]
            branches += [0] * (len(p) - 1) + [1] * (1 + len(c)) + [2] * (1 + len(r))
            trained += [0] * len(p) + [1] * len(c) + [0] + [1] * len(r)
            self.document_offsets.append(len(tokens))
        self.document_offsets, self.n_tokens = np.array(self.document_offsets), len(tokens)
        self.read = {
            "tokens": np.array(tokens, np.uint16),
            "branches": np.array(branches, np.uint8),
            "trained": np.array(trained, np.uint8),
            "reference": np.where(trained, -np.array(tokens), 7).astype(np.float32),
        }

    def __getattr__(self, name):
        if name not in self.read:
            raise AttributeError(name)
        return lambda start, stop: self.read[name][start:stop]

    def source(self, document):
        return f"trees:{document + 1}"


def test_a_row_of_trees_says_of_each_token_its_target_branch_and_position():
    store = Trees([([1, 2, 3, 4], [10, 11], [20, 21]), ([5], [12], [22, 23])])
    batch = gather([(store, ([0, 9], [8, 4]))], 14, True)
    ignored = IGNORE_INDEX
    expected = {
        "tokens": [1, 2, 3, 4, 10, 11, 4, 20, 5, 12, 5, 22, 0, 0],
        "targets": [ignored] * 3 + [10, 11, ignored, 20, 21, 12, ignored, 22, 23] + [ignored] * 2,
        "positions": [0, 1, 2, 3, 4, 5, 3, 4, 0, 1, 0, 1, 0, 1],
        "doc_ids": [0] * 8 + [1] * 4 + [2] * 2,
        "branches": [0, 0, 0, 1, 1, 1, 2, 2, 1, 1, 2, 2, 0, 0],
        "reference": [0, 0, 0, -10, -11, 0, -20, -21, -12, 0, -22, -23, 0, 0],
    }
    for name, values in expected.items():
        assert getattr(batch, name)[0].tolist() == values, name
    assert {str(field.dtype) for field in batch[:5]} == {"torch.int64"}
    assert batch.reference.dtype == torch.float32


def test_positions_are_those_that_the_model_would_count():
    """Also where the shared prompt is empty, so that a document begins with an answer."""
    rng = np.random.default_rng(0)
    store = Trees([[list(rng.integers(50, size=n)) for n in rng.integers(1, 7, size=3)] for _ in range(20)])
    starts, lengths = store.document_offsets[:-1], np.diff(store.document_offsets) - 1
    rows = [(list(starts[i : i + 4]), list(lengths[i : i + 4])) for i in range(0, 20, 4)]
    batch = gather([(store, row) for row in rows], 90, True)
    assert torch.equal(batch.positions, restart_positions(batch.doc_ids, batch.branches))


def test_without_trees_or_a_reference_the_fields_are_none():
    store = Trees([([1, 2, 3, 4], [10, 11], [20, 21])])
    del store.read["branches"], store.read["reference"]
    batch = gather([(store, ([0], [8]))], 8, True)
    assert batch.positions[0].tolist() == list(range(8))
    assert batch.branches is None
    assert batch.reference is None
    assert gather([(store, ([0], [8]))], 8, False)[2:] == (None,) * 4


@pytest.mark.parametrize("dp_size", [1, 2])
def test_every_learned_token_of_a_tree_is_a_target_once_with_its_branch_and_reference(dp_size):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, (50, 3)).tolist()
    store = Trees([[rng.integers(1, 999, n).tolist() for n in each] for each in lengths])
    loader = [
        Loader(store, seq_len=32, packing=True, micro_batch_size=2, samples_per_step=8, seed=0, dp_rank=rank,
               dp_size=dp_size, prefetch=False).batches(0)
        for rank in range(dp_size)
    ]  # fmt: skip
    assert {batch.tokens.shape for batches in loader for batch in batches} == {(2, 32)}
    batches = [batch for rank in range(dp_size) for batch in eval_batches(store, 32, True, 3, "cpu", rank, dp_size)]
    learned = torch.cat([batch.targets[batch.targets != IGNORE_INDEX] for batch in batches])
    found = torch.cat([batch.branches[batch.targets != IGNORE_INDEX] for batch in batches])
    reference = torch.cat([batch.reference[batch.targets != IGNORE_INDEX] for batch in batches])
    trained = store.read["trained"] == 1
    pairs = zip(store.read["tokens"][trained].tolist(), store.read["branches"][trained].tolist())
    assert sorted(zip(learned.tolist(), found.tolist())) == sorted(pairs)
    assert torch.equal(reference, -learned.float())


# --- what is stored ---------------------------------------------------------------------------------------------------


def row(number, size=5, asked=4, **fields):
    answers = {"chosen": "x" * (size + number % 7), "rejected": "y" * (size + number % 5)}
    return {"prompt": f"{number} " + "q" * asked} | answers | fields


def prepared(tmp_path, rows, answers="pairs", template=CHATML, tokenizer=TOKENIZER, pairs=PAIRS, **fields):
    path = fields.pop("path", None) or write(tmp_path / "rows.jsonl", rows)
    fields = {"val": "0", "seq_len": 256, "workers": 1, "cache_dir": str(tmp_path / "cache"), **fields}
    [source] = open_preferences(PreferencesConfig(path=path, **fields), pairs, template, tokenizer, answers)
    return source.prepared


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def unshared(store):
    """Of each document {branch: (tokens, learned)}: the prompt and the answer as if they stood by themselves."""
    trees = [read_tree(store, number) for number in range(store.n_documents)]
    found = []
    for start, stop in pairwise(store.document_offsets.tolist()):
        tokens, branches, learned = (read(start, stop) for read in (store.tokens, store.branches, store.trained))
        prompt, each = tokens[branches == 0].tolist(), {}
        for branch in sorted(set(branches.tolist()) - {0}):
            here = branches == branch
            assert not learned[here][0]  # a copy of the prompt's last token
            each[branch] = (prompt + tokens[here].tolist(), [0] * len(prompt) + learned[here].tolist())
        found.append(each)
    again = [{a.branch: [*tree.prompt.tolist(), *a.tokens.tolist()] for a in tree.answers} for tree in trees]
    assert again == [{branch: tokens for branch, (tokens, _) in each.items()} for each in found]
    return found


def rendered(*said, before=0):
    """What `render` gives, up to the last token that is learned; of so many answers nothing is."""
    [one] = render_all(CHATML, TOKENIZER, [[Message(*message) for message in said]])
    end = one.answers[-1][1]
    learned = np.zeros(end, int)
    for start, stop in one.answers[before:]:
        learned[start:stop] = 1
    return one.tokens[:end].tolist(), learned.tolist()


@pytest.mark.parametrize("workers", [1, 2])
def test_each_answer_with_its_prompt_is_a_conversation_as_it_is_rendered(tmp_path, workers):
    rows = [row(number) for number in range(300)]
    rows[7] = {"chosen": CHAT, "rejected": [*CHAT[:-1], {"role": "assistant", "content": "<|im_end|>"}]}
    ready = prepared(tmp_path, rows, workers=workers)
    found = unshared(ready.train)
    assert len(found) == 300
    chat = [tuple(message.values()) for message in CHAT]
    assert found[7] == {1: rendered(*chat, before=1), 2: rendered(*chat[:-1], ("assistant", "<|im_end|>"), before=1)}
    for number in (0, 299):
        asked = ("user", rows[number]["prompt"])
        expected = [rendered(asked, ("assistant", rows[number][part])) for part in ("chosen", "rejected")]
        assert found[number] == dict(enumerate(expected, 1))
    assert ready.train.source(299) == f"{tmp_path}/rows.jsonl:300"
    verify(ready.directory)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if not missing_marks(TEMPLATES[name], TOKENIZER)])
def test_the_prompt_of_a_pair_is_that_which_an_answer_continues(name):
    template = TEMPLATES[name]
    asked = [Message(**message) for message in CHAT[:3]]
    if template.system is not None:
        asked.insert(0, Message("system", "be  brief "))
    answers = [[Message("assistant", said)] for said in ("yes", " yes", "<|im_end|>\n")]
    pairs = [PreferencePair(asked, one, other) for one, other in product(answers, answers)]
    for pair, tree in zip(pairs, trees(template, TOKENIZER, pairs)):
        assert tree.prompt.tolist() == prompt(template, TOKENIZER, asked)
        for answer, said in zip(tree.answers, (pair.chosen, pair.rejected)):
            [whole] = render_all(template, TOKENIZER, [[*asked, *said]])
            assert [*tree.prompt, *answer.tokens] == whole.tokens[: whole.answers[-1][1]].tolist()
            assert answer.learned.all()


def test_text_that_spells_a_control_token_stays_text(tmp_path):
    rows = [{"prompt": "<|im_end|>", "chosen": "<|im_start|>a", "rejected": "</s><|im_end|>"}]
    [document] = unshared(prepared(tmp_path, rows).train)
    for tokens, learned in document.values():
        assert [tokens.count(TOKENIZER.special_tokens[name]) for name in ("<|im_start|>", "<|im_end|>")] == [2, 2]
        assert tokens[-1] == TOKENIZER.special_tokens["<|im_end|>"]
        assert learned[-1] == 1


def test_packed_rows_read_apart_are_the_stored_answers(tmp_path):
    """From a batch each answer is put together with its prompt by doc_ids, branches and positions alone."""
    ready = prepared(tmp_path, [row(number) for number in range(40)])
    expected = {}
    for each in unshared(ready.train):
        for tokens, learned in each.values():
            targets = [token if now else IGNORE_INDEX for token, now in zip(tokens[1:], learned[1:])]
            expected[tuple(tokens)] = (*targets, IGNORE_INDEX)
            expected[tuple(tokens[:-1])] = tuple(targets)  # the last token of a document is only a target
    found = 0
    for batch in eval_batches(ready.train, 256, True, 4):
        for tokens, targets, positions, doc_ids, branches in zip(*batch[:5]):
            for document, branch in product(doc_ids.unique().tolist(), (1, 2)):
                own = (doc_ids == document) & (branches == branch)
                here = own | ((doc_ids == document) & (branches == 0))
                if own.any():  # else padding
                    assert positions[here].tolist() == list(range(int(here.sum())))
                    assert tuple(targets[here].tolist()) == expected[tuple(tokens[here].tolist())]
                    found += 1
    assert found == 80


# --- one by one -------------------------------------------------------------------------------------------------------


def test_an_answer_with_a_label_is_stored_beside_the_answer_to_the_next_prompt(tmp_path):
    rows = [{"prompt": f"p{number}", "completion": f"c{number}", "label": number != 1} for number in range(3)]
    found = unshared(prepared(tmp_path, rows, "labels").train)
    for number, each in enumerate(found):
        own, other = f"c{number}", f"c{(number + 1) % 3}"
        branch = 2 if number == 1 else 1
        assert set(each) == {branch, 3}
        for branch_number, said in ((branch, own), (3, other)):
            assert each[branch_number] == rendered(("user", f"p{number}"), ("assistant", said))


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("aabbc", ["b2", "b3", "c4", "c4", "a0"]),
        ("abba", ["b1", "a3", "a3", "b1"]),
        ("aaa", [None, None, None]),
        ("a", [None]),
    ],
)
def test_the_answer_beside_another_is_never_one_to_the_same_prompt(tmp_path, prompts, expected):
    rows = [{"prompt": p, "completion": f"{p}{number}", "label": True} for number, p in enumerate(prompts)]
    ready = prepared(tmp_path, rows, "labels")
    found = unshared(ready.train)
    assert [TOKENIZER.decode(each[3][0])[-2:] if 3 in each else None for each in found] == expected
    assert ready.info["preferences"]["mismatched"] == len(rows) - expected.count(None)


def test_for_labels_a_pair_is_two_answers(tmp_path):
    found = unshared(prepared(tmp_path, [row(0), row(1)], "labels").train)
    assert [set(each) for each in found] == [{1, 3}, {2, 3}] * 2
    pairs = unshared(prepared(tmp_path, [row(0), row(1)]).train)
    assert [found[0][1], found[1][2]] == [pairs[0][1], pairs[0][2]]
    assert found[0][3] == rendered(("user", row(0)["prompt"]), ("assistant", row(1)["chosen"]))
    assert found[3][3] == rendered(("user", row(1)["prompt"]), ("assistant", row(0)["rejected"]))


def test_for_pairs_an_answer_with_a_label_is_refused(tmp_path):
    rows = [row(0), {"prompt": "a", "completion": "b", "label": True}]
    with pytest.raises(ValueError, match=r"rows.jsonl:2: one answer with a label; .*on_bad skip"):
        prepared(tmp_path, rows)
    assert [set(each) for each in unshared(prepared(tmp_path, rows, "labels").train)] == [{1, 3}, {2, 3}, {1, 3}]


# --- long ones, bad ones ----------------------------------------------------------------------------------------------


def whole_length(one):
    apart = [len(rendered(("user", one["prompt"]), ("assistant", one[part]))[0]) for part in ("chosen", "rejected")]
    return sum(apart) - len(asked(one["prompt"])) + 1


def asked(text, *before):
    return prompt(CHATML, TOKENIZER, [*before, Message("user", text)])


def test_the_length_of_a_pair_is_that_of_the_tree(tmp_path):
    one = row(0, size=30, asked=30)
    length = whole_length(one)
    ready = prepared(tmp_path, [one], seq_len=length - 1)
    assert ready.train.n_tokens == length
    assert "cut_prompts" not in {name for name, count in ready.info["preferences"].items() if count}
    assert prepared(tmp_path, [one], seq_len=length - 2).info["preferences"]["cut_prompts"] == 1


def test_a_long_prompt_loses_whole_turns_then_the_beginning_of_its_text(tmp_path):
    talk = [{"role": "system", "content": "be brief"}, *CHAT[:2], {"role": "user", "content": "w" * 60}]
    one = {"messages": talk, "chosen": "good", "rejected": "bad"}
    system, last = Message("system", "be brief"), "w" * 60
    without_turn = len(asked(last, system)) + len("goodbad") + 2 + 1
    for seq_len, expected in (
        (without_turn - 1, asked(last, system)),
        (without_turn - 21, asked(last[20:], system)),
        (40, asked("w" * 12)),
    ):
        ready = prepared(tmp_path, [one], seq_len=seq_len)
        [each] = unshared(ready.train)
        for branch, answer in ((1, "good"), (2, "bad")):
            tokens, learned = each[branch]
            assert tokens[: len(expected)] == expected, seq_len
            assert TOKENIZER.decode([t for t, now in zip(tokens, learned) if now]) == answer
        assert ready.info["preferences"]["cut_prompts"] == 1
        assert ready.train.n_tokens <= seq_len + 1


@pytest.mark.parametrize(("chosen", "rejected"), [(400, 300), (400, 20), (20, 400)])
def test_long_answers_are_cut_to_one_limit(tmp_path, chosen, rejected):
    one = {"prompt": "why?", "chosen": "x" * chosen, "rejected": "y" * rejected}
    ready = prepared(tmp_path, [one], seq_len=200)
    [each] = unshared(ready.train)
    lengths = [sum(learned) for _, learned in each.values()]
    room = 201 - len(asked("why?")) - 1
    limit = max(lengths)
    assert lengths == [min(chosen + 1, limit), min(rejected + 1, limit)]
    assert room - 1 <= sum(lengths) <= room
    assert all(tokens[: len(asked("why?"))] == asked("why?") for tokens, _ in each.values())
    counts = ready.info["preferences"]
    assert (counts["cut_answers"], counts["cut_prompts"]) == (1, 0)
    assert counts["ended"] == sum(length < 100 for length in (chosen, rejected))
    assert counts["truncated"] == counts["tokens"] - counts["stored"]
    with pytest.raises(ValueError, match=r"none is left for train, 1 are longer than data\.seq_len 200"):
        prepared(tmp_path, [one], seq_len=200, pairs=PairsConfig(long="drop"))


def test_what_is_left_of_any_pair_fits_ends_the_prompt_and_begins_both_answers():
    rng = np.random.default_rng(0)

    def said(role, most):
        return Message(role, "".join(rng.choice(list("ab c\n漢"), rng.integers(1, most))))

    turns = [("user", 60), ("assistant", 60)]
    for _ in range(150):
        asked = [said("system", 30)] * int(rng.integers(2))
        asked += [said(*turn) for turn in turns * int(rng.integers(3)) + turns[:1]]
        pair = PreferencePair(asked, [said("assistant", 200)], [said("assistant", 200)])
        [whole] = trees(CHATML, TOKENIZER, [pair])
        limit = int(rng.integers(70, 400))
        if whole.length <= limit:
            continue
        kept = shortened(CHATML, TOKENIZER, asked, whole, limit)
        assert kept.length <= limit
        starts = [number for number, message in enumerate(asked) if message.role == "user"]
        last = [Message("user", asked[-1].content[cut:]) for cut in range(len(asked[-1].content))]
        ends = [asked[start:] for start in starts] + [[one] for one in last]
        ways = [way for end in ends for way in ([*asked[: starts[0]], *end], end)]
        assert kept.prompt.tolist() in (prompt(CHATML, TOKENIZER, way) for way in ways)
        lengths = [len(answer.tokens) for answer in kept.answers]
        for answer, before in zip(kept.answers, whole.answers):
            assert np.array_equal(answer.tokens, before.tokens[: len(answer.tokens)])
            assert len(answer.tokens) in (len(before.tokens), max(lengths))


def test_pairs_that_teach_nothing_are_dropped_and_counted(tmp_path):
    rows = [
        row(0),
        row(1, chosen="same", rejected="same"),
        row(2, chosen=" "),
        row(3, rejected=""),
        row(4, chosen="x" * 300 + "a", rejected="x" * 300 + "b"),
        row(5),
    ]
    ready = prepared(tmp_path, rows)
    assert ready.train.n_documents == 2
    counts = ready.info["preferences"]
    assert [counts[name] for name in ("found", "equal", "empty", "alike", "pairs")] == [6, 1, 2, 1, 2]
    said = describe(ready)
    assert "dropped 1 whose answers are equal" in said
    assert "dropped 2 with an empty answer" in said
    assert "dropped 1 whose answers differ only after what fits in data.seq_len" in said
    assert "answers: 2 chosen, of 8.5 tokens on average; 2 rejected, of 6.0 tokens on average" in said
    assert "of 2 pairs the chosen one is longer in 50.0%, shorter in 0.0%" in said


def test_equal_answers_everywhere_are_refused(tmp_path):
    with pytest.raises(ValueError, match="of 2 preferences none is left for train, 2 have equal answers"):
        prepared(tmp_path, [row(number, chosen="a", rejected="a") for number in range(2)])


def test_a_bad_row_is_named_by_file_and_row_or_skipped_and_counted(tmp_path):
    rows = [row(0), {"prompt": "a", "chosen": "b"}, row(1)]
    with pytest.raises(ValueError, match=r'rows.jsonl:2: field "rejected" is missing .*--dpo.on_bad skip'):
        prepared(tmp_path, rows)
    assert not list((tmp_path / "cache").glob("rows*/*"))
    ready = prepared(tmp_path, rows, pairs=PairsConfig(on_bad="skip"))
    assert (ready.train.n_documents, ready.info["preferences"]["bad"]) == (2, 1)
    assert "skipped 1 rows that are no preference" in describe(ready)


# --- kept, split ------------------------------------------------------------------------------------------------------


def test_it_is_prepared_alike_every_time_and_anew_for_all_that_it_depends_on(tmp_path):
    rows = [row(number) for number in range(9)]
    variants = [{}, {"answers": "labels"}, {"pairs": PairsConfig(long="drop")}, {"seq_len": 64}, {"max_samples": 3}]
    folders = [prepared(tmp_path, rows, **variant).directory for variant in variants]
    assert len(set(folders)) == len(variants)
    again = prepared(tmp_path, rows, cache_dir=str(tmp_path / "other"), workers=2).directory
    assert again.name == folders[0].name
    files = sorted(path.name for path in again.glob("*.npy"))
    assert "train-branches.npy" in files
    assert all((again / name).read_bytes() == (folders[0] / name).read_bytes() for name in files)


def test_a_prompt_is_held_out_with_all_its_answers(tmp_path):
    rows = [row(number // 2, chosen=f"c{number}") for number in range(80)]
    ready = prepared(tmp_path, rows, val="hash 0.3")
    sides = [{tuple(each[1][0][:20]) for each in unshared(store)} for store in (ready.train, ready.val)]
    assert min(map(len, sides)) > 3
    assert sides[0].isdisjoint(sides[1])
    assert sum(store.n_documents for store in (ready.train, ready.val)) == 80


def test_prepared_folders_that_do_not_suit_are_refused(tmp_path):
    folder = str(prepared(tmp_path, [row(0), row(1)], seq_len=128).directory)
    assert prepared(tmp_path, [], path=folder, seq_len=128).train.n_documents == 2
    with pytest.raises(ValueError, match=r"prepared for rows of 128, which data\.seq_len 64 would cut"):
        prepared(tmp_path, [], path=folder, seq_len=64)
    with pytest.raises(ValueError, match="prepared with answers pairs, and labels is wanted"):
        prepared(tmp_path, [], "labels", path=folder)
    with pytest.raises(ValueError, match="prepared with template chatml, and plain is wanted"):
        prepared(tmp_path, [], path=folder, template=TEMPLATES["plain"])
    config = ConversationsConfig(path=write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}]), seq_len=64,
                                 val="0", workers=1, cache_dir=str(tmp_path / "cache"))  # fmt: skip
    [source] = open_conversations(config, TurnsConfig(), CHATML, TOKENIZER)
    with pytest.raises(ValueError, match="what was prepared there are no preferences"):
        prepared(tmp_path, [], path=str(source.prepared.directory))


def test_a_cached_reference_is_read_beside_the_tokens(tmp_path):
    store = prepared(tmp_path, [row(number) for number in range(8)]).train
    assert store.reference(0, 4) is None
    with pytest.raises(ValueError, match="log-probabilities of another text"):
        store.give_reference(np.zeros(3, np.float32))
    store.give_reference(-store.tokens(0, store.n_tokens).astype(np.float32))
    for batch in eval_batches(store, 256, True, 4):
        learned = batch.targets != IGNORE_INDEX
        assert torch.equal(batch.reference, torch.where(learned, -batch.targets, 0).float())


@pytest.mark.parametrize(("name", "answers"), [("dpo_en", "pairs"), ("dpo_zh", "pairs"), ("kto_en", "labels")])
def test_rows_of_real_preferences_are_more_than_93_percent_full(real_data, tmp_path, name, answers):
    tokenizer, path = load_tokenizer(real_data / "hf_tokenizer"), str(real_data / f"{name}.json")
    ready = prepared(tmp_path, [], answers, TEMPLATES["qwen"], tokenizer, path=path, seq_len=1024, max_samples=80)
    assert plan_of(ready.train, 1024).fill(1024) > 0.93
    assert ready.train.n_documents == 80
    assert (np.diff(ready.train.document_offsets) <= 1025).all()


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_shows_each_answer_beside_its_prompt_and_counts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "rows.jsonl", [row(number) for number in range(8)])
    command = ["data", "inspect", path, "--tokenizer.kind", "byte", "--rows", "2", "--data.val", "0"]
    assert run_command(cli.dispatch, command) == 0
    said = capsys.readouterr().out
    shown = (
        f"{path}:2  40 tokens\n"
        "         prompt  <|im_start|>user\\n1 qqqq<|im_end|>\\n<|im_start|>assistant\\n\n"
        "         chosen  ⟦xxxxxx<|im_end|>⟧\n"
        "       rejected  ⟦yyyyyy<|im_end|>⟧\n"
    )
    assert shown in said
    assert f"{path}:3" not in said
    assert "8 preferences: 130 tokens trained" in said
    assert "16 of 16 answers learned with their end" in said
    assert "of 8 pairs the chosen one is longer in 25.0%, shorter in 12.5%" in said
    assert run_command(cli.dispatch, [*command, "--kind", "labels"]) == 0
    assert "      another's  ⟦xxxxxx<|im_end|>⟧\n" in capsys.readouterr().out
    renamed = write(tmp_path / "renamed.jsonl", [{"a": "hi", "b": "ho", "c": "no"}] * 3)
    assert (
        run_command(
            cli.dispatch, [*command[:2], renamed, *command[3:], "--data.columns", "prompt=a,chosen=b,rejected=c"]
        )
        == 0
    )
    assert "⟦no<|im_end|>⟧" in capsys.readouterr().out


def test_inspect_renders_rows_as_the_model_of_the_tokenizer_was_taught(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", [row(number) for number in range(8)])
    shape = ModelConfig(vocab_size=TOKENIZER.vocab_size, dim=8, n_layers=1, n_heads=1)
    minillm.save(Transformer(shape), TOKENIZER, tmp_path / "taught", template="plain")
    command = ["data", "inspect", "rows.jsonl", "--tokenizer.path", "taught", "--data.val", "0"]
    assert run_command(cli.dispatch, command) == 0
    assert "         prompt  <s>1 qqqq\\n\n         chosen  ⟦xxxxxx</s>⟧" in capsys.readouterr().out
    assert run_command(cli.dispatch, [*command, "--dpo.template", "chatml"]) == 1
    assert "chatml is given, but the model was taught plain" in capsys.readouterr().err


def test_inspect_shows_the_pairs_that_a_step_of_a_run_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "rows.jsonl", [row(number) for number in range(8)])
    (tmp_path / "run").mkdir()
    TOKENIZER.save(tmp_path / "run")
    data = {"path": path, "seq_len": 64, "val": "0", "packing": True}
    config = {"run": {"seed": 3}, "data": data, "dpo": {"template": "chatml", "loss": "ipo", "beta": 0.1}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps({"step": 1, "tokens": 512}) + "\n")
    assert run_command(cli.dispatch, ["data", "inspect", "run", "--step", "1", "--rows", "8"]) == 0
    said = capsys.readouterr().out
    assert len(re.findall(r"^sample \d: epoch 0, row \d, \d+ tokens", said, re.M)) == 8
    assert sorted(re.findall(r"rows.jsonl:(\d)  tokens 0-", said)) == list("12345678")
    assert len(re.findall(r"^       rejected  ⟦y+<\|im_end\|>⟧$", said, re.M)) == 8


def test_in_a_terminal_each_answer_has_its_colour(tmp_path):
    lines = list(document_lines(prepared(tmp_path, [row(0)]).train, 1, TOKENIZER, colour=True))
    assert lines[2].endswith("chosen  \x1b[32mxxxxx<|im_end|>\x1b[0m")
    assert lines[3].endswith("rejected  \x1b[31myyyyy<|im_end|>\x1b[0m")
