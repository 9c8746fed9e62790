"""Several sources: each has exactly its share of the samples, its own order, and its own validation."""

import json
import logging
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from watched import failure, losses

import train
from minillm import checkpoint, cli
from minillm.config import Layer, build, file_layer
from minillm.data.config import DataConfig, stem, unique
from minillm.data.corpus import open_sources
from minillm.data.inspect import inspect_lines
from minillm.data.loader import Loader
from minillm.data.mixture import PLACES, Source, say_use, shares, whole_places
from minillm.data.order import epochs_and_rows, sources_and_numbers
from minillm.data.shards import prepare
from minillm.data.store import Prepared
from minillm.distributed.context import Context
from minillm.eval.perplexity import mixture
from minillm.log import run_command
from minillm.losses import IGNORE_INDEX
from minillm.model.transformer import Transformer
from minillm.objectives import NextToken
from minillm.recipe import make_evaluation
from minillm.tokenizer import ByteTokenizer
from minillm.trainer import Stopped

FAR = 10**6  # where the tokens of the next source begin


class CountingStore:
    """A source whose token at place i is `first` + i, so that each token of a batch says where it came from."""

    def __init__(self, lengths, first=0):
        self.document_offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.n_tokens, self.first = int(self.document_offsets[-1]), first

    def tokens(self, start, stop):
        return np.arange(self.first + start, self.first + stop, dtype=np.uint32)

    def source(self, document):
        return f"{self.first}.txt:{document + 1}"


def mixed(places=(2, 1, 5), sizes=(700, 500, 900)):
    """Sources with so many places of a block of their sum, whose tokens do not overlap."""
    stores = [CountingStore([20] * (size // 20), number * FAR) for number, size in enumerate(sizes)]
    return [
        Source(f"s{n}", count, Prepared(store, None, {}, Path()))
        for n, (count, store) in enumerate(zip(places, stores))
    ]


def loader(text, packing=False, seed=1, samples_per_step=8, **more):
    words = {"seq_len": 16, "micro_batch_size": 2, "prefetch": False} | more
    return Loader(text, packing=packing, seed=seed, samples_per_step=samples_per_step, **words)


def rows_of(batches):
    """The inputs of each row that has a target."""
    return [
        tuple(row.tolist())
        for batch in batches
        for row, targets in zip(batch.tokens, batch.targets)
        if (targets != IGNORE_INDEX).any()
    ]


both = pytest.mark.parametrize("packing", [False, True], ids=["plain", "packed"])


# --- shares -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1, 2, 3.3, 5, 100])
def test_shares_by_temperature_are_those_of_the_formula(temperature):
    sizes = [300_000_000, 50_000, 7_000_000]
    powers = [(size / sum(sizes)) ** (1 / temperature) for size in sizes]  # Conneau et al. 2020, eq. 1
    assert shares(sizes, temperature=temperature) == pytest.approx([power / sum(powers) for power in powers])


def test_shares_without_weights_or_temperature_are_those_of_the_tokens():
    assert shares([10, 30, 60]) == pytest.approx([0.1, 0.3, 0.6])


def test_weights_need_not_add_up_to_one_and_the_sizes_do_not_matter():
    assert shares([10, 10**12], weights=[3, 1]) == shares([5, 5], weights=[0.75, 0.25]) == [0.75, 0.25]


def test_extreme_temperatures_are_no_overflow():
    assert shares([10**13, 5], temperature=1e-4) == [1, 0]
    assert shares([10**13, 5], temperature=1e-320) == [1, 0]
    assert shares([10**13, 5], temperature=1e9) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("seed", range(20))
def test_places_add_up_and_are_the_shares_rounded(seed):
    generator = random.Random(seed)
    wanted = [generator.random() ** 3 + 0.01 for _ in range(generator.randint(1, 40))]
    wanted = [one / sum(wanted) for one in wanted]
    places = whole_places(wanted)
    assert sum(places) == PLACES
    assert all(abs(count - share * PLACES) < 1 for count, share in zip(places, wanted))


def test_places_go_to_the_largest_remainders():
    assert whole_places([0.47, 0.16, 0.37], 10) == [5, 1, 4]


def test_the_smallest_source_has_a_place():
    assert whole_places([1 - 2e-9, 1e-9, 1e-9]) == [PLACES - 2, 1, 1]
    assert whole_places([0.001, 0.001, 0.499, 0.499], 4) == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="5000 sources; a mixture has at most 4096"):
        whole_places([1 / 5000] * 5000)


# --- order ------------------------------------------------------------------------------------------------------------


def test_each_block_has_exactly_its_share_of_each_source():
    places = whole_places([0.7, 0.2, 0.1])
    sources, numbers = sources_and_numbers(np.arange(5 * PLACES), places, seed=3)
    for block in sources.reshape(5, PLACES):
        assert np.bincount(block).tolist() == places
    for source, count in enumerate(places):
        assert np.array_equal(np.sort(numbers[sources == source]), np.arange(5 * count))
        blocks = np.arange(5 * PLACES)[sources == source] // PLACES
        assert np.array_equal(numbers[sources == source] // count, blocks)


def test_sources_are_spread_evenly_through_a_block_and_blocks_differ():
    places = [3072, 1024]
    blocks = sources_and_numbers(np.arange(4 * PLACES), places, seed=0)[0].reshape(4, 16, 256)
    assert abs(blocks.mean(2) - 0.25).max() < 5 * math.sqrt(0.25 * 0.75 / 256)
    assert not np.array_equal(blocks[0], blocks[1])
    assert not np.array_equal(blocks[0], sources_and_numbers(np.arange(PLACES), places, seed=1)[0].reshape(16, 256))


def test_part_of_the_order_is_that_part_of_the_whole_anywhere():
    places = [5, 2, 9]
    k = np.arange(1000)
    whole = sources_and_numbers(k, places, seed=2)
    for first, stop in [(0, 1), (13, 20), (15, 17), (500, 777)]:
        part = sources_and_numbers(k[first:stop], places, seed=2)
        assert all(np.array_equal(one, all_[first:stop]) for one, all_ in zip(part, whole))
    far = sources_and_numbers(np.array([10**15]), places, seed=2)
    assert far[1] // places[int(far[0][0])] == 10**15 // 16


def test_a_source_is_read_in_its_own_order_however_short_the_run():
    sources, numbers = sources_and_numbers(np.arange(300), [PLACES // 2, PLACES // 4, PLACES // 4], seed=4)
    for source in range(3):
        assert numbers[sources == source].tolist() == list(range((sources == source).sum()))


def test_a_single_source_keeps_the_order_it_has_alone():
    k = np.arange(100, 300)
    sources, numbers = sources_and_numbers(k, [PLACES], seed=5)
    assert not sources.any()
    assert np.array_equal(numbers, k)


def test_the_order_of_a_mixture_is_the_same_on_every_machine_and_version():
    sources, numbers = sources_and_numbers(np.arange(8), [2, 1, 5], seed=1)
    assert (sources.tolist(), numbers.tolist()) == ([2, 0, 2, 1, 0, 2, 2, 2], [0, 0, 1, 0, 1, 2, 3, 4])


@both
def test_each_row_of_a_source_comes_once_an_epoch(packing):
    sources = mixed()
    one = loader(sources, packing)
    seen = [Counter() for _ in sources]
    for cursor in range(0, 8 * 100, 8):  # a step is a block of 8
        step = one.samples(cursor)
        assert np.bincount([source for source, _, _ in step]).tolist() == [2, 1, 5]
        for source, epoch, row in step:
            seen[source][epoch, row] += 1
    for number, rows in enumerate(one.rows):
        assert set(seen[number].values()) == {1}
        complete = 100 * sources[number].places // rows.per_epoch
        assert complete >= 1
        assert all((epoch, row) in seen[number] for epoch in range(complete) for row in range(rows.per_epoch))


@both
def test_sources_of_one_size_are_not_read_in_step(packing):
    one = loader(mixed((1, 1), (800, 800)), packing)
    orders = [epochs_and_rows(np.arange(rows.per_epoch), rows.per_epoch, rows.seed)[1].tolist() for rows in one.rows]
    assert orders[0] != orders[1]


@both
def test_a_mixture_of_one_source_is_read_like_the_source_alone(packing):
    (source,) = mixed((PLACES,), (700,))
    alone, as_mixture = loader(source.prepared.train, packing), loader([source], packing)
    for cursor in range(0, 400, 8):
        assert rows_of(alone.batches(cursor)) == rows_of(as_mixture.batches(cursor))


@both
def test_steps_micro_batches_and_ranks_do_not_change_the_samples_of_a_mixture(packing):
    sources = mixed()
    single = loader(sources, packing, samples_per_step=1)
    stream = [row for k in range(240) for row in rows_of(single.batches(k))]
    for samples_per_step, size, ranks in [(8, 8, 1), (5, 2, 3), (24, 1, 2), (3, 8, 4)]:
        dealt = [
            loader(sources, packing, samples_per_step=samples_per_step, micro_batch_size=size, dp_rank=r, dp_size=ranks)
            for r in range(ranks)
        ]
        for cursor in range(0, 240, samples_per_step):
            found = [row for rank in dealt for row in rows_of(rank.batches(cursor))]
            assert Counter(found) == Counter(stream[cursor : cursor + samples_per_step])


def test_another_seed_mixes_the_sources_in_another_order():
    first, second = ([source for source, _, _ in loader(mixed(), seed=seed).samples(80)] for seed in (1, 2))
    assert sorted(first) == sorted(second)
    assert first != second


def test_an_epoch_of_a_mixture_has_the_rows_of_all_sources():
    assert loader(mixed()).samples_per_epoch == sum(-(-n // 16) for n in (700, 500, 900))


@both
def test_a_sample_says_its_source_and_the_documents_it_reads(packing):
    one = loader(mixed(), packing)
    for cursor in (0, 64, 1000):
        rows = [row for batch in one.batches(cursor) for row in batch.tokens.tolist()]
        for row, sample in zip(rows, one.documents(cursor), strict=True):
            assert {token // FAR for token in row if token or not packing} <= {sample.source}
            column, _, text, start, _ = sample.excerpts[0]
            assert text.startswith(f"{sample.source * FAR}.txt:")
            assert row[column] % 20 == start
            assert one.rows[sample.source].name == f"s{sample.source}"


def test_inspect_names_the_source_of_a_sample_and_shows_its_text():
    class Numbers:
        def decode(self, ids, skip_special=True):
            return " ".join(map(str, ids))

    one = loader(mixed(), packing=True)
    lines = list(inspect_lines(one, 0, Numbers(), width=200))
    for sample in one.documents(0):
        at = lines.index(f"sample {sample.k}: source s{sample.source}, epoch 0, row {sample.row}, 16 tokens")
        first = int(lines[at + 1].split()[4])
        assert first // FAR == sample.source


def test_a_source_smaller_than_a_row_is_named():
    with pytest.raises(ValueError, match=r"source s1: the training text has 10 tokens, fewer than one row"):
        loader([*mixed()[:1], Source("s1", 1, Prepared(CountingStore([10]), None, {}, Path()))])


def test_a_source_that_is_read_too_often_is_named(caplog):
    caplog.set_level(logging.INFO, "minillm")
    sources = mixed((2048, 2048), (700, 70_000))
    one = loader(sources)
    say_use(sources, one.rows, samples=1000)
    (usual,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert f"source s0 is read {500 / 44:.1f} times: text repeated more than 4 times" in usual.getMessage()
    assert "source s1: 50% of the samples, 70,000 tokens to train on, read 0.114 times" in caplog.text


# --- the configuration ------------------------------------------------------------------------------------------------


def section(**values):
    return build(DataConfig, [Layer("test", values)])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weights": "1,0"}, "weights: 0 is no weight; each must be more than 0"),
        ({"weights": "1,-2"}, "weights: -2 is no weight"),
        ({"weights": "1,nan"}, "weights is '1,nan'; a list of numbers or none is expected"),
        ({"weights": "1,2,3"}, "weights: 3 given, but the sources are a, b; give one for each"),
        ({"weights": "1,2", "sources": "en,en"}, "weights: 2 given, but the sources are en; give one"),
        ({"sources": "en"}, "sources: 1 given, but data.path has 2 entries"),
        ({"sources": ["en", " "]}, "sources: a name is empty"),
        ({"temperature": "0"}, "temperature is 0.0; it must be > 0"),
        ({"temperature": "-1"}, "temperature is -1.0; it must be > 0"),
        ({"temperature": "nan"}, "temperature is 'nan'; a number or none is expected"),
        ({"temperature": "2", "weights": "1,2"}, "temperature: is given beside weights"),
        ({"weights": "1,2", "val": "held.txt"}, "val: 'held.txt' is one text for several sources"),
        ({"weights": "1", "path": None}, "path: sources, weights and temperature mix its entries"),
    ],
)
def test_a_mixture_that_cannot_be_is_one_line_that_names_the_field(values, message):
    with pytest.raises(ValueError, match=f"^(test: )?{message}") as caught:
        section(**({"path": "a.txt,b.txt"} | values))
    assert "\n" not in str(caught.value)


def test_entries_of_one_name_are_one_source_in_order_of_appearance():
    config = section(path="a.txt,b.txt,c.txt", sources="en,zh,en", temperature=3)
    found = config.by_source()
    assert {name: one.path for name, one in found.items()} == {"en": ["a.txt", "c.txt"], "zh": ["b.txt"]}
    assert list(found) == ["en", "zh"]
    assert not any(one.mixed for one in found.values())


def test_without_the_fields_of_a_mixture_nothing_is_mixed():
    config = section(path="a.txt,b.txt")
    assert config.by_source() == {"": config}


def test_sources_are_named_after_their_paths():
    paths = ["x/wiki.jsonl.gz", "c4/", "books/*.txt", "zh/part-*.jsonl", "en/part-*.jsonl", ".."]
    assert unique(map(stem, paths)) == ["wiki", "c4", "books", "part", "part-2", "text"]
    assert unique(["a", "a-2", "a"]) == ["a", "a-2", "a-3"]
    assert unique(["a"] * 50_000)[-1] == "a-50000"  # where names are compared with all before, this would not end


def test_sources_that_cannot_be_mixed_are_refused_before_any_is_prepared(workplace):
    for paths, message in (
        (["red.jsonl", "./red.jsonl"], "red.jsonl is in source red and in source red-2"),
        (["red.jsonl", "nowhere.txt"], "source nowhere: data.path: nowhere.txt: no such file"),
        (["red.jsonl"] * 4097, "4097 sources; a mixture has at most 4096"),
    ):
        with pytest.raises(ValueError, match=message):
            open_sources(DataConfig(path=paths, temperature=1.0, cache_dir="cache"), ByteTokenizer())
    assert not Path("cache").exists()


def test_a_share_that_is_less_than_one_place_is_said_to_be_more(workplace, caplog):
    config = DataConfig(path=["red.jsonl", "blue.txt"], weights=[1e-9, 1], cache_dir="cache")
    assert [source.places for source in open_sources(config, ByteTokenizer())] == [1, PLACES - 1]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning == "source red: 0.0244% of the samples is the least, not 1e-07%"


# --- from text to a run -----------------------------------------------------------------------------------------------

SMALL = """
[run]
dir = "run"
[tokenizer]
kind = "byte"
[data]
path = ["red.jsonl", "blue.txt"]
weights = [3, 1]
val = 0.1
seq_len = 32
document = "line"
[model]
dim = 16
n_layers = 1
n_heads = 2
max_seq_len = 64
dropout = 0.1
[train]
max_steps = 12
batch_tokens = 256
micro_batch_size = 8
save_every = 5
eval_every = 6
[log]
every = 1
samples = 2
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch, known_peak):
    """A directory with two sources that have no word in common, and a small config that mixes them."""
    monkeypatch.chdir(tmp_path)
    words = random.Random(0)
    red = [" ".join(words.choices("red rose rust ruby".split(), k=9)) for _ in range(200)]
    blue = [" ".join(words.choices("sky sea ice jay".split(), k=9)) for _ in range(100)]
    (tmp_path / "red.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in red))
    (tmp_path / "blue.txt").write_text("\n".join(blue))
    (tmp_path / "small.toml").write_text(SMALL)
    return tmp_path


def run(*words):
    return run_command(train.main, ["small.toml", *map(str, words)])


def weights(directory):
    manifest = checkpoint.read(checkpoint.latest(Path(directory) / "checkpoints"))[1]
    return {name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(".safetensors")}


def test_a_run_reads_its_sources_by_weight_and_inspect_names_them(workplace, capsys):
    assert run("--train.batch_tokens", 32 * 150, "--train.max_steps", 2) == 0
    assert "source red: 75% of the samples" in capsys.readouterr().err
    assert run_command(cli.dispatch, ["data", "inspect", "run", "--step", "2", "--rows", "999"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = Counter(line.split("source ")[1].split(",")[0] for line in lines if line.startswith("sample "))
    assert found.total() == 150
    assert abs(found["red"] - 112.5) < 5 * math.sqrt(150 * 0.75 * 0.25)
    source = None
    for line in lines:
        if line.startswith("sample "):
            source = line.split("source ")[1].split(",")[0]
        else:
            assert ("red.jsonl:" in line) == (source == "red")
            assert ("blue.txt:" in line) == (source == "blue")


def test_each_source_is_evaluated_and_the_loss_is_that_of_the_mixture(workplace, capsys):
    assert run() == 0
    shown = capsys.readouterr().out
    config = json.loads(Path("run/config.json").read_text())
    assert config["data"]["sources"] == ["red", "blue"]
    tokenizer = ByteTokenizer()
    sections = [DataConfig(path=path, val="0.1", document="line") for path in ("red.jsonl", "blue.txt")]
    stores = [prepare(section, tokenizer).val for section in sections]
    bytes_per_token = [store.n_bytes / (store.n_tokens - store.n_documents) for store in stores]
    evaluated = [row for row in losses("run") if "val_loss" in row]
    assert [row["step"] for row in evaluated] == [6, 12]
    for row in evaluated:
        each = [row["val_loss/red"], row["val_loss/blue"]]
        assert row["val_loss"] == pytest.approx(0.75 * each[0] + 0.25 * each[1])
        mean_bytes = 0.75 * bytes_per_token[0] + 0.25 * bytes_per_token[1]
        assert row["val_bpb"] == pytest.approx(row["val_loss"] / math.log(2) / mean_bytes)
        for loss, n_bytes, name in zip(each, bytes_per_token, ("red", "blue")):
            assert row[f"val_bpb/{name}"] == pytest.approx(loss / math.log(2) / n_bytes)
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["val_loss/red"] == evaluated[-1]["val_loss/red"]
    for name in ("red", "blue"):
        assert f"source {name}: val loss {summary[f'val_loss/{name}']:.4f}" in shown
        assert f"\n  {name}: " in shown  # a sample of each


def test_an_evaluation_can_be_interrupted_in_any_source(workplace):
    config = build(train.Config, [file_layer("small.toml")])
    tokenizer = ByteTokenizer()
    sources = open_sources(config.data, tokenizer)
    model = Transformer(config.model.to_config(vocab_size=tokenizer.vocab_size))
    evaluate = make_evaluation(model, NextToken(), tokenizer, sources, config, Context(torch.device("cpu")))
    asked = []
    assert "val_loss/blue" in evaluate(lambda: asked.append(True))
    n_batches, asked = len(asked), []

    def stop_before_the_last_batch():
        asked.append(True)
        if len(asked) == n_batches:
            raise Stopped

    with pytest.raises(Stopped):
        evaluate(stop_before_the_last_batch)
    assert model.training


def test_a_run_on_one_of_the_sources_uses_the_tokens_that_the_mixture_prepared(workplace):
    assert run() == 0
    before = {path.name for path in Path(".cache/minillm").iterdir() if path.is_dir()}
    assert run("--data.path", "red.jsonl", "--data.weights", "none", "--run.dir", "alone", "--train.max_steps", 1) == 0
    assert {path.name for path in Path(".cache/minillm").iterdir() if path.is_dir()} == before


def test_without_the_fields_several_paths_are_one_corpus(workplace):
    assert run("--data.weights", "none") == 0
    assert not any(key.startswith("val_loss/") for row in losses("run") for key in row)
    assert json.loads(Path("run/config.json").read_text())["data"]["sources"] is None


def test_a_named_single_source_trains_like_the_text_alone(workplace):
    one = ["--data.path", "red.jsonl", "--data.weights", "none"]
    assert run(*one) == run(*one, "--data.sources", "red", "--run.dir", "named") == 0
    assert weights("run") == weights("named")
    assert losses("run")[-1]["val_loss"] == losses("named")[-1]["val_loss/red"] == losses("named")[-1]["val_loss"]


def test_a_mixture_resumed_is_bitwise_the_uninterrupted_one(workplace):
    constant = ["--optim.schedule", "constant", "--optim.warmup_steps", 0]
    assert run(*constant, "--run.dir", "whole") == 0
    assert run(*constant, "--train.max_steps", 6) == 0
    assert run_command(train.main, ["--run.dir", "run", "--run.resume", "auto", "--train.max_steps", "12"]) == 0
    assert losses("run") == losses("whole")
    assert weights("run") == weights("whole")


def test_a_mixture_is_resumed_after_its_text_has_moved(workplace):
    assert run() == 0
    Path("red.jsonl").rename("moved.jsonl")
    words = ["--data.path", "moved.jsonl,blue.txt", "--run.resume", "auto", "--train.max_steps", "13"]
    assert run_command(train.main, ["--run.dir", "run", *words]) == 0


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        (["--data.weights", "1,1"], "in its own order, is red 2048, blue 2048 of 4096 samples"),
        (["--data.weights", "none", "--data.sources", "none"], "data.mixture was red 3072, blue 1024 of 4096 samples"),
        (["--data.path", "red.jsonl,red2.jsonl", "--data.sources", "red,blue"], "data_hash was"),
    ],
)
def test_resuming_with_another_mixture_is_refused(workplace, capsys, words, difference):
    assert run() == 0
    Path("red2.jsonl").write_text('{"text": "a rose"}\n' * 99)
    before = weights("run"), losses("run")
    message = failure(capsys, run, "--run.resume", "auto", "--train.max_steps", 20, *words)
    assert "another run than the one to be continued" in message
    assert difference in message
    assert (weights("run"), losses("run")) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.weights", "1,0"], "data.weights: 0 is no weight"),
        (["--data.path", "red.jsonl,empty.txt"], "source empty: data.path: no text in empty.txt"),
        (["--data.path", "red.jsonl,nowhere.txt"], "nowhere.txt: no such file"),
        (["--data.path", "red.jsonl,short.txt", "--data.val", "0"], "source short: the training text has 3 tokens"),
        (["--data.path", "red.jsonl,./red.jsonl"], "data.path: red.jsonl is in source red and in source red-2"),
    ],
)
def test_a_mistake_in_a_source_is_one_line_and_nothing_is_written(workplace, capsys, words, message):
    Path("empty.txt").write_text("")
    Path("short.txt").write_text("ab")
    assert message in failure(capsys, run, *words)
    assert not Path("run/config.json").exists()
    assert not Path("run/checkpoints").exists()


def test_a_prepared_folder_is_a_source_and_its_tokenizer_reads_the_others(workplace, capsys):
    words = ["data", "prepare", "--data.path", "red.jsonl", "--tokenizer.vocab_size", "300"]
    assert run_command(cli.dispatch, words) == 0
    folder = capsys.readouterr().out.splitlines()[0]
    assert run("--data.path", f"{folder},blue.txt", "--data.sources", "red,blue", "--tokenizer.kind", "bpe") == 0
    assert json.loads(Path("run/tokenizer.json").read_text()) == json.loads(Path(folder, "tokenizer.json").read_text())


def test_prepare_makes_each_source_and_says_its_share(workplace, capsys):
    words = ["data", "prepare", "--data.path", "red.jsonl,blue.txt", "--data.temperature", "2"]
    assert run_command(cli.dispatch, [*words, "--tokenizer.kind", "byte", "--data.document", "line"]) == 0
    shown = capsys.readouterr().out
    sources = open_sources(DataConfig(path=["red.jsonl", "blue.txt"], temperature=2, document="line"), ByteTokenizer())
    sizes = [source.prepared.train.n_tokens for source in sources]
    root = [math.sqrt(size) for size in sizes]
    assert [source.share for source in sources] == pytest.approx([one / sum(root) for one in root], abs=1 / PLACES)
    for source in sources:
        assert (
            f"source {source.name}, {100 * source.share:.3g}% of the samples:\n{source.prepared.directory}\n" in shown
        )


def test_the_figures_of_a_mixture_are_of_the_sources_that_hold_something_out():
    parts = [("a", 0.3, {"val_loss": 2.0, "val_bpb": 1.0, "bytes": 30, "tokens": 10})]
    assert mixture(parts)["val_loss"] == pytest.approx(2.0)
    assert mixture(parts)["val_bpb"] == pytest.approx(2.0 / math.log(2) / 3)


def test_what_one_source_has_no_figure_of_is_the_mean_of_the_others():
    known = [{"val_loss": 2.0}, {"val_loss": 4.0, "val_margin": 1.0}, {"val_loss": 4.0, "val_margin": 3.0}]
    found = mixture(list(zip("abc", (0.4, 0.2, 0.4), known)))
    assert (found["val_loss"], found["val_margin"]) == pytest.approx((3.2, 7 / 3))


def test_help_lists_the_fields_of_a_mixture(capsys):
    assert run_command(train.main, ["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("--data.sources", "--data.weights", "--data.temperature"))
