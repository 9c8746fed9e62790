"""`data clean`: every document is kept or dropped by one rule, whatever the number of workers and machines."""

import gzip
import json
import random
import re
from pathlib import Path

import pytest

from minillm import cli
from minillm.data import text as text_module
from minillm.data.clean import output
from minillm.data.clean.config import CleanConfig
from minillm.data.clean.minhash import N_PERM
from minillm.data.clean.pipeline import clean, clean_shard, merge
from minillm.data.clean.report import load, table
from minillm.data.config import DataConfig
from minillm.data.text import documents, find_files
from minillm.files import machine
from minillm.log import run_command

SYLLABLES = [consonant + vowel for consonant in "bdfghklmnprstvwz" for vowel in "aeiou"]
QUESTION = "How many eggs do nine hens lay in a week if each lays two eggs every three days?"


def story(seed, n=8):
    """A text that passes every rule, and is like no other."""
    draw = random.Random(seed)
    sentences = [" ".join("".join(draw.choices(SYLLABLES, k=2)) for _ in range(10)) for _ in range(n)]
    return "The hen and the fox. " + " ".join(f"{words.capitalize()}." for words in sentences)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory; text is read in blocks of 4 KiB, so that small files have many."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(text_module, "BLOCK", 2**12)
    return tmp_path


@pytest.fixture
def corpus(place):
    """Two files with a document for each thing that happens."""
    first = [story(i) for i in range(60)]
    first[7] = "too short"
    first[9] = first[3] + " Write to hen@example.com or 415-555-0132."
    first[11] = "   \n "
    first[20] = first[4]
    second = [story(i) for i in range(100, 140)]
    second[2] = first[5]
    second[5] = f"{story(500)} {QUESTION.upper()} {story(501)}"
    second[8] = first[6].replace("The hen", "A hen", 1)
    second[30] = "一只母鸡下了一个蛋。" * 30
    write_rows(Path("in/a.jsonl"), first)
    write_rows(Path("in/b.jsonl"), second)
    write_rows(Path("test.jsonl"), ["a short one", QUESTION], field="question")
    return place


def write_rows(path, texts, field="text"):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))


CONFIG = CleanConfig(against="test.jsonl", against_field="question", keep_dropped=True)


def rows_in(folder, pattern="part-*.jsonl"):
    return [json.loads(line) for path in sorted(Path(folder).glob(pattern)) for line in path.open()]


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_each_document_is_kept_or_dropped_by_one_rule(corpus):
    report = clean(DataConfig(path="in"), CONFIG, "out")
    assert report.documents == 100
    dropped = {rule: (found.documents, found.examples) for rule, found in report.dropped.items()}
    assert dropped == {
        "min_words": (1, ["in/a.jsonl:8 (2)"]),
        "empty": (1, ["in/a.jsonl:12 (0)"]),
        "duplicate": (2, ["in/a.jsonl:21 (in/a.jsonl:5)", "in/b.jsonl:3 (in/a.jsonl:6)"]),
        "near_duplicate": (2, ["in/a.jsonl:10 (in/a.jsonl:4)", "in/b.jsonl:9 (in/a.jsonl:7)"]),
        "contamination": (1, ["in/b.jsonl:6 (test.jsonl:2)"]),
        "max_top_2_gram": (1, ["in/b.jsonl:31 (0.4444)"]),
    }
    assert report.kept == 100 - 8 == len(rows_in("out"))
    read = [len(row["text"].encode()) for row in rows_in("in", "*.jsonl") if row["text"].strip()]
    assert report.n_bytes == sum(read) == report.kept_bytes + sum(d.n_bytes for d in report.dropped.values())
    assert report.written_bytes == sum(len(row["text"].encode()) for row in rows_in("out"))
    assert report.edits == {"email": [1, 1], "phone": [1, 1]}
    assert report.skipped_tests == 1


def test_what_is_written_can_be_read_again_and_reviewed(corpus):
    report = clean(DataConfig(path="in"), CONFIG, "out")
    assert find_files("out") == [Path("out/part-00000.jsonl")]  # neither report nor dropped rows
    assert sum(document.starts for document in documents(find_files("out"), DataConfig())) == report.kept
    sources = {
        f"in/{name}.jsonl:{i}": row["text"] for name in "ab" for i, row in enumerate(rows_in("in", f"{name}.*"), 1)
    }
    assert all(sources[row["source"]] == row["text"] for row in rows_in("out"))
    dropped = rows_in("out", "dropped.jsonl")
    assert len(dropped) == report.documents - report.kept
    assert {row["rule"] for row in dropped} == set(report.dropped)
    assert {row["source"] for row in dropped} | {row["source"] for row in rows_in("out")} == set(sources)
    assert load(Path("out"))[0] == report
    assert table(report) in Path("out/report.md").read_text()
    assert table(report).endswith("\n\n1 test is too short to be looked for.")


def test_secrets_do_not_survive(corpus):
    clean(DataConfig(path="in"), CleanConfig(near=None), "out")
    text = Path("out/part-00000.jsonl").read_text()
    assert "Write to <EMAIL> or <PHONE>." in text
    assert "@" not in text
    clean(DataConfig(path="in"), CleanConfig(near=None, privacy=[]), "raw")
    assert "hen@example.com" in Path("raw/part-00000.jsonl").read_text()


def test_workers_do_not_change_the_result(corpus):
    config = CleanConfig(**{**vars(CONFIG), "rules": ["basic", "gopher", "repetition", "c4"]})
    clean(DataConfig(path="in", workers=1), config, "one")
    clean(DataConfig(path="in", workers=2), config, "two")
    assert contents("one") == contents("two")


def test_rows_are_cut_into_parts_and_packed(corpus, monkeypatch):
    clean(DataConfig(path="in"), CONFIG, "one")
    monkeypatch.setattr(output, "PART", 10_000)
    clean(DataConfig(path="in"), CONFIG, "out")
    clean(DataConfig(path="in"), CleanConfig(**{**vars(CONFIG), "compress": True}), "packed")
    parts = sorted(Path("out").glob("part-*"))
    assert len(parts) == 5
    assert all(part.stat().st_size <= 10_000 for part in parts)
    assert b"".join(part.read_bytes() for part in parts) == Path("one/part-00000.jsonl").read_bytes()
    packed = sorted(Path("packed").glob("part-*.jsonl.gz"))
    assert [gzip.decompress(path.read_bytes()) for path in packed] == [part.read_bytes() for part in parts]
    assert {path.read_bytes()[4:8] for path in packed} == {bytes(4)}  # no time: the same rows are the same bytes


def test_broken_characters_are_counted_before_normalisation_takes_a_part_of_them_away(place):
    broken = story(1) + " “Ran”".encode().decode("latin-1") * 3
    assert "\x80" in broken
    write_rows(Path("in.jsonl"), [broken, story(2)])
    report = clean(DataConfig(path="in.jsonl"), CleanConfig(), "out")
    assert report.dropped["max_broken"].examples[0].startswith("in.jsonl:1 ")
    assert report.kept == 1


@pytest.mark.parametrize("n", [1, 3, 7])
def test_shards_hold_every_document_once_and_merge_to_the_whole(corpus, n):
    data = DataConfig(path="in")
    reports = [clean_shard(data, CONFIG, "shards", f"{i}/{n}")[1] for i in range(1, n + 1)]
    assert sum(report.documents for report in reports) == 100
    assert sum(report.documents > 0 for report in reports) >= min(n, 4)
    kept = [row for i in range(1, n + 1) for row in rows_in(f"shards/shard-{i}-of-{n}")]
    clean(data, CleanConfig(**{**vars(CONFIG), "exact": False, "near": None}), "with_duplicates")
    assert kept == rows_in("with_duplicates")
    whole, merged = clean(data, CONFIG, "whole"), merge("shards", "merged")
    assert merged == whole
    assert contents("merged") == contents("whole")


@pytest.mark.parametrize("kind", ["txt", "jsonl.gz", "json", "csv", "parquet"])
def test_shards_of_any_format_hold_every_document_once(place, kind):
    texts = [story(i) for i in range(60)]
    path = Path(f"in.{kind}")
    if kind == "txt":
        path.write_text("\n".join(texts))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(text) + "\n" for text in texts).encode()))
    elif kind == "json":
        path.write_text(json.dumps(texts))
    elif kind == "csv":
        path.write_text("text\n" + "\n".join(texts) + "\n")
    else:
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
        parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=10)
    data = DataConfig(path=str(path), document="line")
    rows = []
    for i in range(1, 5):
        directory, _ = clean_shard(data, CleanConfig(), "shards", f"{i}/4")
        rows += rows_in(directory)
    assert [row["text"] for row in rows] == texts


@pytest.mark.parametrize("document", ["file", "blank"])
def test_a_document_longer_than_a_block_is_judged_whole(place, document):
    """Also where others stand before and after it; of one that is too long only the size is known."""
    long, longer = story(1, 400), story(2, 900)
    assert len(long) > 4 * 2**12
    texts = [story(3), long, story(4), longer, story(5)]
    if document == "file":
        Path("in").mkdir()
        for i, text in enumerate(texts):
            Path(f"in/{i}.txt").write_text(text)
    else:
        Path("in.txt").write_text("\n\n".join(texts))
    data = DataConfig(path="in" if document == "file" else "in.txt", document=document)
    report = clean(data, CleanConfig(max_bytes=len(long)), "out")
    assert [row["text"] for row in rows_in("out")] == [texts[0], texts[1], texts[2], texts[4]]
    assert {rule: (d.documents, d.n_bytes) for rule, d in report.dropped.items()} == {"max_bytes": (1, len(longer))}
    assert report.n_bytes == sum(map(len, texts))


def test_lines_are_removed_and_counted(place):
    text = story(1).replace(". ", ".\n", 2)
    notice = "Please enable JavaScript to see this page."
    write_rows(Path("in.jsonl"), [f"Menu\n\n{notice}\n\n{text}", story(2)])
    report = clean(DataConfig(path="in.jsonl"), CleanConfig(rules=["c4"]), "out")
    assert [row["text"] for row in rows_in("out")] == [text, story(2)]
    assert report.edits == {"line_end": [1, 1], "line_phrases": [1, 1]}


@pytest.mark.parametrize(
    ("share", "message"),
    [("5/4", "'5/4' is no share"), ("0/4", "no share"), ("1", "no share"), ("a/b", "i/n with i from 1 to n")],
)
def test_a_share_that_is_none_is_refused(corpus, share, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        clean_shard(DataConfig(path="in"), CONFIG, "out", share)
    assert not Path("out").exists()


def test_nothing_is_overwritten_and_a_shard_is_made_once(corpus):
    data = DataConfig(path="in")
    Path("out").mkdir()
    Path("out/mine").write_text("")
    with pytest.raises(ValueError, match="out is not empty"):
        clean(data, CONFIG, "out")
    Path("file").write_text("")
    with pytest.raises(ValueError, match="file is a file"):
        clean(data, CONFIG, "file")
    directory, report = clean_shard(data, CONFIG, "shards", "1/2")
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert clean_shard(data, CONFIG, "shards", "1/2") == (directory, report)
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before
    with pytest.raises(ValueError, match="other settings or of other files"):
        clean_shard(data, CleanConfig(), "shards", "1/2")
    with pytest.raises(ValueError, match="shard-2-of-2 is missing"):
        merge("shards", "merged")
    clean_shard(data, CleanConfig(), "shards", "2/2")
    with pytest.raises(ValueError, match="settings are not those of"):
        merge("shards", "merged")
    clean_shard(data, CONFIG, "others", "1/2")
    clean_shard(DataConfig(path="in/a.jsonl"), CONFIG, "others", "2/2")
    with pytest.raises(ValueError, match="shard-2-of-2: its files are not those of"):
        merge("others", "merged")
    with pytest.raises(ValueError, match="no shards there"):
        merge("in", "merged")
    assert not Path("merged").exists()


def test_text_that_cannot_be_read_leaves_nothing(corpus):
    with Path("in/b.jsonl").open("a") as file:
        file.write('{"title": 1}\n')
    with pytest.raises(ValueError, match=r"in/b\.jsonl:41: field \"text\" is missing"):
        clean(DataConfig(path="in"), CONFIG, "out")
    assert sorted(path.name for path in Path().iterdir()) == ["in", "test.jsonl"]


def test_what_a_killed_process_left_is_removed(corpus):
    for leftover in (Path(f".out.{machine()}.99999999.tmp"), Path(f"shards/.shard-1-of-2.{machine()}.99999999.tmp")):
        (leftover / "shard").mkdir(parents=True)
    clean(DataConfig(path="in"), CONFIG, "out")
    clean_shard(DataConfig(path="in"), CONFIG, "shards", "1/2")
    assert not [path for path in Path().rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.parametrize("out", ["in", "in/out", "in/deep/out"])
def test_output_that_would_be_read_as_text_of_the_corpus_is_refused(corpus, out):
    for make in (lambda: clean(DataConfig(path=["test.jsonl", "in/"]), CONFIG, out), lambda: share(out)):
        with pytest.raises(ValueError, match=f"out: {out} lies in data.path in/?, and would be read with it"):
            make()
    assert sorted(path.name for path in Path("in").iterdir()) == ["a.jsonl", "b.jsonl"]


def share(out):
    return clean_shard(DataConfig(path="in"), CONFIG, out, "1/2")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "nowhere"}, "data.path: nowhere: no such file or folder"),
        ({"path": "empty.txt"}, "data.path: no text in empty.txt: the corpus is empty"),
        ({"against": "nowhere"}, "clean.against: nowhere: no such file or folder"),
        ({"against": "empty.txt"}, "clean.against: no text in empty.txt, so nothing would be found"),
        ({"against_field": None}, 'test.jsonl:1: field "text" is missing (found: question); set clean.against_field'),
    ],
)
def test_files_without_text_are_named_with_their_field(corpus, settings, message):
    Path("empty.txt").write_text("")
    data = DataConfig(path=settings.pop("path", "in"))
    with pytest.raises(ValueError, match=re.escape(message)):
        clean(data, CleanConfig(**{**vars(CONFIG), **settings}), "out")
    assert not Path("out").exists()


def test_nothing_left_is_a_report_and_no_rows(place, caplog):
    write_rows(Path("in.jsonl"), ["short", "too short"])
    report = clean(DataConfig(path="in.jsonl"), CleanConfig(), "out")
    assert (report.kept, report.dropped["min_words"].documents) == (0, 2)
    assert {path.name for path in Path("out").iterdir()} == {"report.json", "report.md"}
    assert "no document is left" in caplog.text


def test_signatures_take_the_space_that_is_said(corpus):
    directory, report = clean_shard(DataConfig(path="in"), CONFIG, "shards", "1/1")
    assert (directory / output.SIGNATURES).stat().st_size == 4 * N_PERM * report.kept
    assert (directory / output.RECORDS).stat().st_size == 28 * report.kept


def minillm(*words):
    return run_command(cli.dispatch, [str(word) for word in words])


def test_the_command_cleans_shares_and_merges(corpus, capsys):
    options = ["--data.path", "in", "--clean.against", "test.jsonl", "--clean.against_field", "question"]
    assert minillm("data", "clean", "whole", *options) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("whole\n")
    assert "| kept " in printed
    for i in (1, 2):
        assert minillm("data", "clean", "shards", *options, "--shard", f"{i}/2") == 0
    assert minillm("data", "clean", "merged", "--merge", "shards") == 0
    assert contents("merged") == contents("whole")
    capsys.readouterr()
    assert minillm("data", "clean", "again", "--merge", "shards", "--clean.near", "0.7") == 1
    assert "said by the shards" in capsys.readouterr().err
    assert minillm("data", "clean", "again", "--data.path", "in", "--clean.rules", "gofer") == 1
    assert "clean.rules: 'gofer' is no rule; did you mean gopher?" in capsys.readouterr().err
    assert minillm("data", "clean", "again") == 1
    assert "data.path" in capsys.readouterr().err


def test_real_web_text_is_mostly_kept(real_data, tmp_path):
    """C4 was filtered and made free of duplicates by its makers."""
    path = str(tmp_path / "in.jsonl")
    Path(path).write_text("".join((real_data / "c4.jsonl").read_text().splitlines(keepends=True)[:100]))
    report = clean(DataConfig(path=path), CleanConfig(), tmp_path / "out")
    assert report.documents == 100
    assert 0.8 < report.kept / report.documents < 0.95
    assert {"duplicate", "near_duplicate"} & set(report.dropped) == set()
    assert report.edits["email"] == [2, 2]
    twice = clean(DataConfig(path=[path, str(tmp_path / "out")]), CleanConfig(), tmp_path / "twice")
    assert twice.kept == report.kept  # what was cleaned passes again, as a duplicate of what it was made of
    assert twice.dropped["duplicate"].documents == report.kept


def test_real_tests_are_found_in_a_corpus_that_holds_them(real_data, tmp_path):
    questions = [json.loads(line) for line in (real_data / "gsm8k_train.jsonl").open()][:40]
    rows = [json.loads(line)["text"] for line in (real_data / "c4.jsonl").open()][:80]
    for i, question in enumerate(questions[:10]):
        rows[8 * i] = f"{rows[8 * i]}\n\nProblem: {question['question']} Answer: {question['answer']}"
    write_rows(tmp_path / "in.jsonl", rows)
    write_rows(tmp_path / "test.jsonl", [question["question"] for question in questions], field="question")
    config = CleanConfig(rules=[], near=None, against=str(tmp_path / "test.jsonl"), against_field="question")
    report = clean(DataConfig(path=str(tmp_path / "in.jsonl")), config, tmp_path / "out")
    assert report.dropped.keys() == {"contamination"}
    assert report.dropped["contamination"].documents == 10
    assert report.dropped["contamination"].examples[1] == f"{tmp_path}/in.jsonl:9 ({tmp_path}/test.jsonl:2)"
