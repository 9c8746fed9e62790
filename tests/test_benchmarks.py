"""The benchmarks compare like with like; shapes and figures here are too small to say anything about speed."""

import importlib.util
import json
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks

import minillm
from minillm.data.config import DataConfig
from minillm.data.text import documents, find_files
from minillm.distributed.context import connect
from minillm.model.transformer import Transformer
from minillm.tokenizer import ByteTokenizer

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
CPU = torch.device("cpu")
# litgpt needs an environment of its own, so that it is no peer in the usual one
PEERS = ["transformers", "litgpt"] if importlib.util.find_spec("litgpt") else ["transformers"]


@contextmanager
def benchmarks_found():
    """Inside, a benchmark can be imported by its name, also by a process that it starts."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def train_step():
    with benchmarks_found():
        import train_step

        yield train_step


def rows(printed: str) -> list[list[str]]:
    """The cells of the table's rows."""
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny"])
@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_trains_the_same_shape_on_the_same_targets(train_step, name, peer):
    pytest.importorskip(peer, reason=f"{peer} is not installed")
    shape = train_step.SHAPES[name]
    torch.manual_seed(0)
    ours, theirs = (train_step.CONTENDERS[library](shape, CPU, False) for library in ("minillm", peer))
    no_positions = shape.T * shape.model.dim if (name, peer) == ("gpt2-tiny", "litgpt") else 0
    assert theirs.parameters == ours.parameters - no_positions

    batch = train_step.random_batch(shape, 0, CPU)
    batch = batch._replace(targets=torch.full_like(batch.targets, 7))  # learned only by who is given the targets
    for contender in (ours, theirs):
        losses = [contender.step(batch) for _ in range(20)]
        train_step.check_loss(contender, losses[0], shape)
        assert losses[-1] < losses[0] - 0.4


def test_ratios_are_medians_over_rounds_of_times_within_a_round(train_step, monkeypatch, capsys):
    seconds = iter([1, 2, 2, 2, 4, 16])  # minillm and its peer, three rounds
    monkeypatch.setattr(train_step, "timed", lambda *_: train_step.Seconds(s := next(seconds), s / 2))
    peer = {"math": lambda *arguments: train_step.minillm_step(*arguments)._replace(name="math")}
    monkeypatch.setattr(train_step, "CONTENDERS", {"minillm": train_step.minillm_step} | peer)
    train_step.main(["--shapes", "llama-tiny", "--threads", "1", "--rounds", "3", "--warmup", "1"])
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    tokens = 2 * 16
    assert [row[2:] for row in rows(printed)] == [
        ["minillm", "73,248", f"{tokens / 2:,.0f}", "1.00", "1.00"],
        ["math", "73,248", f"{tokens / 2:,.0f}", "2.00", "2.00"],
    ]


def test_a_peer_that_is_missing_is_named_and_left_out(train_step, capsys):
    assert train_step.importable(["minillm", "no_such_library"]) == ["minillm"]
    assert "no_such_library is left out" in capsys.readouterr().out


def test_memory_is_what_steps_add_to_what_was_there(train_step, monkeypatch, capsys):
    monkeypatch.setattr(train_step, "memory_now", lambda device: 500_000_000)
    monkeypatch.setattr(train_step, "peak_memory", lambda device: 700_000_000)
    monkeypatch.setattr(train_step, "in_fresh_process", lambda function: function())
    monkeypatch.setattr(train_step, "importable", lambda names: ["minillm"])
    train_step.main(["--memory", "--shapes", "llama-tiny", "--threads", "1"])
    assert rows(capsys.readouterr().out) == [["llama-tiny", "minillm", "73,248", "0", "1", "199", "200", "1.00"]]


def test_memory_is_what_a_call_adds_at_its_peak(train_step):
    memory_during = sys.modules["beside"].memory_during
    assert 190e6 < memory_during(lambda: np.ones(200_000_000, np.uint8)) < 220e6
    assert memory_during(lambda: None) < 10e6


def test_a_loss_that_is_not_that_of_random_tokens_is_noticed(train_step):
    shape = train_step.SHAPES["llama-tiny"]
    contender = train_step.Contender("broken", 0, lambda batch: 0.0)
    with pytest.raises(AssertionError, match="broken: the loss is 0"):
        train_step.check_loss(contender, 0.0, shape)


# --- ablations --------------------------------------------------------------------------------------------------------

TINY = """
[tokenizer]
kind = "byte"
[data]
path = "text.txt"
document = "line"
val = 0.2
seq_len = 16
[model]
dim = 16
n_layers = 1
n_heads = 2
max_seq_len = 16
[optim]
lr = 1e-2
[train]
max_steps = 3
batch_tokens = 32
"""


@pytest.fixture
def ablate():
    spec = importlib.util.spec_from_file_location("ablate", BENCHMARKS / "ablate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ablation(tmp_path, monkeypatch):
    """An ablation of two learning rates and one that cannot work, over a base that trains in a moment."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the cat sat on the mat\n" * 40)
    (tmp_path / "tiny.toml").write_text(TINY)
    path = tmp_path / "rates.toml"
    path.write_text('base = "tiny.toml"\n[[vary]]\n"optim.lr" = [1e-9, 1e-2]\n"train.max_steps" = 3\n')
    return path


def test_each_variant_is_trained_once_and_stands_in_the_table(ablate, ablation, tmp_path, capsys, monkeypatch):
    assert ablate.main([str(ablation), "--runs", "runs"]) == 0
    table = (tmp_path / "runs" / "rates.md").read_text()
    assert table in capsys.readouterr().out
    (low, *_, worse), (high, *_, better) = rows(table)
    assert (low, high) == ("1e-09", "0.01")
    assert float(better.strip("*")) < float(worse)
    assert better == f"**{better.strip('*')}**"
    ran = []
    monkeypatch.setattr(ablate.subprocess, "run", lambda *arguments, **options: ran.append(arguments))
    assert ablate.main([str(ablation), "--runs", "runs"]) == 0
    assert not ran
    assert (tmp_path / "runs" / "rates.md").read_text() == table
    (tmp_path / "tiny.toml").write_text(TINY.replace("dim = 16", "dim = 32"))
    before, after = (ablate.run_directory(tmp_path, ablate.read_ablation(ablation), {}, seed) for seed in (0, 1))
    assert before != after
    assert not (tmp_path / "runs" / "rates" / before.name).exists()  # of another base nothing is finished


@pytest.mark.soak
def test_a_variant_that_fails_is_named_and_the_others_go_on(ablate, ablation, tmp_path, capsys):
    ablation.write_text('base = "tiny.toml"\n[[vary]]\n"model.n_heads" = [3, 2]\n')
    assert ablate.main([str(ablation), "--runs", "runs"]) == 1
    assert "n_heads: 3 does not divide dim 16" in capsys.readouterr().out
    assert [row[-1] == "did not finish" for row in rows((tmp_path / "runs" / "rates.md").read_text())] == [True, False]


def test_an_ablation_that_is_none_is_refused_before_the_first_run(ablate, ablation, tmp_path, capsys):
    wrong = tmp_path / "wrong.toml"
    for text, problem in [
        ('base = "tiny.toml"\n', "nothing varies"),
        ('base = "nowhere.toml"\n[[vary]]\n"optim.lr" = 1\n', "nowhere.toml is no file"),
        ('base = "tiny.toml"\n[optim]\nlr = 1\n', "optim is not known here"),
    ]:
        wrong.write_text(text)
        with pytest.raises(SystemExit):
            ablate.main([str(ablation), str(wrong), "--runs", "runs"])
        assert problem in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_best_of_each_group_follows_a_grid(ablate):
    results = [
        ablate.Result({"optim.name": name, "optim.lr": lr}, loss, 0.0, 1, 1.0)
        for name, lr, loss in [("adamw", 1, 2.0), ("adamw", 2, 1.0), ("sgd", 1, 3.0), ("sgd", 2, None)]
    ]
    table = ablate.make_table(results, [0])
    best = table.partition("The best of each optim.name:")[2]
    assert [row[:2] for row in rows(best)] == [["adamw", "2"], ["sgd", "1"]]


# --- fine-tuning ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def beside_trl():
    with benchmarks_found():
        import beside_trl

        yield beside_trl


@pytest.fixture(scope="module")
def sft(beside_trl):
    return script("sft")


@pytest.fixture(scope="module")
def dpo(beside_trl):
    return script("dpo")


needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.json"
    rows = [{"instruction": f"Say {i}.", "output": f"{i} and " * (20 + 9 * (i % 5))} for i in range(12)]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def preferences(tmp_path):
    path = tmp_path / "pairs.json"
    rows = [
        {"prompt": f"Say {i}.", "chosen": f"{i} and " * (20 + 9 * (i % 5)), "rejected": f"no {i} " * (15 + 7 * (i % 4))}
        for i in range(8)
    ]
    path.write_text(json.dumps(rows))
    return path


def test_without_trl_minillm_is_timed_alone(beside_trl, sft, dpo, chats, preferences, capsys, monkeypatch):
    monkeypatch.setattr(beside_trl, "importable", lambda names: [])
    for recipe, path in ((sft, chats), (dpo, preferences)):
        recipe.main([str(path), "--shape", "llama-tiny", "--examples", "8", "--rounds", "1", "--row", "512"])
        [row] = rows(capsys.readouterr().out)
        assert row[:2] == [path.stem, "minillm"]
        assert row[4:] == ["1.00", "1.00"]


def test_trl_is_given_the_tokens_that_minillm_learns(beside_trl, sft, dpo, chats, preferences, tmp_path):
    start, tokenizer = beside_trl.make_start("llama-tiny", ByteTokenizer(), tmp_path), ByteTokenizer()
    with sft.ours(start, beside_trl.make_lesson(chats, 3, 4, tmp_path, row=1024)) as ours:
        found = sft.documents(ours.store)
    assert tokenizer.decode(found["input_ids"][0]).startswith("user\nSay 3.\nassistant\n3 and ")
    learned = [token for token in found["labels"][0] if token >= 0]
    assert tokenizer.decode(learned).startswith("3 and ")
    with dpo.ours(start, beside_trl.make_lesson(preferences, 0, 8, tmp_path, row=1024)) as ours:
        found = {name: tokenizer.decode(column[3]) for name, column in dpo.pairs(ours.store).items()}
    assert found["prompt_ids"] == "user\nSay 3.\nassistant\n"
    assert found["chosen_ids"].startswith("3 and ")
    assert found["rejected_ids"].startswith("no 3 ")


@needs_trl
@pytest.mark.soak  # to import it takes 10 seconds
def test_fine_tuning_is_timed_beside_trl_on_the_same_conversations(sft, chats, capsys):
    given = ["--shape", "llama-tiny", "--examples", "6", "--rounds", "1", "--threads", "1", "--peers", "TRL"]
    sft.main([str(chats), *given])
    table = rows(capsys.readouterr().out)
    assert [row[1] for row in table] == ["minillm", "TRL"]
    assert all(float(cell.replace(",", "")) > 0 for row in table for cell in row[2:])


@needs_trl
@pytest.mark.soak  # to import it takes 10 seconds
def test_preferences_are_learned_beside_trl_from_the_same_pairs(dpo, preferences, capsys):
    peer = "TRL, reference before"
    given = ["--shape", "llama-tiny", "--examples", "8", "--rounds", "1", "--row", "512", "--peers", peer]
    dpo.main([str(preferences), *given])
    table = rows(capsys.readouterr().out)
    assert [row[1] for row in table] == ["minillm", peer]
    assert all(float(cell.replace(",", "")) > 0 for row in table for cell in row[2:])


@needs_trl
@pytest.mark.soak  # to import it takes 10 seconds
def test_memory_of_learning_preferences_is_that_of_each(dpo, preferences, capsys, monkeypatch):
    monkeypatch.setattr(dpo, "in_fresh_process", lambda function, *arguments: function(*arguments))
    given = ["--memory", "--shape", "llama-tiny", "--examples", "8", "--threads", "1", "--peers", "TRL"]
    dpo.main([str(preferences), *given])
    assert [row[:2] for row in rows(capsys.readouterr().out)] == [["pairs", "minillm"], ["pairs", "TRL"]]


@needs_trl
@pytest.mark.soak  # to import it takes 10 seconds
def test_a_peer_that_learns_from_other_weights_or_tokens_is_noticed(beside_trl, sft, chats, tmp_path):
    start = beside_trl.make_start("llama-tiny", ByteTokenizer(), tmp_path)
    lesson = beside_trl.make_lesson(chats, 0, 6, tmp_path, row=1024)
    sft.check_losses(start, lesson, ["TRL, packed"])
    other = beside_trl.make_start("llama-tiny", ByteTokenizer(), tmp_path / "other", seed=1)
    with pytest.raises(AssertionError, match="TRL: the first loss is"):
        sft.check_losses(start._replace(theirs=other.theirs), lesson, ["TRL"])
    with pytest.raises(ValueError, match="13 examples are asked for, it has 12"):
        beside_trl.make_lesson(chats, 6, 7, tmp_path, row=1024)


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decode():
    with benchmarks_found():
        import decode

        yield decode


@pytest.mark.parametrize("way", ["all at once", "in sorted eights"])
def test_both_are_asked_for_the_same_tokens(decode, way):
    pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    model = Transformer(decode.SHAPES["llama-tiny"]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs = decode.as_transformers(model).eval().double()
    model = model.double()
    requests = decode.make_requests("mixed", 96, scale=16)[:12]
    assert {len(request.prompt) for request in requests} != {len(requests[0].prompt)}
    made = {}
    for batch in decode.STATIC[way](requests):
        made |= {tuple(request.prompt): tokens for request, tokens in zip(batch, decode.theirs(theirs, batch))}
    assert decode.ours(model, requests) == [made[tuple(request.prompt)] for request in requests]


@pytest.mark.parametrize("case", ["mixed", "even"])
def test_lengths_of_requests_differ_ten_to_one(decode, case):
    requests = decode.make_requests(case, 96)
    for lengths in ([len(request.prompt) for request in requests], [request.new for request in requests]):
        assert (len(lengths), min(lengths), max(lengths)) == (64, 16, 160)


def test_times_of_generation_are_compared_within_a_round(decode, monkeypatch, capsys):
    seconds = iter([1, 2, 2, 6, 4, 8])  # minillm and transformers, three rounds
    monkeypatch.setattr(decode, "timed", lambda *_: decode.Seconds(s := next(seconds), s / 2))
    monkeypatch.setattr(decode, "as_transformers", lambda model: model)
    decode.main(["--shape", "llama-tiny", "--cases", "8", "--rounds", "3", "--warmup", "0", "--threads", "1"])
    assert [row[2:] for row in rows(capsys.readouterr().out)] == [
        ["minillm", "512", "1.00", "1.00"],
        ["transformers, all at once", "171", "2.00", "2.00"],
    ]


def test_sizes_are_measured_from_end_to_end(decode, capsys, monkeypatch):
    monkeypatch.setattr(decode, "copy_rate", lambda device, seconds: 1e9)
    decode.main(["--sizes", "tiny", "--batch", "1", "3", "--prompt", "8", "--steps", "2", "--threads", "1"])
    table = rows(capsys.readouterr().out)
    assert [row[:2] for row in table] == [["tiny", "1"], ["tiny", "3"]]
    assert all(float(row[2]) > 0 and float(row[3].replace(",", "")) > 0 for row in table)


def test_a_step_reads_weights_once_and_the_keys_of_every_row(decode):
    config = decode.SHAPES["llama-tiny"]
    model = Transformer(config)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert decode.bytes_a_step(model, 3, 10) == weights + 4 * 2 * 2 * 3 * 10 * 2 * 4  # 2 blocks, 2 heads of width 4


# --- a GPU ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu", BENCHMARKS / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "in_fresh_process", lambda function: function())
    return module


def test_every_setting_is_measured_from_end_to_end(gpu, capsys):
    """But for compiling, which takes a minute: every change that the tiny model has."""
    gpu.main(["--tiny", "--device", "cpu", "--steps", "1", "--warmup", "1", "--changes", "all"])
    printed = capsys.readouterr().out
    table = rows(printed.partition("\naimed at")[0])
    assert [line[1] for line in table] == [
        "",
        "half the micro-batch",
        "twice the micro-batch",
        "selective checkpointing",
        "full checkpointing",
        "vocabulary padded to 128",
        "optimizer not fused",
        "packed documents",
    ]
    assert [line[2] for line in table] == ["4", "2", "8", *["4"] * 5]
    assert all(float(line[3]) > 0 and float(line[5].rstrip("%")) > 0 for line in table)
    assert "7B on one H200" in printed


def test_the_share_of_the_peak_is_that_of_the_plan(gpu):
    setting = gpu.TINY["tiny"]
    found = gpu.Measured(seconds=0.5, peak_bytes=2**30, loss=4.6)
    line = gpu.row("tiny", "", setting, found, peak=1e9, base=found)
    flops = 256 / 0.5 * (6 * gpu_matmul_parameters() + 12 * 2 * 32 * 32)
    assert [cell.strip() for cell in line.split("|")[4:-1]] == ["500", "512", f"{flops / 1e9:.1%}", "1.0", "1.00"]
    assert "out of memory" in gpu.row("tiny", "", setting, None, peak=1e9, base=found)


def gpu_matmul_parameters() -> int:
    """Of 2 layers of width 32, MLP 128, and a head of 97 tokens."""
    return 2 * (4 * 32 * 32 + 2 * 32 * 128) + 97 * 32


def test_running_out_of_memory_is_a_row_of_the_table(gpu, monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError("of 141 GB")

    monkeypatch.setattr(gpu, "make_trainer", too_large)
    assert gpu.measure(gpu.TINY["tiny"], "cpu", steps=1, warmup=0) is None


def test_an_optimizer_that_is_not_fused_takes_the_other_kernel(gpu):
    for fused in (True, False):
        trainer = gpu.make_trainer(gpu.TINY["tiny"]._replace(fused=fused), CPU, steps=1)
        trainer.step()
        trainer.loader.close()
        assert {group["fused"] for group in trainer.optimizer.param_groups} == {fused}


def test_duplicates_are_planted_at_the_similarity_that_is_counted():
    pytest.importorskip("datasketch", reason="datasketch is not installed")
    with benchmarks_found():
        import dedup
    rng = np.random.default_rng(0)
    documents = dedup.generate(300, 100, rng)
    texts = dedup.spell(documents, rng)
    sets = [dedup.shingles_of(text) for text in texts]
    pairs, similarity = dedup.exact_similarities(documents)
    expected = {
        i * len(texts) + j: len(sets[i] & sets[j]) / len(sets[i] | sets[j])
        for j in range(len(texts))
        for i in range(j)
        if sets[i] & sets[j]
    }
    assert dict(zip(pairs.tolist(), similarity.tolist())) == expected
    planted = similarity[(pairs % len(texts) >= 200) & (similarity > 0.4)]
    assert len(planted) == 100
    assert np.allclose(np.histogram(planted, 5, (0.5, 1.0))[0], 20, atol=10)
    # both find the pairs above the threshold, and nothing far below it
    ours = dedup.pairs_of_groups(dedup.ours(texts, 0.8, 14, 9))
    theirs = dedup.pairs_of_candidates(dedup.theirs(texts, 14, 9)[1])
    for found in (ours, theirs):
        assert np.isin(pairs[similarity > 0.9], found).all()
        assert not np.isin(pairs[similarity < 0.5], found).any()


@pytest.fixture(scope="module")
def large_corpus():
    with benchmarks_found():
        import large_corpus

        yield large_corpus


def test_the_generated_corpus_is_the_same_text_in_every_format(large_corpus, tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow (extra data) is not installed")
    large_corpus.write_corpus(tmp_path / "corpus", 2_000_000)
    files = find_files(tmp_path / "corpus")
    assert [file.name for file in files] == list(large_corpus.SHARES)
    found = [document.text for document in documents(files, DataConfig())]
    expected = large_corpus.generated(seed=0)
    assert found[:100] == [next(expected) for _ in range(100)]
    assert 2_000_000 <= sum(len(text.encode()) for text in found) < 2_400_000
    assert 0.05 < sum(not text.isascii() for text in found) / len(found) < 0.2


ALLOCATE = """
import subprocess, sys, time
held = b"x" * int(sys.argv[1]) * 10**6
if len(sys.argv) > 2:
    subprocess.run([sys.executable, "-c", sys.argv[3], sys.argv[2]])
time.sleep(0.5)
"""


def test_memory_is_that_of_all_processes(large_corpus):
    found = large_corpus.run([sys.executable, "-c", ALLOCATE, "100", "200", ALLOCATE])
    assert 300 < found.peak < 400
    assert 100 < found.parent < 200
    killed = large_corpus.run([sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"], kill_after=1)
    assert killed.said == "1\n"
    assert killed.seconds < 30


# --- several ranks ----------------------------------------------------------------------------------------------------


def sent_and_expected():
    """For each strategy, what is counted over what docs/parallelism.md says."""
    sys.path.insert(0, str(BENCHMARKS))
    import traffic

    found = {}
    with connect("cpu", timeout=60) as dist:
        for setting in traffic.settings(dist.world_size):
            if setting.m == 2 and setting.compress == "none":
                sent, P, R = traffic.counted(dist, setting, dim=64)
                found[*vars(setting.layout).values(), *setting[1:]] = sent.total() / traffic.expected(setting, P, R, 64)
    return found


def test_a_rank_sends_what_the_chapter_says():
    """But for the few numbers beside the gradients, which are more with tensor parallel: those of the norms."""
    found = run_ranks(4, sent_and_expected)[0]
    assert {(strategy, tp) for strategy, _, _, tp, *_ in found} >= {("ddp", 1), ("fsdp", 1), ("hsdp", 1), ("fsdp", 2)}
    for (*_, tp), ratio in [(key[:4], ratio) for key, ratio in found.items()]:
        assert 1 <= ratio < (1.01 if tp == 1 else 1.05)


def scaled():
    sys.path.insert(0, str(BENCHMARKS))
    import scaling

    options = scaling.argparse.Namespace(ways=["apart", "ddp", "fsdp"], rounds=2, warmup=1)
    with connect("cpu", timeout=60) as dist:
        seconds = scaling.measure(scaling.SHAPES["llama-tiny"], dist, options)
    return {way: [tuple(one) for one in found] for way, found in seconds.items()}


def test_ranks_together_are_timed_beside_one_at_the_same_batch():
    """Whose losses are compared, too; the times are those of all ranks."""
    one, other = run_ranks(2, scaled)
    assert list(one) == ["alone", "apart", "ddp", "fsdp"]
    assert one == other
    assert all(len(found) == 2 and min(min(seconds) for seconds in found) > 0 for found in one.values())


def test_how_fast_ranks_are_is_a_median_over_rounds_of_times_within_a_round():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import scaling
    finally:
        sys.path.remove(str(BENCHMARKS))
    alone = [scaling.Seconds(*pair) for pair in [(2, 2), (4, 4), (12, 12)]]
    ddp = [scaling.Seconds(*pair) for pair in [(1, 1), (2.5, 2), (3, 6)]]
    printed = scaling.rows("llama-tiny", 2, {"alone": alone, "ddp": ddp})
    assert [row[1:] for row in rows("\n".join(["| |", "|-|", *printed]))] == [
        ["alone", "1", "8", "1.00", "1.00"],
        ["ddp", "2", "13", "2.00", "2.00"],
    ]


# --- decoding ---------------------------------------------------------------------------------------------------------


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_figures_of_the_book_are_those_that_the_script_draws(tmp_path):
    script("distributions").main(["--out", str(tmp_path)])
    images = BENCHMARKS.parent / "docs" / "images"
    drawn = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert drawn.keys() == {"temperature.svg", "filters.svg", "penalties.svg"}
    for name, picture in drawn.items():
        assert picture == (images / name).read_text(encoding="utf-8"), name


def test_each_parameter_is_timed(capsys):
    script("filters").main(["--vocab_size", "2000", "--rows", "2", "--rounds", "1"])
    assert len(rows(capsys.readouterr().out)) == 8


def test_repetition_is_what_stands_earlier_in_the_text():
    repeated = script("degeneration").repeated
    assert repeated([1, 2, 3, 4, 5, 6], 2, 2) == 0
    assert repeated([1, 2, 3, 1, 2, 3], 3, 2) == 2 / 3  # 31 is new; 12 and 23 are not
    assert repeated([1, 2, 1, 2, 1, 2], 2, 2) == 3 / 4


def test_chosen_answers_become_likelier_with_an_sft_term_than_without(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: extra plot")
    tokenizer = ByteTokenizer()
    shape = {"vocab_size": tokenizer.vocab_size, "dim": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 256}
    minillm.save(Transformer(minillm.ModelConfig(**shape)), tokenizer, tmp_path / "model")
    script("falling").main([str(tmp_path / "model"), "--steps", "3", "--lr", "1e-2", "--out", str(tmp_path)])
    without, little, much = (float(row[1]) for row in rows(capsys.readouterr().out))
    assert without < little < much
    assert (tmp_path / "falling.svg").read_text().count("sft_weight") >= 3


def test_int8_is_timed_beside_fp32(capsys):
    script("quantize").main(["--shapes", "tiny", "--batches", "1", "3", "--tokens", "2", "--rounds", "1"])
    table = rows(capsys.readouterr().out)
    assert [row[3] for row in table] == ["1", "3"]
    assert all(float(row[2]) <= float(row[1]) and float(row[6]) > 0 for row in table)
