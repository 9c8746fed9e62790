"""What a verb is: a row of a table. Its options are a dataclass, its function calls the library."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from minillm.config import Layer


class Verb(NamedTuple):
    """A command: what it does, its options, and the options that may be given as plain words, in order."""

    run: Callable
    options: type
    words: Sequence[str]
    help: str
    reads_config: bool = False  # whether it takes a config file, and a model preset, as the scripts do
    defaults: Callable[[Any], Layer] | None = None  # of options as they were given: what holds where nothing was
