"""Weights stored as several tensors, small integers or FP8 with scales: which are read, and how they become float32."""

from jcrosslora.checkpoint.quantised.registry import FORMATS, check_quantization
from jcrosslora.checkpoint.quantised.store import QuantisedStore, with_weights

__all__ = ["FORMATS", "QuantisedStore", "check_quantization", "with_weights"]
