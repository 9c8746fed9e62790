"""What a command says on standard error: messages above the progress bar, one line for a mistake."""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minillm.files import explained
from minillm.log.memory import is_out_of_memory, out_of_memory

COMPILER = ("torch._inductor", "torch._dynamo")  # by name: to import it takes seconds
LOGGER = logging.getLogger("minillm")
TOLD = "told by the process where it began"  # a note on an error, for which nothing is printed


class Terminal:
    """Standard error for as long as somebody reads it: a `2>&1 | head` that has seen enough ends no training."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> None:
        """Write what can still be written."""
        with suppress(BrokenPipeError):
            sys.stderr.write(text)

    def flush(self) -> None:
        """Flush what can still be flushed."""
        with suppress(BrokenPipeError):
            sys.stderr.flush()


TERMINAL = Terminal()


class TqdmHandler(logging.Handler):
    """Prints messages above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message to standard error."""
        prefix = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        tqdm.write(prefix + record.getMessage(), file=TERMINAL)


def show_messages(level: int = logging.INFO, main: bool = True) -> None:
    """Let the package's messages reach the terminal; a program that imports minillm decides for itself.

    Of many ranks the main one tells what all of them do; from the others only errors are heard.
    """
    LOGGER.handlers[:] = [TqdmHandler(level if main else logging.ERROR)]
    LOGGER.setLevel(level)
    LOGGER.propagate = False


def run_command(command: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Run a command and return its exit code: 0, or 1 after one line on standard error (`--debug`: the traceback)."""
    debug = "--debug" in argv
    show_messages(logging.DEBUG if debug else logging.INFO, main=os.environ.get("RANK", "0") == "0")
    try:
        return command([word for word in argv if word != "--debug"]) or 0
    except BrokenPipeError:
        # the reader of our output left (`| head`): not an error; and nothing more can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as error:
        if not is_told(error):
            print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        if is_told(error):
            return 1
        line = one_line(error)
        if debug or line is None:
            raise
        print("error:", ": ".join([*getattr(error, "__notes__", []), line]), file=sys.stderr)
        return 1


@contextmanager
def kept_in(path: Path) -> Iterator[None]:
    """While the block runs, messages also go to a file, each with its time; after an error, until the program ends."""
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    LOGGER.addHandler(handler)
    yield
    LOGGER.removeHandler(handler)
    handler.close()


def is_told(error: BaseException) -> bool:
    """Whether another process says it: of mistakes before the ranks meet, which are all the same, a machine's first."""
    notes = getattr(error, "__notes__", [])  # one that names the rank is said by that rank
    return TOLD in notes or (not notes and os.environ.get("LOCAL_RANK", "0") != "0" and one_line(error) is not None)


def one_line(error: BaseException) -> str | None:
    """What to tell a user of an error; None where it may be a bug, for which the traceback is needed."""
    if is_out_of_memory(error):
        return out_of_memory(error)
    if type(error).__module__.startswith(COMPILER):
        said = str(error).partition("\n")[0]
        return f"torch.compile fails here: {said}; leave train.compile false, or see what `minillm doctor` says of it"
    if isinstance(error, (ValueError, OSError, MemoryError, KeyboardInterrupt)):
        return str(error) or type(error).__name__
    return None
