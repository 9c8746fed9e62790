"""SIGTERM and Ctrl-C as requests, not as blows."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_requests(request: Callable[[str], None]) -> Iterator[None]:
    """While the block runs, SIGTERM and Ctrl-C call `request` with their name; a second Ctrl-C interrupts at once.

    In another thread than the main one Python allows no handlers, and whoever started the thread has its own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = False

    def handle(number: int, _: Any) -> None:
        nonlocal came
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came = True
        request(signal.Signals(number).name)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
