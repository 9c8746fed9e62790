"""What a run says: rows that survive a crash, a curve that shows the loss, one line for a mistake."""

import json

import pytest
import torch

from minillm.log import Clock, RunLog, curve, read_metrics, run_command


def rows(n):
    return [{"step": step, "loss": 4 / step} for step in range(1, n + 1)]


def report(path, step, *new):
    with RunLog(path, step, steps=9, show=False) as log:
        for row in new:
            log.write(row)


def test_rows_come_back_as_written(tmp_path):
    report(tmp_path / "m.jsonl", 0, *rows(3))
    assert read_metrics(tmp_path / "m.jsonl") == rows(3)


def test_opening_at_a_step_drops_later_rows_and_a_row_cut_short(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(5)) + '{"step": 6, "lo')
    report(path, 3, {"step": 4, "loss": 9})
    assert read_metrics(path) == [*rows(3), {"step": 4, "loss": 9}]


def test_the_bar_shows_loss_speed_and_time_left(capsys):
    with RunLog(None, 0, steps=4) as log:
        log.write({"step": 1, "loss": 2.5, "tokens_per_second": 1234.5})
        log.advance()
        log.bar.refresh()
    shown = capsys.readouterr().err
    assert "loss 2.500, 1,234 tokens/s" in shown
    assert "1/4 [00:00<" in shown


def test_a_broken_row_is_named(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step" 2}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl:2: not a row of metrics"):
        read_metrics(path)


def test_the_curve_falls_from_left_to_right_and_marks_validation():
    lines = curve([*rows(50), {"step": 25, "loss": 0.16, "val_loss": 2.0}]).splitlines()
    assert lines[0].startswith("   4.000 ┤ ·")
    assert any("o" in line for line in lines[:-1])
    assert lines[-3].rstrip().endswith("·")
    assert "step 0" in lines[-1]
    assert "50" in lines[-1]


@pytest.mark.parametrize("losses", [[], [1.0], [2.0, 2.0], [None, 1.0, 2.0]])
def test_a_curve_of_few_or_equal_points_does_not_fail(losses):
    curve([{"step": step + 1, "loss": loss} for step, loss in enumerate(losses)])


def test_the_clock_counts_only_its_blocks():
    clock = Clock(tokens=100)
    with clock.running():
        pass
    assert clock.seconds == clock.last < 0.5
    assert clock.speed(200)["tokens_per_second"] > 0
    assert clock.speed(200) == {"tokens_per_second": 0.0, "mfu": None, "loader_wait": 0.0}


def test_mfu_is_the_share_of_the_peak():
    clock = Clock(tokens=0, flops_per_token=6.0, peak_flops=120.0)
    clock.seconds = 2.0
    assert clock.speed(20) == {"tokens_per_second": 10.0, "mfu": 0.5, "loader_wait": 0.0}


def test_a_mistake_is_one_line_and_a_non_zero_exit(capsys):
    def fail(argv):
        raise ValueError("x.txt:3: broken")

    assert run_command(fail, []) == 1
    assert capsys.readouterr().err == "error: x.txt:3: broken\n"
    with pytest.raises(ValueError, match="broken"):
        run_command(fail, ["--debug"])
    assert run_command(lambda argv: None, []) == 0


def fill_the_memory(argv):
    torch.empty(2**50)


def fill_a_device(argv):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 79 GiB.\nOf the allocated")


def fill_python(argv):
    raise MemoryError


@pytest.mark.parametrize(
    ("command", "amount"),
    [
        (fill_the_memory, " (4503599627370496 bytes more were needed)"),
        (fill_a_device, " (20.00 GiB more were needed)"),
        (fill_python, ""),
    ],
)
def test_a_lack_of_memory_is_one_line_that_names_what_helps(capsys, command, amount):
    assert run_command(command, []) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: out of memory{amount}; to train in less, lower train.micro_batch_size, ")
    assert error.count("\n") == 1
    with pytest.raises((RuntimeError, MemoryError)):
        run_command(command, ["--debug"])


def test_another_error_of_the_program_is_no_lack_of_memory():
    def fail(argv):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_command(fail, [])


def test_a_compiler_that_is_missing_is_one_line_that_names_the_option(capsys):
    from torch._inductor import exc

    def fail(argv):
        raise exc.InvalidCxxCompiler

    assert run_command(fail, []) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: torch.compile fails here: No working C++ compiler found")
    assert "leave train.compile false, or see what `minillm doctor` says" in line
