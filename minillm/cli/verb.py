"""What a verb is: a row of a table. Its options are a dataclass, its function calls the library."""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Verb(NamedTuple):
    """A command: what it does, its options, and the options that may be given as plain words, in order."""

    run: Callable
    options: type
    words: Sequence[str]
    help: str
    reads_config: bool = False  # whether it takes a config file, and a model preset, as the scripts do
