"""Forward pass, sampling and likelihoods of the supported families in JAX, as pure functions over stacked weights."""

from jcrosslora.decoder.adapters import (
    StackedAdapter,
    StackedFactors,
    join_stacked,
    stack_adapter,
    stack_adapters,
    unstack_adapter,
)
from jcrosslora.decoder.block import INPUT_SITES, LayerCapture
from jcrosslora.decoder.forward import CAPTURES, Output, forward, logits
from jcrosslora.decoder.generate import Sampled, sample, step
from jcrosslora.decoder.kv_cache import KVCache, init_cache
from jcrosslora.decoder.log_probs import target_log_probs
from jcrosslora.decoder.params import Params, fast_dtype, load_params
from jcrosslora.decoder.rope_settings import Rope
from jcrosslora.decoder.settings import DecoderSettings, settings_of

__all__ = [
    "CAPTURES",
    "INPUT_SITES",
    "DecoderSettings",
    "KVCache",
    "LayerCapture",
    "Output",
    "Params",
    "Rope",
    "Sampled",
    "StackedAdapter",
    "StackedFactors",
    "fast_dtype",
    "forward",
    "init_cache",
    "join_stacked",
    "load_params",
    "logits",
    "sample",
    "settings_of",
    "stack_adapter",
    "stack_adapters",
    "step",
    "target_log_probs",
    "unstack_adapter",
]
