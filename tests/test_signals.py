"""A signal asks; a second Ctrl-C insists."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from minillm.signals import stop_requests


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request_and_its_handler_goes_with_the_block(number):
    came, before = [], signal.getsignal(number)
    with stop_requests(came.append):
        os.kill(os.getpid(), number)
    assert came == [number.name]
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_interrupts():
    came = []
    with stop_requests(came.append):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert came == ["SIGTERM", "SIGTERM"]


def test_another_thread_leaves_the_handlers_alone():
    def inside():
        with stop_requests(lambda _: None):
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(inside).result() is signal.getsignal(signal.SIGTERM)
