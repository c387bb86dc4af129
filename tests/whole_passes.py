"""Predictions of a base on a whole text in one pass: the plain way that faster ones are compared with."""

from functools import partial

import jax
import numpy as np

from jcrosslora.decoder import DecoderSettings, Params, forward, logits

_MULTIPLE = 64  # texts are padded to it, so that those of a test are one program


@partial(jax.jit, static_argnums=0)
def _scores(settings, params, tokens, mask, adapter):
    return logits(settings, params, forward(settings, params, tokens, mask=mask, adapter=adapter).hidden[0])


def scores(settings: DecoderSettings, params: Params, ids, adapter=None) -> np.ndarray:
    """Logits behind each token of a text, float64 (T, V)."""
    count = len(ids)
    width = -(-count // _MULTIPLE) * _MULTIPLE
    tokens = np.pad(np.asarray(ids, np.int32), (0, width - count))
    found = _scores(settings, params, tokens[None], (np.arange(width) < count)[None], adapter)
    return np.asarray(found, np.float64)[:count]


def log_probs(settings: DecoderSettings, params: Params, ids, adapter=None) -> np.ndarray:
    """Log-probabilities behind each token of a text, float64 (T, V)."""
    found = scores(settings, params, ids, adapter)
    return found - np.logaddexp.reduce(found, axis=-1, keepdims=True)
