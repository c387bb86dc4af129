"""The forward pass of the supported families in JAX: pure functions over stacked layer weights."""

from jcrosslora.decoder.adapters import (
    StackedAdapter,
    StackedFactors,
    join_stacked,
    stack_adapter,
    stack_adapters,
    unstack_adapter,
)
from jcrosslora.decoder.block import INPUT_SITES, LayerCapture
from jcrosslora.decoder.cache import Cache, init_cache
from jcrosslora.decoder.forward import CAPTURES, Output, forward, logits
from jcrosslora.decoder.generate import Generator
from jcrosslora.decoder.log_probs import target_log_probs
from jcrosslora.decoder.params import Params, fast_dtype, load_params
from jcrosslora.decoder.rope_settings import Rope
from jcrosslora.decoder.settings import DecoderSettings, settings_of

__all__ = [
    "CAPTURES",
    "INPUT_SITES",
    "Cache",
    "DecoderSettings",
    "Generator",
    "LayerCapture",
    "Output",
    "Params",
    "Rope",
    "StackedAdapter",
    "StackedFactors",
    "fast_dtype",
    "forward",
    "init_cache",
    "join_stacked",
    "load_params",
    "logits",
    "settings_of",
    "stack_adapter",
    "stack_adapters",
    "target_log_probs",
    "unstack_adapter",
]
