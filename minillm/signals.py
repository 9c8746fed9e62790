"""SIGTERM and Ctrl-C as requests, not as blows."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_requests(request: Callable[[str], None]) -> Iterator[None]:
    """While the block runs, a signal calls `request` with its name: SIGTERM, Ctrl-C, and SIGUSR1, which schedulers can
    send some minutes before a job's time is over. A second Ctrl-C interrupts at once.

    In another thread than the main one Python allows no handlers, and whoever started the thread has its own.
    """
    came = False

    def handle(number: int, _: Any) -> None:
        nonlocal came
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came = True
        request(signal.Signals(number).name)

    with handlers(handle, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        yield


@contextmanager
def exit_on_request(say: Callable[[str], None]) -> Iterator[None]:
    """While the block runs, SIGTERM ends the program as one that was asked to: cleaned up, and with exit code 0.

    `say` is called with the signal's name.
    """

    def handle(number: int, _: Any) -> None:
        say(signal.Signals(number).name)
        raise SystemExit(0)

    with handlers(handle, signal.SIGTERM, signal.SIGUSR1):
        yield


@contextmanager
def handlers(handle: Callable[[int, Any], None], *numbers: signal.Signals) -> Iterator[None]:
    """While the block runs, these signals are handled so; only the main thread may, and does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
