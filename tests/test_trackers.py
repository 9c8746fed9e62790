"""Who else is told the rows of a run gets each of them, and is never a reason to lose one."""

import json
import struct
import sys

import pytest

from minillm.log import LogConfig, RunLog, make_trackers, plot_curves, read_metrics, trackers
from minillm.log.curves import PREFERENCES, plot_preferences

ROWS = [
    {"step": step, "tokens": 8 * step, "loss": 4 / step, "z_loss": 0.5, "lr": 0.1, "tokens_per_second": 9.0}
    for step in range(1, 7)
]


def report(directory, config, rows, step=0):
    """Write rows as a run does that goes on after `step`."""
    (directory / "config.json").write_text(json.dumps({"optim": {"lr": 0.1}}))
    with RunLog(directory / "metrics.jsonl", step, 6, False, make_trackers(config, directory)) as log:
        for row in rows:
            log.write(row)
            log.note("norms", {"step": row["step"], "grad_norm/embed.weight": 0.25})


def events(directory):
    """{tag: [(step, value), ...]} of TensorBoard's files, read by its own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(directory / "tensorboard"))
    read.Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def history(directory):
    """Per offline file, in order of time: the id of the W&B run, and its rows, from what `wandb sync` sends."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # the process that writes the files has all of them written when it has ended
    found = []
    for path in sorted(directory.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        run_id, rows = None, []
        for data in log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                run_id = record.run.run_id
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        found.append((run_id, rows))
    return found


def log_records(data):
    """The records of a LevelDB log after 7 bytes of header: blocks of 32 KiB, records in pieces (crc, size, kind)."""
    place, record = 7, b""
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:  # what is left of a block is too short for a piece
            place += 2**15 - place % 2**15
            continue
        size, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


@pytest.fixture
def fresh_wandb(tmp_path, monkeypatch):
    """W&B as in a process that has not used it yet, on a machine where nobody is logged in."""
    wandb = pytest.importorskip("wandb", reason="extra track")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()
    yield
    wandb.teardown()


def test_tensorboard_gets_every_number_of_every_row_and_a_resumed_run_continues_it(tmp_path):
    pytest.importorskip("tensorboard", reason="extra track")
    report(tmp_path, LogConfig(tensorboard=True, curves=False), ROWS[:5])
    report(tmp_path, LogConfig(tensorboard=True, curves=False), ROWS[3:], step=3)
    found = events(tmp_path)
    assert found.keys() == {*ROWS[0], "grad_norm/embed.weight"} - {"step"}
    assert found["loss"] == [(row["step"], pytest.approx(row["loss"])) for row in ROWS]


def test_wandb_without_a_login_keeps_the_rows_here_under_one_id(tmp_path, fresh_wandb, monkeypatch, caplog):
    caplog.set_level("INFO", "minillm")
    config = LogConfig(wandb="a project", curves=False)
    report(tmp_path, config, ROWS[:4])
    monkeypatch.setenv("WANDB_MODE", "offline")
    report(tmp_path, config, ROWS[4:], step=4)
    (first_id, first), (second_id, second) = history(tmp_path)
    assert first_id == second_id == (tmp_path / "wandb-id").read_text().strip()
    told = [row for row in first + second if "loss" in row]
    assert [{key: row[key] for key in ROWS[0]} for row in told] == ROWS
    assert sum(row.get("grad_norm/embed.weight") == 0.25 for row in first + second) == len(ROWS)
    assert "nobody is logged in" in caplog.text
    assert "wandb sync" in caplog.text


def test_wandb_without_a_network_keeps_the_rows_here(tmp_path, fresh_wandb, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nobody listens
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(trackers, "WANDB_SECONDS", 1)
    caplog.set_level("INFO", "minillm")
    report(tmp_path, LogConfig(wandb="a project", curves=False), ROWS[:2])
    assert [row["loss"] for row in history(tmp_path)[0][1] if "loss" in row] == [4.0, 2.0]
    assert "W&B: its server cannot be used" in caplog.text


class Failing:
    """A tracker whose server goes away."""

    name = "Failing"

    def __init__(self, when):
        self.when, self.told = when, []

    def do(self, what):
        self.told.append(what)
        if what == self.when:
            raise ConnectionError("the server is gone\nsince Monday")

    def begin(self, step):
        self.do("begin")

    def write(self, row):
        self.do("write")

    def close(self):
        self.do("close")


@pytest.mark.parametrize(
    ("when", "told"),
    [("begin", ["begin"]), ("write", ["begin", "write"]), ("close", ["begin", "write", "write", "close"])],
)
def test_a_tracker_that_fails_is_told_no_more_and_no_row_is_lost(tmp_path, caplog, when, told):
    failing, other = Failing(when), Failing(None)
    with RunLog(tmp_path / "metrics.jsonl", 0, 6, False, [failing, other]) as log:
        for row in ROWS[:2]:
            log.write(row)
    assert failing.told == told
    assert other.told == ["begin", "write", "write", "close"]
    assert read_metrics(tmp_path / "metrics.jsonl") == ROWS[:2]
    assert [record.getMessage() for record in caplog.records] == [
        "Failing failed and gets no more rows; the training goes on: the server is gone"
    ]


@pytest.mark.parametrize(("package", "options"), [("tensorboard", {"tensorboard": True}), ("wandb", {"wandb": "mine"})])
def test_a_missing_package_is_named_before_anything_begins(tmp_path, monkeypatch, package, options):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ValueError, match=rf"log\.{package}: .*pip install 'minillm\[track\]'"):
        make_trackers(LogConfig(**options), tmp_path)
    assert not any(tmp_path.iterdir())


def test_rows_of_notes_past_the_step_of_a_resumed_run_are_dropped(tmp_path):
    report(tmp_path, LogConfig(curves=False), ROWS[:5])
    report(tmp_path, LogConfig(curves=False), ROWS[3:], step=3)
    assert [row["step"] for row in read_metrics(tmp_path / "norms.jsonl")] == [1, 2, 3, 4, 5, 6]


# --- the picture ------------------------------------------------------------------------------------------------------


def test_the_picture_is_drawn_at_the_end_and_shows_earlier_rows_of_a_resumed_run(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="extra plot")
    drawn = []
    monkeypatch.setattr(trackers, "plot_curves", lambda rows, path: (drawn.append(len(rows)), plot_curves(rows, path)))
    report(tmp_path, LogConfig(), ROWS[:3])
    report(tmp_path, LogConfig(), ROWS[3:], step=3)
    assert drawn == [3, 6]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_a_long_run_is_drawn_on_the_way(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="extra plot")
    picture = trackers.CurvesPicture(tmp_path / "curves.png")
    picture.begin(0)
    picture.write({"step": 1, "loss": 2.0})
    assert not picture.path.exists()
    monkeypatch.setattr(trackers, "PICTURE_SECONDS", 0)
    picture.write({"step": 2, "loss": 1.0})
    assert picture.path.exists()


def test_without_matplotlib_there_is_no_picture_and_no_error(tmp_path, monkeypatch):
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    report(tmp_path, LogConfig(), ROWS)
    assert not (tmp_path / "curves.png").exists()
    with pytest.raises(ValueError, match=r"minillm\[plot\]"):
        plot_curves(ROWS, tmp_path / "curves.png")


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 1, "loss": None, "lr": 0.0, "grad_norm": None}],
        [{"step": step, "loss": 0.0, "grad_norm": 0.0, "val_loss/a": 1.0} for step in (1, 2)],
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_picture_of_nothing_or_of_zeros_is_drawn(tmp_path, rows):
    pytest.importorskip("matplotlib", reason="extra plot")
    plot_curves(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


@pytest.mark.filterwarnings("error")
def test_preferences_are_drawn_with_what_is_held_out(tmp_path):
    figures = pytest.importorskip("matplotlib.figure", reason="extra plot")
    names = [name for _, keys in PREFERENCES for name in keys]
    rows = [{"step": step, "loss": 1.0} | {name: step * k for k, name in enumerate(names)} for step in (1, 2, 3)]
    rows[1] |= {"val_loss": 1.0, "val_margin": 0.5}
    drawn = []
    for title, keys in PREFERENCES:
        axes = figures.Figure().add_subplot()
        plot_preferences(axes, rows, title, keys)
        drawn += [line.get_ydata().tolist() for line in axes.get_lines()]
    expected = [[step * k for step in (1, 2, 3)] for k in range(len(names))]
    assert drawn == [*expected[: names.index("margin") + 1], [0.5], *expected[names.index("margin") + 1 :]]
    plot_curves(rows, tmp_path / "with.png")
    plot_curves([{"step": row["step"], "loss": 1.0} for row in rows], tmp_path / "without.png")
    assert size_of(tmp_path / "with.png") > size_of(tmp_path / "without.png")


def size_of(picture):
    return struct.unpack(">II", picture.read_bytes()[16:24])  # width and height of a PNG
