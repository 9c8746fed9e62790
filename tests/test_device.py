"""Which device there is, how fast it is, and how much memory it has."""

import os

import pytest
import torch

from minillm.distributed.device import find_device, free_memory, peak_flops, peak_memory

CPU = torch.device("cpu")


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"run\.device: 'tpu9' cannot be used here"):
        find_device("tpu9")


def test_a_device_that_holds_no_numbers_is_refused():
    with pytest.raises(ValueError, match=r"run\.device: 'meta' cannot be used here"):
        find_device("meta")


def test_the_device_is_measured_where_no_datasheet_knows_it():
    assert peak_flops(CPU, torch.float32) > 1e8
    assert peak_memory(CPU) > 1e6


def test_free_memory_is_known_and_no_more_than_there_is():
    free = free_memory(torch.device("cpu"))
    if free is None:
        pytest.skip("this system does not tell")
    assert 0 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
