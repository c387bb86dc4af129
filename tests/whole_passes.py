"""Predictions of a base on a whole text in one pass: the plain way that faster ones are compared with."""

import jax
import numpy as np

from jcrosslora.decoder import Model, forward, logits

_MULTIPLE = 64  # texts are padded to it, so that those of a test are one program


@jax.jit
def _scores(model, tokens, mask, adapter):
    return logits(model, forward(model.with_adapter(adapter), tokens, mask=mask).hidden[0])


def scores(model: Model, ids, adapter=None) -> np.ndarray:
    """Logits behind each token of a text, float64 (T, V)."""
    count = len(ids)
    width = -(-count // _MULTIPLE) * _MULTIPLE
    tokens = np.pad(np.asarray(ids, np.int32), (0, width - count))
    found = _scores(model, tokens[None], (np.arange(width) < count)[None], adapter)
    return np.asarray(found, np.float64)[:count]


def log_probs(model: Model, ids, adapter=None) -> np.ndarray:
    """Log-probabilities behind each token of a text, float64 (T, V)."""
    found = scores(model, ids, adapter)
    return found - np.logaddexp.reduce(found, axis=-1, keepdims=True)
