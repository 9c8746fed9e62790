"""Memory of training on each rank, before it is begun: how much it takes, and which settings fit."""

from minillm.memory.advice import alternatives, memory_advice, usable
from minillm.memory.estimate import GIB, Memory, Setting, estimate, number_bytes
from minillm.memory.held import FP32, Adapt, held_parameters, on_meta

__all__ = [
    "FP32",
    "GIB",
    "Adapt",
    "Memory",
    "Setting",
    "alternatives",
    "estimate",
    "held_parameters",
    "memory_advice",
    "number_bytes",
    "on_meta",
    "usable",
]
