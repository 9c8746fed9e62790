"""Saving in the background: what is saved is what was there at the call, and what goes wrong is heard of."""

import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as torch_dist
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard

from minillm import checkpoint
from minillm.checkpoint import ALONE, Saver, folder
from minillm.distributed.context import Context, connect
from minillm.optim import optimizer_tensors
from minillm.tensors import parameter_names

N = 100_000


def names(directory: str | Path) -> list[str]:
    return sorted(path.name for path in Path(directory).iterdir())


def value_of(path: Path) -> float:
    into = {"w": torch.zeros(N)}
    state = checkpoint.load_tensors(path, into)
    assert (into["w"] == into["w"][0]).all()
    assert state["value"] == into["w"][0]
    return into["w"][0].item()


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """Writing begins when it is set."""
    opened, write_shard = threading.Event(), folder.write_shard

    def wait_and_write(*args):
        assert opened.wait(60)
        return write_shard(*args)

    monkeypatch.setattr(folder, "write_shard", wait_and_write)
    return opened


def test_what_changes_during_the_write_does_not_reach_the_file(tmp_path, gate):
    tensors, state = {"w": torch.ones(N)}, {"value": 1.0}
    with Saver(ALONE, background=True) as saver:
        path = saver.save(tmp_path, 1, tensors, state)
        tensors["w"].fill_(2)
        state["value"] = 2.0
        assert checkpoint.latest(tmp_path) is None  # not complete before it is
        saver.poll()
        gate.set()
        saver.wait()
        assert checkpoint.latest(tmp_path) == path
        assert value_of(path) == 1
        memory = saver.staging["w"].data_ptr()
        saver.save(tmp_path, 2, tensors, state)
        tensors["w"].fill_(3)
        saver.save(tmp_path, 3, tensors, {"value": 3.0})  # waits for that before: they share their memory
        assert saver.staging["w"].data_ptr() == memory
    assert [value_of(tmp_path / f"step-0000000{step}") for step in (1, 2, 3)] == [1, 2, 3]


def test_without_background_it_is_saved_on_return(tmp_path):
    with Saver(ALONE) as saver:
        assert checkpoint.latest(tmp_path) is None
        assert value_of(saver.save(tmp_path, 1, {"w": torch.ones(N)}, {"value": 1.0})) == 1
        assert not saver.staging


@pytest.mark.parametrize("heard_by", ["poll", "wait", "save", "the end"])
def test_a_full_disk_is_heard_of_and_leaves_the_earlier_checkpoint(disk, heard_by):
    place, fill = disk
    place, saver = place / "checkpoints", Saver(ALONE, background=True)

    def save_twice() -> None:
        with saver:
            saver.save(place, 1, {"w": torch.ones(N)}, {"value": 1.0}, keep_last=1)
            saver.wait()
            fill()
            saver.save(place, 2, {"w": torch.ones(N)}, {"value": 1.0}, keep_last=1)
            saver.thread.join()
            {
                "poll": saver.poll,
                "wait": saver.wait,
                "save": lambda: saver.save(place, 3, {"w": torch.ones(N)}, {"value": 1.0}),
                "the end": lambda: None,
            }[heard_by]()

    with pytest.raises(ValueError, match="step-00000002: cannot be written"):
        save_twice()
    assert names(place) == ["step-00000001"]
    assert value_of(checkpoint.latest(place)) == 1
    saver.wait()  # it is said once


def test_a_program_that_fails_is_not_held_up_by_the_writer(tmp_path, gate, monkeypatch, caplog):
    monkeypatch.setattr(checkpoint.saver, "GRACE", 0.01)
    saver = Saver(ALONE, background=True)
    with suppress(KeyError), saver:
        saver.save(tmp_path, 1, {"w": torch.ones(N)}, {"value": 1.0})
        raise KeyError
    assert "save step 1: not finished" in caplog.text
    assert checkpoint.latest(tmp_path) is None
    gate.set()
    saver.wait()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_what_is_on_a_gpu_is_copied_to_pinned_memory(tmp_path):
    tensors = {"w": torch.ones(N, device="cuda")}
    with Saver(Context(torch.device("cuda")), background=True) as saver:
        path = saver.save(tmp_path, 1, tensors, {"value": 1.0})
        tensors["w"].fill_(2)
        assert saver.staging["w"].is_pinned()
    assert value_of(path) == 1


# --- several ranks ----------------------------------------------------------------------------------------------------


def train_and_save(directory: str) -> list[str]:
    """Training communicates all the while; then the disk of rank 1 is full. The steps at which that is heard of."""
    with connect("cpu") as dist:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64))
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

        def tensors() -> dict[str, torch.Tensor]:
            parameters = parameter_names(model)
            return parameters | optimizer_tensors(optimizer, parameters)

        def step() -> None:
            model(torch.ones(2, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        expected = []
        with Saver(dist, background=True) as saver:
            for i in range(30):
                step()
                saver.poll()
                if i % 5 == 0:
                    saver.save(directory, i + 1, tensors(), {"step": i + 1})
                    expected.append({n: t.full_tensor().clone() for n, t in parameter_names(model).items()})
            saver.wait()
            for i, values in zip(range(0, 30, 5), expected):
                into = tensors()
                state = checkpoint.load_tensors(f"{directory}/step-{i + 1:08d}", into, dist=dist)
                assert state == {"step": i + 1}
                assert all(torch.equal(into[name].full_tensor(), values[name]) for name in values)
            torch_dist.barrier()
        if dist.rank == 1:
            folder.write_shard = out_of_space
        said, after = "", 0
        try:
            with Saver(dist, background=True) as saver:
                saver.save(directory, 100, tensors(), {"step": 100})
                for _ in range(10_000):
                    after += 1
                    step()
                    saver.poll()
        except (ValueError, OSError) as error:
            said = str(error)
        finally:
            folder.write_shard = checkpoint.shard.write_shard
        dist.barrier()
        return [said, after, names(directory)[-1]]


def out_of_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_ranks_save_while_they_train_and_hear_of_an_error_at_the_same_step(tmp_path):
    (first, at, last), (second, same, _) = run_ranks(2, train_and_save, str(tmp_path))
    assert at == same < 10_000
    assert "step-00000100: cannot be written: the disk is full" in second
    assert first == f"rank 1: {second}"
    assert last == "step-00000026"
