"""Methods that take the coordinates of the source for those of the target: copy, pad-truncate, index-interp."""

import jax.numpy as jnp

from jcrosslora.evidence.records import Evidence, Fit
from jcrosslora.linalg import LinearMap, select


def fit_padded(evidence: Evidence) -> Fit:
    """Rectangular identities: rows and columns beyond the smaller side are cut off or left zero.

    For equal shapes this is the plain copy. For unequal ones it is what a public development tree with the seed
    paper's models emits (github.com/ootyzzz/PAW), and therefore a baseline that has to be named.
    """
    (o_src, i_src), (o_tgt, i_tgt) = evidence.src.weight.shape, evidence.tgt.weight.shape
    return Fit(((_padded(o_src, o_tgt), _padded(i_src, i_tgt)),))


def fit_resampled(evidence: Evidence) -> Fit:
    """Nearest-index resampling of rows and columns, the interpolation baseline of the same tree."""
    (o_src, i_src), (o_tgt, i_tgt) = evidence.src.weight.shape, evidence.tgt.weight.shape
    return Fit(((_resampled(o_src, o_tgt), _resampled(i_src, i_tgt)),))


def _padded(size_src: int, size_tgt: int) -> LinearMap:
    place = jnp.arange(size_tgt)
    return select(jnp.minimum(place, size_src - 1), (place < size_src).astype(jnp.float32), size_src)


def _resampled(size_src: int, size_tgt: int) -> LinearMap:
    # floor(i (m - 1) / (n - 1)) in integers: evenly spaced from the first index to the last.
    place = jnp.arange(size_tgt) * (size_src - 1) // max(size_tgt - 1, 1)
    return select(place, jnp.ones(size_tgt), size_src)


def fit_nothing(evidence: Evidence) -> Fit:
    """Maps to zero: for methods that fit an update to what both bases do, and carry nothing over."""
    (o_src, i_src), (o_tgt, i_tgt) = evidence.src.weight.shape, evidence.tgt.weight.shape
    return Fit(((_nothing(o_src, o_tgt), _nothing(i_src, i_tgt)),))


def _nothing(size_src: int, size_tgt: int) -> LinearMap:
    return select(jnp.zeros(size_tgt, jnp.int32), jnp.zeros(size_tgt), size_src)
