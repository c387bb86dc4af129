"""Maps that identify the coordinates of the source with those of the target."""

import jax.numpy as jnp

from jcrosslora.linalg import LinearMap, select
from jcrosslora.maps.evidence.records import Evidence, Maps


def padded_maps(evidence: Evidence) -> Maps:
    """Return rectangular identities, which cut off surplus rows and columns or fill missing ones with zeros.

    For equal shapes they copy the update.
    """
    (o_src, i_src), (o_tgt, i_tgt) = evidence.src.weight.shape, evidence.tgt.weight.shape
    return Maps(((_padded(o_src, o_tgt), _padded(i_src, i_tgt)),))


def resampled_maps(evidence: Evidence) -> Maps:
    """Return maps that resample rows and columns at the nearest index."""
    (o_src, i_src), (o_tgt, i_tgt) = evidence.src.weight.shape, evidence.tgt.weight.shape
    return Maps(((_resampled(o_src, o_tgt), _resampled(i_src, i_tgt)),))


def _padded(size_src: int, size_tgt: int) -> LinearMap:
    place = jnp.arange(size_tgt)
    return select(jnp.minimum(place, size_src - 1), (place < size_src).astype(jnp.float32), size_src)


def _resampled(size_src: int, size_tgt: int) -> LinearMap:
    # floor(i (m - 1) / (n - 1)) in integers: evenly spaced from the first index to the last.
    place = jnp.arange(size_tgt) * (size_src - 1) // max(size_tgt - 1, 1)
    return select(place, jnp.ones(size_tgt), size_src)
