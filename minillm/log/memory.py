"""A lack of memory, told in one line."""

import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# What torch's allocators say of each device. By their words, because a class of torch's own, which only some of them
# raise, would cost its import here.
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory|ALLOC_FAILED")


class OutOfMemory(MemoryError):
    """A lack of memory whose message already says what would help."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was wanting."""
    return isinstance(error, MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


def out_of_memory(error: BaseException, advice: str | None = None) -> str:
    """One line for the error of an allocator, which may have many, and what would help."""
    if isinstance(error, OutOfMemory):
        return str(error)
    amount = re.search(r"allocate ([\d.]+ \w+)", str(error))
    advice = advice or (
        "to train in less, lower train.micro_batch_size, set train.activation_checkpointing to full, "
        "or choose a smaller model"
    )
    return f"out of memory{f' ({amount[1]} more were needed)' if amount else ''}; {advice}"


@contextmanager
def memory_explained(advice: Callable[[], str] | None) -> Iterator[None]:
    """Turn a lack of memory inside the block into OutOfMemory with that advice, which is asked for only then."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if advice is None or isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors that filled the memory
        raise OutOfMemory(out_of_memory(error, advice())) from error
