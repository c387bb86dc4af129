"""Rotary positions: the frequencies of each rope type, in float64, and the rotation of heads by them."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Growth(NamedTuple):
    """The factor on queries at position p, 1 + beta log(1 + floor((p + first) / length))."""

    beta: float
    length: int
    first: int = 0


@dataclass(frozen=True)
class Rope:
    """The rotation of queries and keys in one kind of layer, in the first `2 * len(frequencies)` features of a head.

    Attributes:
        frequencies: radians per position of each rotated pair.
        long_frequencies: frequencies of longrope for sequences longer than `switch`, else None.
        switch: largest length for which `frequencies` apply; None if there is only one set.
        amplitude: factor on cosine and sine.
        growth: of the queries with the position, or None.
        latent_scale: factor on the scores of latent attention.
    """

    frequencies: tuple[float, ...]
    long_frequencies: tuple[float, ...] | None = None
    switch: int | None = None
    amplitude: float = 1.0
    growth: Growth | None = None
    latent_scale: float = 1.0

    @property
    def turns(self) -> bool:
        """Whether any pair is rotated; in a layer without positions none is."""
        return any(self.frequencies)


def rotations(ropes: tuple[Rope, ...], positions: jax.Array, lengths: jax.Array | None = None) -> tuple[jax.Array, ...]:
    """Return cosine and sine, float32 (2, B, T, pairs), for each rotary setting.

    Args:
        ropes: the different rotary settings of a model.
        positions: int32 (B, T).
        lengths: int32 (B,), tokens of the whole text of each sequence; None if the positions reach its end.
    """
    return tuple(_rotation(rope, positions, lengths) for rope in ropes)


def _rotation(rope: Rope, positions: jax.Array, lengths: jax.Array | None) -> jax.Array:
    frequencies = jnp.asarray(rope.frequencies, jnp.float32)
    if rope.long_frequencies is not None:
        assert rope.switch is not None
        # Each sequence by itself. In a batch of transformers, the longest decides for all.
        reach = jnp.max(positions, axis=-1) + 1 if lengths is None else lengths
        long = reach[:, None, None] > rope.switch
        frequencies = jnp.where(long, jnp.asarray(rope.long_frequencies, jnp.float32), frequencies)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)]) * rope.amplitude


def growths(ropes: tuple[Rope, ...], positions: jax.Array) -> tuple[jax.Array, ...] | None:
    """Return the factor on the queries, float32 (B, T), for each rotary setting; None if no queries grow."""
    if all(rope.growth is None for rope in ropes):
        return None
    return tuple(_growth(rope.growth or Growth(0.0, 1), positions) for rope in ropes)


def _growth(growth: Growth, positions: jax.Array) -> jax.Array:
    return 1 + growth.beta * jnp.log1p(((positions + growth.first) // growth.length).astype(jnp.float32))


def apply_rope(x: jax.Array, rotation: jax.Array, *, interleaved: bool = False) -> jax.Array:
    """Rotate pairs of features of every head; features from 2 * pairs on stay unchanged.

    Args:
        x: (B, T, heads, D).
        rotation: float32 (2, B, T, pairs), cosine and sine.
        interleaved: whether the features of a pair are 2i and 2i + 1, instead of i and i + pairs.
    """
    pairs = rotation.shape[-1]
    cosine, sine = rotation[:, :, :, None, :]
    places = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    if not interleaved:
        places = slice(0, pairs), slice(pairs, 2 * pairs)
    first, second = (x[..., place].astype(jnp.float32) for place in places)
    turned = first * cosine - second * sine, second * cosine + first * sine
    if interleaved:
        rotated = jnp.stack(turned, axis=-1).reshape(*x.shape[:-1], 2 * pairs)
    else:
        rotated = jnp.concatenate(turned, axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), x[..., 2 * pairs :]], axis=-1)


# The types: each function takes the number of rotated features of a head and the settings of transformers by name, and
# ignores those that its type does not use.


def default(size: int, *, rope_theta: float, **_: Any) -> Rope:
    """Rotate pair i by theta ** (-2 i / size) per position."""
    return Rope(_floats(_plain(size, rope_theta)))


def ntk(size: int, *, rope_theta: float, alpha: float, **_: Any) -> Rope:
    """Raise the base by alpha ** (size / (size - 2)), which keeps fast frequencies and slows the others."""
    return Rope(_floats(_plain(size, rope_theta * alpha ** (size / (size - 2)))))


def linear(size: int, *, rope_theta: float, factor: float, **_: Any) -> Rope:
    """Divide all frequencies by `factor`."""
    return Rope(_floats(_plain(size, rope_theta) / factor))


def proportional(
    size: int, *, rope_theta: float, partial_rotary_factor: float = 1.0, factor: float = 1.0, **_: Any
) -> Rope:
    """Divide all frequencies by `factor`, and rotate only the first share of the pairs of the whole size."""
    if isinstance(partial_rotary_factor, bool) or not 0 <= partial_rotary_factor <= 1:
        msg = f"partial_rotary_factor is {partial_rotary_factor!r}, wanted a number from 0 to 1"
        raise ValueError(msg)
    frequencies = _plain(size, rope_theta) / factor
    frequencies[int(partial_rotary_factor * size // 2) :] = 0.0
    return Rope(_floats(frequencies))


def llama3(
    size: int,
    *,
    rope_theta: float,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
    **_: Any,
) -> Rope:
    """Divide long wavelengths by `factor`, keep short ones, with a smooth transition in between."""
    factors = llama3_factors(
        size // 2,
        rope_theta,
        factor=factor,
        low_freq_factor=low_freq_factor,
        high_freq_factor=high_freq_factor,
        original_max_position_embeddings=original_max_position_embeddings,
    )
    return Rope(_floats(_plain(size, rope_theta) / factors))


def llama3_factors(
    pairs: int,
    theta: float,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> np.ndarray:
    """Return the divisor of each rotary frequency (`_compute_llama3_parameters` of transformers).

    Args:
        pairs: number of frequencies, head_dim / 2.
        theta: base of the frequencies.
        factor: divisor of long wavelengths.
        low_freq_factor: a wavelength is long if it fits fewer times into the original length.
        high_freq_factor: a wavelength is short if it fits more often into the original length.
        original_max_position_embeddings: the length that the model was trained with first.

    Returns:
        (pairs,) float64: 1 for short wavelengths, `factor` for long ones, a smooth transition in between.
    """
    wavelength = 2 * np.pi * theta ** (np.arange(pairs) / max(pairs, 1))
    turns = original_max_position_embeddings / wavelength
    smooth = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def longrope(
    size: int,
    *,
    rope_theta: float,
    short_factor: list[float],
    long_factor: list[float],
    original_max_position_embeddings: int,
    max_position_embeddings: int | None = None,
    factor: float | None = None,
    attention_factor: float | None = None,
    **_: Any,
) -> Rope:
    """Divide each frequency by its own factor, of another set for sequences beyond the original length."""
    original = original_max_position_embeddings
    if factor is None:
        factor = _positive(max_position_embeddings, "max_position_embeddings") / original
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    frequencies = _plain(size, rope_theta)
    short, long = (_floats(frequencies / _divisors(given, frequencies.size)) for given in (short_factor, long_factor))
    return Rope(short, long, int(original), float(attention_factor))


def scaled_longrope(size: int, *, short_mscale: float, long_mscale: float, **settings: Any) -> Rope:
    """Do as `longrope`, with an amplitude that is stated for short and for long sequences, and must be the same."""
    if short_mscale != long_mscale:
        msg = f"short_mscale is {short_mscale!r} and long_mscale {long_mscale!r}; supported are equal ones"
        raise ValueError(msg)
    amplitude = _positive(short_mscale, "short_mscale")
    return longrope(size, factor=1.0, attention_factor=amplitude, **settings)


def yarn(
    size: int,
    *,
    rope_theta: float,
    factor: float,
    original_max_position_embeddings: int,
    attention_factor: float | None = None,
    beta_fast: float | None = None,
    beta_slow: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    truncate: bool = True,
    **_: Any,
) -> Rope:
    """Keep fast frequencies, divide slow ones by `factor`, with a ramp in between."""
    original = _positive(original_max_position_embeddings, "original_max_position_embeddings")
    low, high = (
        size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope_theta))
        for turns in (beta_fast or 32, beta_slow or 1)
    )
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high = high if high != low else high + 0.001
    divided = np.clip((np.arange(size // 2) - low) / (high - low), 0.0, 1.0)
    frequencies = _plain(size, rope_theta) * (divided / factor + 1.0 - divided)
    if attention_factor is None:
        both = mscale and mscale_all_dim
        attention_factor = _mscale(factor, mscale) / _mscale(factor, mscale_all_dim) if both else _mscale(factor, 1.0)
    latent = _mscale(factor, mscale_all_dim) ** 2 if mscale_all_dim else 1.0
    return Rope(_floats(frequencies), amplitude=float(attention_factor), latent_scale=latent)


def _plain(size: int, theta: float) -> np.ndarray:
    return 1.0 / theta ** (np.arange(0, size, 2) / size)


def _floats(frequencies: np.ndarray) -> tuple[float, ...]:
    return tuple(map(float, frequencies))


def _mscale(factor: float, weight: float | None) -> float:
    return 0.1 * (weight or 1.0) * math.log(factor) + 1.0 if factor > 1 else 1.0


def _divisors(given: list[float], count: int) -> np.ndarray:
    divisors = np.asarray(given, np.float64)
    if divisors.shape != (count,):
        msg = f"a list has {divisors.size} factors, wanted {count}"
        raise ValueError(msg)
    return divisors


def _positive(value: Any, name: str) -> float:
    if not isinstance(value, int | float) or value <= 0:
        msg = f"{name} is {value!r}, wanted a positive number"
        raise ValueError(msg)
    return value
