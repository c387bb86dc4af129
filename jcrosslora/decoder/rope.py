"""Rotary position embedding: cosines and sines of all positions, and their use on queries and keys."""

import jax
import jax.numpy as jnp

from jcrosslora.decoder.rope_settings import Rope


def rotations(ropes: tuple[Rope, ...], positions: jax.Array, lengths: jax.Array | None = None) -> tuple[jax.Array, ...]:
    """For each rope float32 (2, B, T, pairs): cosine and sine.

    Args:
        ropes: the different rotary settings of a model.
        positions: int32 (B, T).
        lengths: int32 (B,), tokens of each whole text of which these are positions, where they are only a part of it;
            None takes the longest of the batch for all.
    """
    return tuple(_rotation(rope, positions, lengths) for rope in ropes)


def _rotation(rope: Rope, positions: jax.Array, lengths: jax.Array | None) -> jax.Array:
    frequencies = jnp.asarray(rope.frequencies, jnp.float32)
    if rope.long_frequencies is not None:
        assert rope.switch is not None
        # Without lengths one set for the whole batch, chosen by its longest sequence, as transformers does.
        reach = jnp.max(positions) + 1 if lengths is None else lengths[:, None, None]
        frequencies = jnp.where(reach > rope.switch, jnp.asarray(rope.long_frequencies, jnp.float32), frequencies)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)]) * rope.amplitude


def rotate(x: jax.Array, rotation: jax.Array) -> jax.Array:
    """Turn the feature pairs (i, i + pairs) of every head; features beyond 2 * pairs pass.

    Args:
        x: (B, T, heads, D).
        rotation: float32 (2, B, T, pairs).
    """
    pairs = rotation.shape[-1]
    cosine, sine = rotation[:, :, :, None, :]
    first, second = (part.astype(jnp.float32) for part in (x[..., :pairs], x[..., pairs : 2 * pairs]))
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), x[..., 2 * pairs :]], axis=-1)
