"""A training run before it is begun: what it takes on so many GPUs, and a layout of them that suits it."""

from minillm.simulate.config import Plan
from minillm.simulate.report import report, simulate

__all__ = ["Plan", "report", "simulate"]
