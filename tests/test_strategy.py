"""`parallel.strategy = auto`: what sends the least of what fits, in the same words on every rank."""

import pytest

from minillm.distributed.config import Layout, ParallelConfig
from minillm.memory import GIB, Setting, estimate
from minillm.model.presets import preset
from minillm.optim import OptimConfig
from minillm.strategy import choose_strategy, layouts

SETTING = Setting(rows=4, seq_len=2048, precision="bf16", device_type="cuda")
ROOM = int(0.9 * 80 * GIB)


def chosen(name, world_size, room=ROOM, **parallel):
    found, why = choose_strategy(preset(name), OptimConfig(), SETTING, ParallelConfig(**parallel), world_size, 8, room)
    return (found.strategy, found.dp_replicate, found.dp_shard, found.reshard_after_forward), why


def test_what_fits_as_a_whole_is_not_cut():
    assert chosen("gpt2-124m", 8)[0][:3] == ("ddp", 8, 1)
    assert chosen("gpt2-124m", 64)[0][:3] == ("ddp", 64, 1)


def test_what_does_not_is_cut_over_a_node_and_no_more_than_needed():
    found, why = chosen("llama3-8b", 8)
    assert found[:3] == ("fsdp", 1, 8)
    assert "ddp would take" in why
    assert chosen("llama3-8b", 64)[0][:3] == ("hsdp", 8, 8)
    assert chosen("llama3-70b", 64)[0] == ("fsdp", 1, 64, True)


def test_weights_are_freed_after_forward_only_where_there_is_no_room_to_keep_them():
    config, optim = preset("llama3-8b"), OptimConfig()
    shape = Layout("fsdp", 1, 8, 1)
    kept, freed = (
        estimate(config, optim, Setting(**{**vars(SETTING), "reshard_after_forward": reshard}), shape).peak
        for reshard in (False, True)
    )
    assert freed < kept
    assert chosen("llama3-8b", 8, room=kept)[0][3] is False
    assert chosen("llama3-8b", 8, room=kept - 1)[0][3] is True


def test_where_nothing_fits_the_least_is_tried_and_that_is_said():
    found, why = chosen("llama3-70b", 8)
    assert found == ("fsdp", 1, 8, True)
    assert "more than" in why


def test_what_the_section_says_is_kept():
    assert chosen("gpt2-124m", 8, strategy="fsdp", dp_shard=8)[0] == ("fsdp", None, 8, True)
    assert chosen("gpt2-124m", 16, dp_shard=4)[0][:3] == ("hsdp", 4, 4)
    assert chosen("llama3-8b", 16, tp=2)[0][1:3] == (2, 4)
    with pytest.raises(ValueError, match="dp_shard 3"):
        chosen("gpt2-124m", 8, dp_shard=3)


def test_one_process_needs_nothing():
    assert chosen("llama3-70b", 1) == (("ddp", None, None, True), "one process")


def test_every_layout_uses_all_ranks():
    for world_size in (2, 6, 8, 12, 64):
        for shape, _ in layouts(ParallelConfig(), world_size, 8):
            assert shape.dp_replicate * shape.dp_shard * shape.tp == world_size
