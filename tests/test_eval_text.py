"""How well a model predicts a text: the same number however it is read, cut, batched and stored."""

import gzip
import hashlib
import json
import math
import random
from itertools import pairwise

import numpy as np
import pytest
import torch

import train
from minillm import cli
from minillm.data.tokenise import Encoded
from minillm.data.writing import Written
from minillm.eval import text as eval_text
from minillm.eval.text import EvalTextConfig, evaluate_text, stretches
from minillm.load import load, save
from minillm.log import read_metrics, run_command
from minillm.model.config import ModelConfig
from minillm.model.transformer import Transformer
from minillm.tokenizer import ByteTokenizer
from minillm.tokenizer.to_hf import hugging_face_files

TOKENIZER = ByteTokenizer()
FIGURES = ("val_loss", "val_bpb", "val_accuracy", "perplexity")


def make_model(max_seq_len=32, dtype=torch.float64, **changes):
    """Random weights large enough that tokens differ in how likely they are."""
    shape = {"dim": 16, "n_layers": 2, "n_heads": 2} | changes
    model = Transformer(ModelConfig(vocab_size=TOKENIZER.vocab_size, max_seq_len=max_seq_len, **shape))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.to(dtype).eval()


@torch.no_grad()
def plain_definition(model, texts, seq_len):
    """Every document alone, in windows of seq_len one after the other: (nats, hits, targets, bytes)."""
    nats, hits, targets = 0.0, 0, 0
    for text in texts:
        ids = torch.tensor([TOKENIZER.bos_id, *TOKENIZER.encode(text), TOKENIZER.eos_id])
        for start in range(0, len(ids) - 1, seq_len):
            window, following = ids[:-1][start : start + seq_len], ids[1:][start : start + seq_len]
            logprobs = model(window[None])[0].log_softmax(-1)
            nats -= logprobs.gather(1, following[:, None]).sum().item()
            hits += int((logprobs.argmax(-1) == following).sum())
            targets += len(following)
    return nats, hits, targets, sum(len(text.encode()) for text in texts)


def sentences(count, seed=0, longest=60):
    words = random.Random(seed)
    return [
        " ".join(words.choices("a red blå cat 狗 ran sat under".split(), k=words.randint(1, longest // 4)))
        for _ in range(count)
    ]


def write_rows(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def small_stretches(monkeypatch):
    """Some documents a stretch, and blocks of a few lines, so that all seams are met."""
    monkeypatch.setattr(eval_text, "STRETCH", 100)
    monkeypatch.setattr("minillm.data.text.BLOCK", 128)


@pytest.mark.parametrize("seq_len", [1, 7, 32])
def test_figures_are_those_of_the_plain_definition(tmp_path, seq_len, small_stretches):
    model, texts = make_model(), [*sentences(20), "one long document " * 9, *sentences(5, seed=1)]
    nats, hits, targets, n_bytes = plain_definition(model, texts, seq_len)
    found = evaluate_text(model, TOKENIZER, EvalTextConfig(write_rows(tmp_path / "a.jsonl", texts), seq_len=seq_len))
    assert (found["tokens"], found["bytes"], found["documents"]) == (targets, n_bytes, 26)
    assert found["val_loss"] == pytest.approx(nats / targets, rel=1e-12)
    assert found["val_bpb"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-12)
    assert found["val_accuracy"] == hits / targets
    assert found["perplexity"] == pytest.approx(math.exp(nats / targets))


@pytest.mark.parametrize("packing", [True, False])
def test_stretches_and_micro_batches_change_nothing(tmp_path, packing, monkeypatch):
    model, path = make_model(), write_rows(tmp_path / "a.jsonl", [*sentences(30), "long " * 150, "end"])
    text = EvalTextConfig(path, seq_len=16, packing=packing)
    whole = evaluate_text(model, TOKENIZER, text)
    for stretch, rows in [(17, 1), (64, 3), (500, 2), (10**6, 100)]:
        monkeypatch.setattr(eval_text, "STRETCH", stretch)
        assert evaluate_text(model, TOKENIZER, text, rows) == pytest.approx(whole, rel=1e-12)


def test_without_packing_documents_are_one_text(tmp_path, small_stretches):
    model = make_model()
    texts = sentences(12)
    path = write_rows(tmp_path / "a.jsonl", texts)
    found = evaluate_text(model, TOKENIZER, EvalTextConfig(path, seq_len=8, packing=False))
    ids = [id for text in texts for id in [TOKENIZER.bos_id, *TOKENIZER.encode(text), TOKENIZER.eos_id]]
    nats = 0.0
    for start in range(0, len(ids) - 1, 8):
        logprobs = model(torch.tensor([ids[start : start + 8]]))[0].log_softmax(-1).tolist()
        nats -= sum(row[following] for row, following in zip(logprobs, ids[start + 1 : start + 9]))
    assert found["tokens"] == len(ids) - 1
    assert found["val_loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-12)


def test_stretches_hold_every_row_once_and_little_at_a_time(monkeypatch):
    """Random documents in random blocks."""
    monkeypatch.setattr(eval_text, "STRETCH", 50)
    numbers = random.Random(0)
    for _ in range(200):
        seq_len = numbers.randint(1, 20)
        documents = [
            list(range(1000 * i, 1000 * i + numbers.choice([2, 3, 17, 90]))) for i in range(numbers.randint(1, 8))
        ]
        pieces = [
            (document[a:b], a == 0, b == len(document))
            for document in documents
            for cuts in [sorted({0, len(document), numbers.randrange(1, len(document))})]
            for a, b in pairwise(cuts)
        ]
        blocks = []
        while pieces:
            n = numbers.randint(1, 3)
            blocks.append(block_of(pieces[:n]))
            pieces = pieces[n:]
        windows = []
        for stretch in stretches(blocks, seq_len, packing=True):
            assert stretch.n_tokens <= 50 + seq_len + 300
            for begin, end in pairwise(stretch.document_offsets):
                tokens = stretch.tokens(begin, end).tolist()
                windows += [tokens[i : i + seq_len + 1] for i in range(0, len(tokens) - 1, seq_len)]
        assert windows == [d[i : i + seq_len + 1] for d in documents for i in range(0, len(d) - 1, seq_len)]


def block_of(pieces):
    texts, starts, ends = zip(*pieces)
    lengths = np.array(list(map(len, texts)))
    tokens = np.array([token for text in texts for token in text])
    return Encoded("", Written(tokens, lengths, np.array(starts), np.array(ends), *[lengths] * 3), lengths, [], 1)


def test_bits_per_byte_of_two_texts_are_weighted_by_their_bytes(tmp_path):
    model = make_model()
    parts = [sentences(5), sentences(20, seed=1)]
    paths = [write_rows(tmp_path / f"{i}.jsonl", part) for i, part in enumerate(parts)]
    first, second = (evaluate_text(model, TOKENIZER, EvalTextConfig(path)) for path in paths)
    both = evaluate_text(model, TOKENIZER, EvalTextConfig(paths))
    bits = sum(part["val_bpb"] * part["bytes"] for part in (first, second))
    assert both["val_bpb"] == pytest.approx(bits / (first["bytes"] + second["bytes"]), rel=1e-12)
    assert evaluate_text(model, TOKENIZER, EvalTextConfig(str(tmp_path / "*.jsonl"))) == both


def test_every_format_of_a_text_gives_the_same(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow writes parquet; extra `data`")
    import pyarrow

    model, texts = make_model(), sentences(9)
    (tmp_path / "a.txt").write_text("\n".join(texts) + "\n")
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        file.write("\n".join(texts) + "\n")
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    rows = evaluate_text(model, TOKENIZER, EvalTextConfig(write_rows(tmp_path / "a.jsonl", texts)))
    for name in ("a.txt", "a.txt.gz", "a.parquet"):
        text = EvalTextConfig(str(tmp_path / name), document="line")
        assert evaluate_text(model, TOKENIZER, text) == pytest.approx(rows, rel=1e-12), name


def test_text_that_spells_a_special_token_is_text(tmp_path):
    found = evaluate_text(make_model(), TOKENIZER, EvalTextConfig(write_rows(tmp_path / "a.jsonl", ["</s><s>"])))
    assert (found["tokens"], found["bytes"]) == (7 + 1, 7)


def test_several_processes_read_what_one_reads(tmp_path):
    model, path = make_model(), write_rows(tmp_path / "a.jsonl", sentences(30))
    one, two = (evaluate_text(model, TOKENIZER, EvalTextConfig(path, workers=n)) for n in (1, 2))
    assert one == two


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (b"", {}, "no text in"),
        (b" \n\n", {}, "no text in"),
        (b"fine\nno\xff\n", {}, r"a\.txt:2: not UTF-8 at byte 7"),
        (b"fine", {"seq_len": 33}, "data.seq_len: 33 is longer than the model's max_seq_len 32"),
        (b"fine", {"path": None}, "data.path: no path given"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_words(tmp_path, content, changes, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        evaluate_text(make_model(), TOKENIZER, EvalTextConfig(**{"path": str(tmp_path / "a.txt")} | changes))


def test_a_model_or_tokenizer_that_does_not_fit_is_refused(tmp_path):
    text = EvalTextConfig(write_rows(tmp_path / "a.jsonl", ["fine"]))
    small = Transformer(ModelConfig(vocab_size=100, dim=16, n_layers=1, n_heads=2))
    with pytest.raises(ValueError, match="the tokenizer has 272 tokens, the model 100"):
        evaluate_text(small, TOKENIZER, text)
    with pytest.raises(ValueError, match="there is no tokenizer"):
        evaluate_text(small, None, text)
    with pytest.raises(ValueError, match="bidirectional"):
        evaluate_text(make_model(causal=False), TOKENIZER, text)
    endless = ByteTokenizer()
    endless.eos_id = None
    with pytest.raises(ValueError, match="no token to end a document"):
        evaluate_text(make_model(), endless, text)


# --- the verb ---------------------------------------------------------------------------------------------------------


def minillm(*words):
    return run_command(cli.dispatch, [str(word) for word in words])


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A short run with a validation text, its settings as its caller wishes."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "train.jsonl", sentences(200))
    write_rows(tmp_path / "val.jsonl", sentences(40, seed=1))
    words = "--data.path train.jsonl --data.val val.jsonl --tokenizer.vocab_size 300 --data.seq_len 16 --model.dim 16 "
    words += "--model.n_layers 1 --model.n_heads 2 --model.max_seq_len 48 --train.max_steps 4 --train.batch_tokens 64 "
    words += "--train.eval_every 2 --train.save_every 2 --run.dir run"

    def run(*more):
        assert run_command(train.main, [*words.split(), *more]) == 0
        return {row["step"]: row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "val_loss" in row}

    return run


def evaluated(capsys, *words):
    capsys.readouterr()
    assert minillm("eval", *words, "--json") == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("packing", ["true", "false"])
def test_the_figures_of_a_run_are_found_again(trained, capsys, packing):
    """Its own val_loss and val_bpb, at each checkpoint and in what is exported of it."""
    rows = trained("--data.packing", packing)
    words = ["--data.path", "val.jsonl", "--data.packing", packing]
    for step, row in rows.items():
        found = evaluated(capsys, "run", *words, "--step", step)
        assert found["val_loss"] == pytest.approx(row["val_loss"], rel=1e-6)
        assert found["val_bpb"] == pytest.approx(row["val_bpb"], rel=1e-6)
    assert minillm("export", "run", "out") == 0
    exported = evaluated(capsys, "out", *words, "--data.seq_len", 16)
    assert {name: exported[name] for name in FIGURES} == {name: found[name] for name in FIGURES}
    assert found["settings"]["seq_len"] == 16


def test_the_result_says_what_was_measured(trained, tmp_path, capsys):
    trained()
    found = evaluated(capsys, "run", "--data.path", "val.jsonl", "--device", "cpu")
    folder = tmp_path / "run" / "checkpoints" / "step-00000004"
    assert found["weights"] == {
        "model-00000.safetensors": hashlib.sha256((folder / "model-00000.safetensors").read_bytes()).hexdigest()
    }
    assert found["tokenizer_hash"] == load("run")[1].hash
    assert (found["documents"], found["files"]) == (40, ["val.jsonl"])
    settings = {"document": "file", "text_field": "text", "seq_len": 16, "packing": True, "precision": "fp32"}
    assert found["settings"] == settings | {"device": "cpu"}
    assert minillm("eval", "run", "--data.path", "val.jsonl") == 0
    table = capsys.readouterr().out
    for expected in (
        f"{found['val_bpb']:.4f}",
        f"{found['tokens']:,} tokens",
        found["weights"]["model-00000.safetensors"],
    ):
        assert expected in table


@pytest.mark.parametrize("case", ["llama, tied", "gpt2"])
@torch.no_grad()
def test_a_hugging_face_folder_gets_the_figures_of_transformers(tmp_path, capsys, case):
    transformers = pytest.importorskip("transformers", reason="the reference library, extra `test`")
    from families import make

    theirs, folder, texts = make(case, vocab_size=TOKENIZER.vocab_size), tmp_path / "folder", sentences(6)
    theirs.save_pretrained(folder, max_shard_size="50KB")
    for name, content in hugging_face_files(TOKENIZER).items():
        (folder / name).write_text(content)
    reader = transformers.AutoTokenizer.from_pretrained(folder)
    nats = hits = targets = 0
    for text in texts:
        ids = [reader.bos_token_id, *reader.encode(text, add_special_tokens=False), reader.eos_token_id]
        for start in range(0, len(ids) - 1, 16):
            window, following = (torch.tensor([ids[a : a + 16]]) for a in (start, start + 1))
            logits = theirs(window[:, : following.shape[1]]).logits[0].double()
            nats += torch.nn.functional.cross_entropy(logits, following[0], reduction="sum").item()
            hits += int((logits.argmax(-1) == following[0]).sum())
            targets += following.shape[1]
    path = write_rows(tmp_path / "a.jsonl", texts)
    found = evaluated(capsys, folder, "--data.path", path, "--data.seq_len", 16)
    assert (found["tokens"], found["val_accuracy"]) == (targets, hits / targets)
    assert found["val_loss"] == pytest.approx(nats / targets, rel=1e-6)
    assert found["val_bpb"] == pytest.approx(nats / math.log(2) / sum(len(text.encode()) for text in texts), rel=1e-6)
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}
    assert found["weights"] == files
    assert len(files) > 1
    assert found["tokenizer_hash"] == load(folder)[1].hash


def test_half_precision_is_computed_in_half_precision(tmp_path, capsys):
    model = make_model(dtype=torch.float32)
    save(model.bfloat16(), TOKENIZER, tmp_path / "saved")
    path = write_rows(tmp_path / "a.jsonl", sentences(4))
    full = evaluate_text(model.float(), TOKENIZER, EvalTextConfig(path))
    words = [tmp_path / "saved", "--data.path", path, "--precision"]
    assert evaluated(capsys, *words, "fp32")["val_loss"] == pytest.approx(full["val_loss"], rel=1e-6)
    half = evaluated(capsys, *words, "bf16")["val_loss"]
    assert half == pytest.approx(full["val_loss"], rel=2e-2)
    assert half != full["val_loss"]


def test_mistakes_are_one_line(trained, capsys):
    trained()
    for words, message in [
        (["run"], "data.path: no path given"),
        (["run", "--data.path", "val.json"], "did you mean val.jsonl?"),
        (["run", "--data.path", "val.jsonl", "--data.seq_len", 49], "max_seq_len 48"),
        (["run", "--data.path", "val.jsonl", "--data.val", 0.1], "data.val is not a field"),
        (["train.jsonl", "--data.path", "val.jsonl"], "train.jsonl: is a file"),
    ]:
        capsys.readouterr()
        assert minillm("eval", *words) == 1
        said = capsys.readouterr().err
        assert message in said
        assert "Traceback" not in said
