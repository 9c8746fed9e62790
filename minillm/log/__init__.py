"""What a run says: messages, rows of metrics, curves; and who is told of them."""

from minillm.log.config import LogConfig
from minillm.log.curves import curve, plot_curves
from minillm.log.memory import OutOfMemory, memory_explained
from minillm.log.messages import LOGGER, TOLD, kept_in, one_line, run_command, show_messages
from minillm.log.rows import Clock, RunLog, Tracker, read_metrics
from minillm.log.trackers import make_trackers

__all__ = [
    "LOGGER",
    "TOLD",
    "Clock",
    "LogConfig",
    "OutOfMemory",
    "RunLog",
    "Tracker",
    "curve",
    "kept_in",
    "make_trackers",
    "memory_explained",
    "one_line",
    "plot_curves",
    "read_metrics",
    "run_command",
    "show_messages",
]
