"""A run's directory has one holder, and is never overwritten by accident."""

import subprocess
import sys
from pathlib import Path

import pytest

from minillm.files import BusyError
from minillm.run import RunConfig, RunDirectory, open_run


def config(path, resume="never"):
    return RunConfig(dir=str(path), resume=resume)


def test_a_new_run_makes_its_directory(tmp_path):
    with open_run(config(tmp_path / "deep" / "run")) as run:
        run.write_json(run.config, {"model": {}})
    assert (tmp_path / "deep" / "run" / "config.json").exists()


def test_an_existing_run_is_refused_and_the_way_on_is_named(tmp_path):
    with open_run(config(tmp_path)) as run:
        run.write_json(run.config, {})
    with (
        pytest.raises(ValueError, match=r"holds a run already; continue it with --run\.resume auto"),
        open_run(config(tmp_path)),
    ):
        pass
    with open_run(config(tmp_path, "auto")) as run:
        assert run.started


def test_a_directory_of_a_run_that_never_began_is_free(tmp_path):
    with open_run(config(tmp_path)):
        pass
    with open_run(config(tmp_path)) as run:
        assert not run.started


@pytest.mark.parametrize("left", ["config.json", "metrics.jsonl", "checkpoints/step-00000005/state.json"])
def test_what_any_part_of_a_run_is_left_of_is_not_begun_again(tmp_path, left):
    (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / left).write_text("{}\n")
    with pytest.raises(ValueError, match="holds a run already"), open_run(config(tmp_path)):
        pass
    with open_run(config(tmp_path, "auto")) as run:
        assert run.started


def test_a_place_made_for_checkpoints_is_no_run(tmp_path):
    (tmp_path / "checkpoints" / "lost+found").mkdir(parents=True)
    with open_run(config(tmp_path)) as run:
        assert not run.started


def test_a_run_is_finished_only_at_the_step_that_its_summary_is_of(tmp_path):
    run = RunDirectory(tmp_path)
    assert not run.finished_at(0)
    run.write_json(run.summary, {"finished": True, "step": 12})
    assert run.finished_at(12)
    assert not run.finished_at(20)
    run.write_json(run.summary, {"finished": False, "step": 20})
    assert not run.finished_at(20)


def test_a_directory_without_a_name_is_refused():
    with pytest.raises(ValueError, match=r"^dir: is empty; give a directory"):
        config("")


HOLD = """
import sys, time
from minillm.run import RunConfig, open_run
with open_run(RunConfig(dir=sys.argv[1], resume="auto")):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_directory_in_use_is_refused_and_freed_by_its_holders_death(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match=f"in use by process {holder.pid}"), open_run(config(tmp_path, "auto")):
            pass
        holder.kill()
    with open_run(config(tmp_path, "auto")):
        pass


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with (
        pytest.raises(ValueError, match=r"run\.dir: .*run is a file; give a directory"),
        open_run(config(tmp_path / "run")),
    ):
        pass


@pytest.mark.parametrize("name", [".", "..", "../b"])
def test_a_run_around_the_working_directory_is_not_begun_again(tmp_path, monkeypatch, name):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    Path(name, "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run already"), open_run(RunConfig(dir=name)):
        pass
