"""Conversations are stored once with a mask of what is learned, packed, split and mixed like any text."""

import json
import re
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
import torch

from minillm import cli
from minillm.config import Layer, build
from minillm.data.batch import Batch
from minillm.data.chat import render, stop_ids
from minillm.data.chat_templates import TEMPLATES, Message
from minillm.data.config import ConversationsConfig, DataConfig
from minillm.data.conversation_store import open_conversations
from minillm.data.corpus import identity
from minillm.data.inspect import document_lines
from minillm.data.loader import Loader, eval_batches
from minillm.data.masked import TurnsConfig
from minillm.data.rows import gather, plan_of
from minillm.data.shards import describe, prepare
from minillm.data.store import verify
from minillm.log import run_command
from minillm.losses import IGNORE_INDEX
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.objectives import NextToken
from minillm.tokenizer import ByteTokenizer, load_tokenizer

TOKENIZER = ByteTokenizer()
CHATML = TEMPLATES["chatml"]
TURNS = TurnsConfig()


def row(number, turns=1, size=5):
    said = [Message("user", f"q{number}"), Message("assistant", "x" * (size + number % 7))] * turns
    return {"messages": [message._asdict() for message in said]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prepared(tmp_path, rows, turns=TURNS, template=CHATML, tokenizer=TOKENIZER, **fields):
    path = fields.pop("path", None) or write(tmp_path / "rows.jsonl", rows)
    fields = {"val": "0", "seq_len": 128, "workers": 1, **fields}
    config = ConversationsConfig(path=path, cache_dir=str(tmp_path / "cache"), **fields)
    return open_conversations(config, turns, template, tokenizer)


def documents(store):
    """(tokens, trained) of each stored document."""
    return [
        (store.tokens(start, stop).tolist(), store.trained(start, stop).astype(bool).tolist())
        for start, stop in pairwise(store.document_offsets.tolist())
    ]


def rendered(row, train_on="assistant"):
    """What `render` gives, up to the last token that is learned."""
    tokens, trained = render(CHATML, TOKENIZER, [Message(**message) for message in row["messages"]], train_on)
    end = max(i for i, learned in enumerate(trained) if learned) + 1
    return tokens[:end], trained[:end]


# --- what is stored ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_stored_document_is_a_conversation_as_it_is_rendered(tmp_path, train_on, workers):
    rows = [row(number, turns=1 + number % 3) for number in range(600)]
    [source] = prepared(tmp_path, rows, TurnsConfig(train_on=train_on), workers=workers)
    store = source.prepared.train
    assert documents(store) == [rendered(one, train_on) for one in rows]
    assert [store.source(i) for i in (0, 599)] == [f"{tmp_path}/rows.jsonl:1", f"{tmp_path}/rows.jsonl:600"]
    verify(source.prepared.directory)


def test_targets_are_the_learned_tokens_and_no_others(tmp_path):
    rows = [row(number, turns=2) for number in range(40)]
    [source] = prepared(tmp_path, rows)
    store = source.prepared.train
    learned = sorted(token for tokens, trained in documents(store) for token, now in zip(tokens, trained) if now)
    batches = list(eval_batches(store, 128, True, 4))
    for batch in batches:
        kept = batch.targets[:, :-1] != IGNORE_INDEX
        inside = kept & (batch.doc_ids[:, :-1] == batch.doc_ids[:, 1:])
        assert torch.equal(batch.targets[:, :-1][inside], batch.tokens[:, 1:][inside])
    found = torch.cat([batch.targets[batch.targets != IGNORE_INDEX] for batch in batches])
    assert sorted(found.tolist()) == learned
    assert (found == stop_ids(CHATML, TOKENIZER)[0]).sum() == 80  # each answer is learned with its end


def test_plain_text_is_learned_whole(tmp_path):
    [source] = prepared(tmp_path, [{"text": "hen" * 100}, row(1)])
    (tokens, trained), _ = documents(source.prepared.train)
    assert tokens == [TOKENIZER.bos_id, *TOKENIZER.encode("hen" * 100), TOKENIZER.eos_id]
    assert trained == [False] + [True] * 301


# --- long ones, bad ones ----------------------------------------------------------------------------------------------


def test_long_conversations_are_cut_after_an_answer_or_dropped_and_counted(tmp_path):
    rows = [row(0, turns=4), row(0, size=500), row(0)]
    [source] = prepared(tmp_path, rows, seq_len=100)
    (first, trained), last = documents(source.prepared.train)
    whole = rendered(rows[0])
    assert len(whole[0]) > 101 >= len(first)
    assert (first, trained) == (whole[0][: len(first)], whole[1][: len(first)])
    assert first[-1] == stop_ids(CHATML, TOKENIZER)[0]
    assert trained[-1]
    assert last == rendered(rows[2])
    counts = source.prepared.info["conversations"]
    assert (counts["found"], counts["cut"], counts["dropped"]) == (3, 1, 1)
    assert counts["truncated"] == counts["tokens"] - counts["stored"] - 1  # the line break after the last answer
    said = describe(source.prepared)
    assert "cut 1 conversations after the last answer that fits in data.seq_len" in said
    assert "dropped 1 conversations, of which not even the first answer fits" in said
    [source] = prepared(tmp_path, rows, TurnsConfig(long="drop"), seq_len=100)
    assert documents(source.prepared.train) == [rendered(rows[2])]


def test_the_last_answer_is_the_last_that_is_left(tmp_path):
    [source] = prepared(tmp_path, [row(0, turns=4)], TurnsConfig(train_on="last"), seq_len=100)
    [(_, trained)] = documents(source.prepared.train)
    assert trained[-6:] == [True] * 6
    assert sum(trained) == 6


def test_a_conversation_that_just_fits_is_whole(tmp_path):
    length = len(rendered(row(0))[0])
    for seq_len, left in ((length - 1, 1), (length - 2, 0)):
        if left:
            assert len(documents(prepared(tmp_path, [row(0)], seq_len=seq_len)[0].prepared.train)) == 1
        else:
            with pytest.raises(ValueError, match=f"none is left for train, 1 are longer than data.seq_len {seq_len}"):
                prepared(tmp_path, [row(0)], seq_len=seq_len)


BAD = {"messages": [{"role": "user", "content": 5}]}


def test_a_bad_row_is_named_by_file_and_row_or_skipped_and_counted(tmp_path, caplog):
    rows = [row(0), BAD, row(1), {"title": 1}]
    with pytest.raises(
        ValueError, match=r'rows.jsonl:2: field "messages", message 0: content is a number; .*on_bad skip'
    ):
        prepared(tmp_path, rows)
    assert not list((tmp_path / "cache").glob("rows*/*"))
    [source] = prepared(tmp_path, rows, TurnsConfig(on_bad="skip"))
    assert documents(source.prepared.train) == [rendered(row(0)), rendered(row(1))]
    assert source.prepared.info["conversations"]["bad"] == 2
    assert "rows.jsonl:4: the format is not known (found: title)" in caplog.text
    assert "skipped 2 rows that are no conversation" in describe(source.prepared)


def test_a_line_that_is_no_json_is_a_bad_row(tmp_path, caplog):
    lines = [json.dumps(row(0)), '{"messages": [', json.dumps(row(1)), "hi"]
    rows, listed = tmp_path / "rows.jsonl", tmp_path / "list.json"
    rows.write_text("\n".join(lines))
    listed.write_text("[" + ",".join(lines) + "]")
    with pytest.raises(ValueError, match=r"rows.jsonl:2: the row is not valid JSON: Expecting value .*on_bad skip"):
        prepared(tmp_path, [], path=str(rows))
    skip = TurnsConfig(on_bad="skip")
    [source] = prepared(tmp_path, [], skip, path=str(rows))
    assert documents(source.prepared.train) == [rendered(row(0)), rendered(row(1))]
    assert source.prepared.info["conversations"]["bad"] == 2
    assert "rows.jsonl:4: the row is not valid JSON: Expecting value (column 1)" in caplog.text
    with pytest.raises(ValueError, match=r"list.json:1: not valid JSON"):  # where the next row begins is not known
        prepared(tmp_path, [], skip, path=str(listed))


def test_a_role_without_a_place_in_the_template_is_a_bad_row(tmp_path):
    rows = [{"system": "s", "prompt": "p", "completion": "c"}]
    with pytest.raises(ValueError, match=r"rows.jsonl:1: the template mistral has no place for a system message"):
        prepared(tmp_path, rows, template=TEMPLATES["mistral"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [([], "the dataset is empty"), ([BAD, BAD], "the dataset is empty: 2 rows are none, the first is .*:1: field")],
)
def test_an_empty_dataset_is_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, rows, TurnsConfig(on_bad="skip"))


# --- kept, split, mixed -----------------------------------------------------------------------------------------------


def test_it_is_prepared_once_for_all_that_it_depends_on(tmp_path):
    rows = [row(number) for number in range(9)]
    places = {}
    variants = [
        {}, {"turns": TurnsConfig(train_on="all")}, {"turns": TurnsConfig(long="drop")}, {"seq_len": 64},
        {"template": TEMPLATES["plain"]}, {"max_samples": 3}, {"val": "0.4"}, {"columns": ["messages=messages"]},
    ]  # fmt: skip
    for number, variant in enumerate(variants):
        [source] = prepared(tmp_path, rows, **variant)
        places[number] = (source.prepared.directory, source.prepared.directory.stat().st_ino)
    assert len(set(places.values())) == len(variants)
    for number, variant in enumerate(variants):
        directory = prepared(tmp_path, rows, **variant)[0].prepared.directory
        assert (directory, directory.stat().st_ino) == places[number]
    first = prepared(tmp_path, [*rows, BAD], max_samples=3)[0].prepared.train  # what comes later is not even read
    assert documents(first) == [rendered(one) for one in rows[:3]]
    write(tmp_path / "rows.jsonl", rows)
    [again] = prepared(tmp_path, rows, path=str(places[0][0]))  # the folder itself
    assert documents(again.prepared.train) == [rendered(one) for one in rows]


def test_prepared_folders_that_do_not_suit_are_refused(tmp_path):
    [source] = prepared(tmp_path, [row(0), row(1)])
    folder = str(source.prepared.directory)
    [again] = prepared(tmp_path, [], path=folder)
    assert documents(again.prepared.train) == documents(source.prepared.train)
    with pytest.raises(ValueError, match=r"prepared for rows of 128, which data\.seq_len 64 would cut"):
        prepared(tmp_path, [], path=folder, seq_len=64)
    with pytest.raises(ValueError, match="prepared with template chatml, and plain is wanted"):
        prepared(tmp_path, [], path=folder, template=TEMPLATES["plain"])
    with pytest.raises(ValueError, match="prepared with train_on assistant, and last is wanted"):
        prepared(tmp_path, [], TurnsConfig(train_on="last"), path=folder)
    (tmp_path / "text.txt").write_text("nobody said it " * 9)
    config = DataConfig(path=str(tmp_path / "text.txt"), val="0", cache_dir=str(tmp_path / "cache"), workers=1)
    text = str(prepare(config, TOKENIZER).directory)
    with pytest.raises(ValueError, match="what was prepared there are no conversations"):
        prepared(tmp_path, [], path=text)


def test_the_mask_is_part_of_what_a_run_is_identified_by(tmp_path):
    rows = [row(number, turns=2) for number in range(9)]
    hashes = [
        identity(prepared(tmp_path, rows, TurnsConfig(train_on=what)))["data_hash"] for what in ("assistant", "last")
    ]
    assert hashes[0] != hashes[1]


def test_a_damaged_mask_is_noticed(tmp_path):
    [source] = prepared(tmp_path, [row(0)])
    path = source.prepared.directory / "train-trained.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\2")
    with pytest.raises(ValueError, match=r"train-trained.npy: changed since it was prepared"):
        verify(source.prepared.directory)


def test_a_tail_a_share_by_hash_or_a_file_is_held_out(tmp_path):
    rows = [row(number) for number in range(100)]
    whole = [rendered(one) for one in rows]
    [source] = prepared(tmp_path, rows, val="0.1")
    assert documents(source.prepared.train) == whole[:90]
    assert documents(source.prepared.val) == whole[90:]
    [source] = prepared(tmp_path, rows, val="hash 0.2")
    held_out = documents(source.prepared.val)
    assert 5 < len(held_out) < 40
    assert sorted(documents(source.prepared.train) + held_out) == sorted(whole)
    [source] = prepared(tmp_path, rows, val=write(tmp_path / "other.jsonl", [row(200)]))
    assert documents(source.prepared.val) == [rendered(row(200))]
    assert documents(source.prepared.train) == whole


def test_several_datasets_are_mixed_by_weight(tmp_path):
    paths = [write(tmp_path / f"{name}.jsonl", [row(number, size=9) for number in range(30)]) for name in "ab"]
    sources = prepared(tmp_path, [], path=paths, weights=[3, 1])
    assert [(source.name, source.share) for source in sources] == [("a", 0.75), ("b", 0.25)]
    loader = Loader(sources, seq_len=128, packing=True, micro_batch_size=4, samples_per_step=8, seed=0, prefetch=False)
    assert all((batch.targets != IGNORE_INDEX).any() for batch in loader.batches(0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"packing": False}, "data.packing: a row is a conversation; leave it out"),
        ({"columns": ["x=y"]}, "data.columns: x is no part of a conversation"),
        ({"val": "2"}, "data.val: '2' is no fraction of the text"),
    ],
)
def test_fields_that_mean_nothing_here_are_refused(fields, message):
    @dataclass(frozen=True)
    class Config:
        data: ConversationsConfig = field(default_factory=ConversationsConfig)

    with pytest.raises(ValueError, match=re.escape(message)):
        build(Config, [Layer("", {f"data.{name}": value for name, value in fields.items()})])


@pytest.mark.parametrize(
    ("name", "seq_len"), [("alpaca_en.json", 1024), ("alpaca_zh.json", 1024), ("alpaca_zh.json", 512)]
)
def test_rows_of_real_conversations_are_more_than_98_percent_full(real_data, tmp_path, name, seq_len):
    tokenizer = load_tokenizer(real_data / "hf_tokenizer")
    [source] = prepared(
        tmp_path, [], path=str(real_data / name), template=TEMPLATES["qwen"], tokenizer=tokenizer, seq_len=seq_len
    )
    assert plan_of(source.prepared.train, seq_len).fill(seq_len) > 0.98
    counts = source.prepared.info["conversations"]
    assert counts["ended"] == counts["answers"]


# --- what is learned from it ------------------------------------------------------------------------------------------


@pytest.fixture
def packed(tmp_path):
    """(a model, the packed rows of some conversations, the same a row each)."""
    [source] = prepared(tmp_path, [row(number, turns=1 + number % 2) for number in range(12)])
    store = source.prepared.train
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocab_size=272, dim=32, n_layers=2, n_heads=2, max_seq_len=128)).double()
    plan = plan_of(store, 128)
    rows = gather([(store, plan.pieces(number)) for number in range(plan.n_rows)], 128, True)
    offsets = store.document_offsets.tolist()
    single = gather([(store, ([start], [stop - start - 1])) for start, stop in pairwise(offsets)], 128, True)
    assert 1 < len(rows[0]) < len(single[0]) == 12
    return model, Batch(*rows), Batch(*single)


def test_loss_and_gradient_do_not_depend_on_packing(packed):
    model, rows, single = packed
    found = []
    for batch in (rows, single):
        model.zero_grad()
        loss, _ = NextToken()(model, batch)
        loss.backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        found.append((NextToken().count(batch), loss.detach(), gradient))
    (count, loss, gradient), (count_single, loss_single, gradient_single) = found
    assert count == count_single > 0
    torch.testing.assert_close(loss, loss_single)
    torch.testing.assert_close(gradient, gradient_single)


def test_another_conversation_in_the_row_changes_nothing(packed):
    model, rows, _ = packed
    changed = rows.doc_ids == 1
    tokens = torch.where(changed, (rows.tokens + 7) % 272, rows.tokens)
    with torch.no_grad():
        before, after = (model(one, rows.positions, rows.doc_ids) for one in (rows.tokens, tokens))
    assert torch.equal(before[~changed], after[~changed])
    assert not torch.equal(before[changed], after[changed])


def test_tokens_of_the_prompt_get_exactly_no_gradient(packed):
    model, rows, _ = packed
    logits = model(rows.tokens, rows.positions, rows.doc_ids).detach().requires_grad_()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows.targets.flatten(), reduction="sum").backward()
    learned = rows.targets != IGNORE_INDEX
    assert (logits.grad[~learned] == 0).all()
    assert (logits.grad[learned].abs().sum(-1) > 0).all()
    other = rows._replace(targets=torch.where(learned, rows.targets, IGNORE_INDEX))
    losses = [NextToken()(model, batch)[0] for batch in (rows, other)]
    assert losses[0] == losses[1]


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_marks_what_is_learned_and_counts_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "rows.jsonl", [row(number) for number in range(8)])
    command = ["data", "inspect", path, "--tokenizer.kind", "byte", "--rows", "2"]
    assert run_command(cli.dispatch, command) == 0
    said = capsys.readouterr().out
    shown = r"<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n⟦xxxxxx<|im_end|>⟧"
    assert f"{path}:2  28 tokens  {shown}\n" in said
    assert f"{path}:3" not in said
    assert "8 conversations: " in said
    assert "0 truncated; 8 of 8 answers learned with their end" in said
    [folder] = (tmp_path / ".cache/minillm").glob("rows*/index.json")
    assert run_command(cli.dispatch, ["data", "inspect", str(folder.parent), "--rows", "1"]) == 0
    assert "assistant\\n⟦xxxxx<|im_end|>⟧" in capsys.readouterr().out


def test_inspect_shows_what_a_step_of_a_run_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "rows.jsonl", [row(number) for number in range(8)])
    (tmp_path / "run").mkdir()
    TOKENIZER.save(tmp_path / "run")
    data = {"path": path, "seq_len": 64, "val": "0", "packing": True}
    config = {"run": {"seed": 3}, "data": data, "sft": {"template": "chatml", "train_on": "last", "neftune": 5.0}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps({"step": 1, "tokens": 256}) + "\n")
    assert run_command(cli.dispatch, ["data", "inspect", "run", "--step", "1"]) == 0
    said = capsys.readouterr().out
    assert len(re.findall(r"^sample \d: epoch 0, row \d, \d+ tokens", said, re.M)) == 4
    assert len(re.findall(r"<\|im_start\|>assistant\\n⟦x+(<\|im_end\|>)?⟧$", said, re.M)) == 8


def test_in_a_terminal_what_is_learned_is_green(tmp_path):
    [source] = prepared(tmp_path, [row(0)])
    [line] = document_lines(source.prepared.train, 1, TOKENIZER, colour=True)
    assert line.endswith("assistant\\n\x1b[32mxxxxx<|im_end|>\x1b[0m")
    [line] = document_lines(source.prepared.train, 1, TOKENIZER, width=20)
    assert line.endswith("<|im_start|>user\\nq…")
    assert np.array_equal(source.prepared.train.trained(0, 3), [0, 0, 0])
