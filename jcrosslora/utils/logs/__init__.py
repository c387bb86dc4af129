"""Where the figures of a run go as it runs: Weights & Biases, Trackio, TensorBoard, or a log of the user's own."""

from jcrosslora.utils.logs.active import log_to, record
from jcrosslora.utils.logs.log import Log
from jcrosslora.utils.logs.registry import LogName, find_log

__all__ = ["Log", "LogName", "find_log", "log_to", "record"]
