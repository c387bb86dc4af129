"""Rotary position embedding: cosines and sines of positions, and their application to queries and keys."""

import jax
import jax.numpy as jnp

from jcrosslora.decoder.rope_scaling import Rope


def rotations(ropes: tuple[Rope, ...], positions: jax.Array, lengths: jax.Array | None = None) -> tuple[jax.Array, ...]:
    """Return cosine and sine, float32 (2, B, T, pairs), for each rotary setting.

    Args:
        ropes: the different rotary settings of a model.
        positions: int32 (B, T).
        lengths: int32 (B,), tokens of the whole text of each sequence, if the positions are only a part of it; None
            takes the longest of the batch for all.
    """
    return tuple(_rotation(rope, positions, lengths) for rope in ropes)


def _rotation(rope: Rope, positions: jax.Array, lengths: jax.Array | None) -> jax.Array:
    frequencies = jnp.asarray(rope.frequencies, jnp.float32)
    if rope.long_frequencies is not None:
        assert rope.switch is not None
        # Without lengths, the longest sequence decides for the whole batch, as in transformers.
        reach = jnp.max(positions) + 1 if lengths is None else lengths[:, None, None]
        frequencies = jnp.where(reach > rope.switch, jnp.asarray(rope.long_frequencies, jnp.float32), frequencies)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)]) * rope.amplitude


def apply_rope(x: jax.Array, rotation: jax.Array) -> jax.Array:
    """Rotate the feature pairs (i, i + pairs) of every head; features from 2 * pairs on stay unchanged.

    Args:
        x: (B, T, heads, D).
        rotation: float32 (2, B, T, pairs), cosine and sine.
    """
    pairs = rotation.shape[-1]
    cosine, sine = rotation[:, :, :, None, :]
    first, second = (part.astype(jnp.float32) for part in (x[..., :pairs], x[..., pairs : 2 * pairs]))
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), x[..., 2 * pairs :]], axis=-1)
