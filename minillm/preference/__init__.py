"""Learning from preferences: the objective, what it compares the policy with, and what is said when it goes wrong."""

from minillm.preference.cache import cache_reference, open_reference
from minillm.preference.objective import Preference
from minillm.preference.reference import Frozen, Kept, Reference, WithoutAdapters, cached, target_logprobs
from minillm.preference.watch import FallingChosen

__all__ = [
    "FallingChosen",
    "Frozen",
    "Kept",
    "Preference",
    "Reference",
    "WithoutAdapters",
    "cache_reference",
    "cached",
    "open_reference",
    "target_logprobs",
]
