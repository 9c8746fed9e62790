"""An interrupted preparation goes on where it stopped, and what comes out is the same, byte for byte."""

import dataclasses
import gzip
import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from minillm.data import partial, shards, text, tokenise, writing
from minillm.data.config import DataConfig
from minillm.data.partial import Partial, partial_folder
from minillm.data.shards import prepare
from minillm.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
SHARD = 20_000  # tokens
# Where the process is killed: before or after the n-th call of a function. Each block is kept.
MOMENTS = {
    "while the first block is written": (writing.GrowingArray, "append", 4, "before"),
    "between two files of a later block": (writing.GrowingArray, "append", 40, "before"),
    "when the counts are kept": (Partial, "keep", 1, "after"),
    "before a block is kept": (Partial, "keep", 4, "before"),
    "after a block is kept": (Partial, "keep", 4, "after"),
    "when a shard is full": (writing.GrowingArray, "close", 2, "after"),
    "when all is written": (Partial, "publish", 1, "before"),
    "when all is in place": (partial, "fsync_directory", -1, "after"),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(text, "BLOCK", 2**13)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """20 blocks in three formats, one file a single document over many blocks."""
    dice = random.Random(0)
    words = "the cat sat on a mat und die Katze saß da 猫坐在垫子上。 🙂 x\t2 don't".split(" ")
    lines = [" ".join(dice.choices(words, k=dice.randrange(5, 30))) for _ in range(600)]
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    (folder / "b.txt").write_text("\n".join(lines))
    (folder / "c.csv").write_text("text\n" + "\n".join(f'"{line}"' for line in lines[:300]))
    return folder


@pytest.fixture
def config(corpus, tmp_path) -> DataConfig:
    return DataConfig(path=str(corpus), cache_dir=str(tmp_path / "cache"), val="0.2", workers=1)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> dict[str, bytes]:
    """What an uninterrupted run writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BLOCK", 2**13)
        return run(DataConfig(path=str(corpus), cache_dir=str(tmp_path_factory.mktemp("cache")), val="0.2", workers=1))


def run(config: DataConfig) -> dict[str, bytes]:
    directory = prepare(config, BYTES, shard_tokens=SHARD, progress=False).directory
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def kill_at(owner, name: str, count: int, when: str) -> None:
    """This process, when a function is called for the count-th time; -1: when the folder is in its place."""
    function, calls = getattr(owner, name), 0

    def counted(*arguments):
        nonlocal calls
        calls += 1
        now = calls == count or (count == -1 and not list(arguments[0].glob(".*.partial/tokens")))
        if now and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, counted)


def killed(config: DataConfig, moment: str) -> Path:
    """Prepare in a process of its own that is killed at a moment; the folder of what it leaves."""
    process = os.fork()
    if process == 0:
        partial.KEEP_EVERY = 0
        kill_at(*MOMENTS[moment])
        run(config)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL, "the moment did not come"
    (folder,) = Path(config.cache_dir).glob(".*.partial")
    return folder


@pytest.mark.parametrize(
    ("moment", "workers"),
    [*((moment, 1) for moment in MOMENTS), ("before a block is kept", 2), ("between two files of a later block", 2)],
)
def test_what_was_killed_resumes_to_the_same_bytes(config, whole, moment, workers, caplog):
    caplog.set_level("INFO", "minillm")
    config = dataclasses.replace(config, workers=workers)
    killed(config, moment)
    assert run(config) == whole
    resumed = [record for record in caplog.records if "resumed at block" in record.message]
    nothing_to_do = ("while the first block is written", "when the counts are kept", "when all is in place")
    assert len(resumed) == (moment not in nothing_to_do)
    assert [path.name for path in Path(config.cache_dir).glob(".*")] == []


def test_what_was_killed_again_and_again_resumes_to_the_same_bytes(config, whole):
    for number, moment in enumerate(["before a block is kept", "after a block is kept"] * 2):
        killed(dataclasses.replace(config, workers=1 + number % 2), moment)
    assert run(config) == whole


@pytest.mark.parametrize("settings", [{"val": "hash 0.3"}, {"val": "0"}, {"val": "0.9"}, {"document": "line"}])
def test_every_split_resumes_to_the_same_bytes(config, settings):
    config = dataclasses.replace(config, **settings)
    killed(config, "after a block is kept")
    killed(config, "between two files of a later block")
    assert run(config) == run(dataclasses.replace(config, cache_dir=f"{config.cache_dir}-whole"))


def test_neither_the_first_reading_nor_what_is_written_is_done_again(config, monkeypatch):
    killed(config, "after a block is kept")
    encoded = []
    encode_block = tokenise.encode_block
    monkeypatch.setattr(tokenise, "encode_block", lambda *call: encoded.append(call) or encode_block(*call))
    monkeypatch.setattr(tokenise, "count", None)
    run(config)
    blocks = sum(1 for file in text.find_files(config.path) for _ in text.blocks(file, config))
    assert len(encoded) == blocks - 3  # the first of four things kept were the counts
    assert blocks > 15


def test_ctrl_c_and_a_full_disk_leave_what_is_done(config, whole, monkeypatch, caplog):
    caplog.set_level("INFO", "minillm")
    monkeypatch.setattr(partial, "KEEP_EVERY", 0)
    append = writing.GrowingArray.append

    for error, raised in ((KeyboardInterrupt, KeyboardInterrupt), (OSError(28, "No space left"), ValueError)):
        calls = []

        def interrupted(self, array, error=error, calls=calls):
            calls.append(array)
            if len(calls) == 30:
                raise error
            append(self, array)

        monkeypatch.setattr(writing.GrowingArray, "append", interrupted)
        with pytest.raises(raised, match="the disk is full" if raised is ValueError else None):
            run(config)
        assert "interrupted; what is done stays in" in caplog.messages[-1]
    monkeypatch.undo()
    monkeypatch.setattr(text, "BLOCK", 2**13)
    assert run(config) == whole
    assert sum("resumed at block" in message for message in caplog.messages) == 2


def test_a_preparation_that_filled_the_disk_resumes_after_room_is_made(disk, config, whole, caplog):
    caplog.set_level("INFO", "minillm")
    place, fill = disk
    config = dataclasses.replace(config, cache_dir=str(place / "cache"))
    killed(config, "before a block is kept")
    fill()
    with pytest.raises(ValueError, match=r"cannot be written: (the disk is full|the file would be larger)"):
        run(config)
    (place / "filler").unlink(missing_ok=True)
    lift_limit()
    assert run(config) == whole
    assert "resumed at block" in caplog.text


def lift_limit() -> None:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def damage_progress(folder: Path) -> None:
    path = folder / "progress.json"
    path.write_text(path.read_text().replace('"n_blocks": ', '"n_blocks": 1'))


def cut_progress(folder: Path) -> None:
    os.truncate(folder / "progress.json", 50)


def another_version(folder: Path) -> None:
    content = json.loads((folder / "progress.json").read_text()) | {"version": 0}
    (folder / "progress.json").write_text(json.dumps(content | {"hash": partial.json_hash(content)}))


def other_blocks(folder: Path) -> None:
    content = json.loads((folder / "progress.json").read_text())
    content["n_blocks"] += 1
    (folder / "progress.json").write_text(json.dumps(content | {"hash": partial.json_hash(content)}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_progress, "damaged, or of another version"),
        (cut_progress, "not valid JSON"),
        (another_version, "damaged, or of another version"),
        (other_blocks, "no longer read in the same blocks"),
        (lambda folder: os.truncate(folder / "counts.json", 50), "not valid JSON"),
        (lambda folder: os.truncate(folder / "tokens" / "train-offsets.npy", 200), "the file is truncated"),
        (lambda folder: os.truncate(folder / "tokens" / "train-00000.npy", 500), "missing or truncated"),
        (lambda folder: (folder / "tokens" / "train-sources.npy").unlink(), "the file is missing"),
        (lambda folder: shutil.rmtree(folder / "tokens"), "missing"),
    ],
)
def test_damaged_partial_work_is_begun_again_with_one_line(config, whole, damage, reason, caplog):
    caplog.set_level("INFO", "minillm")
    killed(config, "when a shard is full")
    damage(killed(config, "after a block is kept"))
    assert run(config) == whole
    said = [message for message in caplog.messages if "cannot be resumed, begun again: " in message]
    assert len(said) == 1
    assert reason in said[0]


def test_work_on_text_that_has_changed_since_is_not_resumed_but_named(config, corpus, tmp_path, caplog):
    caplog.set_level("INFO", "minillm")
    config = dataclasses.replace(config, path=str(shutil.copytree(corpus, tmp_path / "changing")))
    folder = killed(config, "when a shard is full")
    with open(f"{config.path}/b.txt", "a") as file:
        file.write("one line more\n")
    assert run(config) == run(dataclasses.replace(config, cache_dir=str(tmp_path / "other")))
    assert "resumed" not in caplog.text
    left = [message for message in caplog.messages if message.startswith(f"{folder}: ")]
    assert len(left) == 1
    assert left[0].endswith(" MB of interrupted work on other text or settings")
    assert folder.exists()


def test_work_that_takes_no_time_leaves_nothing_when_interrupted(config, monkeypatch):
    monkeypatch.setattr(shards, "changed_files", None)
    with pytest.raises(TypeError):
        run(config)
    assert list(Path(config.cache_dir).glob(".*")) == []


def test_what_a_killed_process_left_without_progress_is_written_over(config, whole):
    directory = prepare(config, BYTES, shard_tokens=SHARD).directory
    folder = partial_folder(directory)
    shutil.copytree(directory, folder / "tokens")
    (folder / "tokens" / "train-00099.npy").write_bytes(b"of another time")
    shutil.rmtree(directory)
    assert run(config) == whole
