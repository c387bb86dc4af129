"""Formats of quantised weights, small integers or FP8 with scales, and their dequantisation to float32."""

from jcrosslora.checkpoint.quantised.registry import FORMATS, QuantisedStore, check_quantization, dequantised

__all__ = ["FORMATS", "QuantisedStore", "check_quantization", "dequantised"]
