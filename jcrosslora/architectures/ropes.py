"""Rotary positions: the frequencies of each rope type, in float64, and the rotation of heads."""

import math
from collections.abc import Mapping
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
    """Return cosine and sine, float32 (2, B, T, pairs), of positions int32 (B, T), for each rotary setting of a model.

    `lengths`, int32 (B, T) or (B, 1), are the lengths of the whole texts in tokens; None if the positions of a sequence
    reach the end of its text.
    """
    return tuple(_rotation(rope, positions, lengths) for rope in ropes)


def _rotation(rope: Rope, positions: jax.Array, lengths: jax.Array | None) -> jax.Array:
    frequencies = jnp.asarray(rope.frequencies, jnp.float32)
    if rope.long_frequencies is not None:
        assert rope.switch is not None
        # Per sequence; in transformers, the longest sequence of a batch decides for all.
        reach = jnp.max(positions, axis=-1, keepdims=True) + 1 if lengths is None else lengths
        long = reach[..., None] > rope.switch
        frequencies = jnp.where(long, jnp.asarray(rope.long_frequencies, jnp.float32), frequencies)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)]) * rope.amplitude


def growths(ropes: tuple[Rope, ...], positions: jax.Array) -> tuple[jax.Array, ...] | None:
    """Return the factor on queries, float32 (B, T), for each rotary setting; None if no setting has growth."""
    if all(rope.growth is None for rope in ropes):
        return None
    return tuple(_growth(rope.growth or Growth(0.0, 1), positions) for rope in ropes)


def _growth(growth: Growth, positions: jax.Array) -> jax.Array:
    return 1 + growth.beta * jnp.log1p(((positions + growth.first) // growth.length).astype(jnp.float32))


def apply_rope(x: jax.Array, rotation: jax.Array, *, interleaved: bool = False) -> jax.Array:
    """Rotate pairs of features of heads x (B, T, heads, D) by cosine and sine, float32 (2, B, T, pairs).

    Features from 2 * pairs on stay unchanged. A pair is features i and i + pairs, or 2i and 2i + 1 if `interleaved`.
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


# One function per rope type. Each takes the number of rotated features of a head and the settings of transformers by
# name, and ignores settings that its type does not use. A missing one raises KeyError.

Settings = Mapping[str, Any]
ORIGINAL, LONGEST = "original_max_position_embeddings", "max_position_embeddings"


def default(size: int, settings: Settings) -> Rope:
    """Rotate pair i by theta ** (-2 i / size) per position."""
    return Rope(_floats(_plain(size, settings["rope_theta"])))


def ntk(size: int, settings: Settings) -> Rope:
    """Raise the base by alpha ** (size / (size - 2)), which keeps fast frequencies and slows the others."""
    return Rope(_floats(_plain(size, settings["rope_theta"] * settings["alpha"] ** (size / (size - 2)))))


def linear(size: int, settings: Settings) -> Rope:
    """Divide all frequencies by `factor`."""
    return Rope(_floats(_plain(size, settings["rope_theta"]) / settings["factor"]))


def proportional(size: int, settings: Settings) -> Rope:
    """Divide all frequencies by `factor`, and rotate only the first `partial_rotary_factor` of the pairs."""
    share = settings.get("partial_rotary_factor", 1.0)
    if isinstance(share, bool) or not 0 <= share <= 1:
        raise ValueError(f"partial_rotary_factor is {share!r}, expected a number from 0 to 1")
    frequencies = _plain(size, settings["rope_theta"]) / settings.get("factor", 1.0)
    frequencies[int(share * size // 2) :] = 0.0
    return Rope(_floats(frequencies))


def llama3(size: int, settings: Settings) -> Rope:
    """Divide long wavelengths by `factor`, keep short ones, with a smooth transition in between."""
    return Rope(_floats(_plain(size, settings["rope_theta"]) / llama3_factors(size // 2, settings)))


def llama3_factors(pairs: int, settings: Settings) -> np.ndarray:
    """Return the divisor of each rotary frequency (`_compute_llama3_parameters` of transformers).

    A wavelength is long if it fits fewer than `low_freq_factor` times into the original length, and short if it fits
    more often than `high_freq_factor`.

    Returns:
        (pairs,) float64: 1 for short wavelengths, `factor` for long ones, a smooth transition in between.
    """
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    wavelength = 2 * np.pi * settings["rope_theta"] ** (np.arange(pairs) / max(pairs, 1))
    turns = settings[ORIGINAL] / wavelength
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / settings["factor"] + smooth)


def longrope(size: int, settings: Settings) -> Rope:
    """Divide each frequency by its own factor, with a second set of factors beyond the original length."""
    original, factor, amplitude = settings[ORIGINAL], settings.get("factor"), settings.get("attention_factor")
    if factor is None:
        factor = _positive(settings.get(LONGEST), LONGEST) / original
    if amplitude is None:
        amplitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    frequencies = _plain(size, settings["rope_theta"])
    given = (settings["short_factor"], settings["long_factor"])
    short, long = (_floats(frequencies / _divisors(one, frequencies.size)) for one in given)
    return Rope(short, long, int(original), float(amplitude))


def scaled_longrope(size: int, settings: Settings) -> Rope:
    """Apply `longrope` with a stated amplitude; raise ValueError if short and long sequences have different ones."""
    short, long = settings["short_mscale"], settings["long_mscale"]
    if short != long:
        raise ValueError(f"short_mscale is {short!r} and long_mscale {long!r}; supported are equal ones")
    return longrope(size, {**settings, "factor": 1.0, "attention_factor": _positive(short, "short_mscale")})


def yarn(size: int, settings: Settings) -> Rope:
    """Keep fast frequencies, divide slow ones by `factor`, with a ramp in between."""
    theta, factor, original = settings["rope_theta"], settings["factor"], _positive(settings[ORIGINAL], ORIGINAL)
    low, high = (
        size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (settings.get("beta_fast") or 32, settings.get("beta_slow") or 1)
    )
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high = high if high != low else high + 0.001
    divided = np.clip((np.arange(size // 2) - low) / (high - low), 0.0, 1.0)
    frequencies = _plain(size, theta) * (divided / factor + 1.0 - divided)
    amplitude, scale, scale_all = (settings.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if amplitude is None:
        both = scale and scale_all
        amplitude = _mscale(factor, scale) / _mscale(factor, scale_all) if both else _mscale(factor, 1.0)
    latent = _mscale(factor, scale_all) ** 2 if scale_all else 1.0
    return Rope(_floats(frequencies), amplitude=float(amplitude), latent_scale=latent)


def _plain(size: int, theta: float) -> np.ndarray:
    return 1.0 / theta ** (np.arange(0, size, 2) / size)


def _floats(frequencies: np.ndarray) -> tuple[float, ...]:
    return tuple(map(float, frequencies))


def _mscale(factor: float, weight: float | None) -> float:
    return 0.1 * (weight or 1.0) * math.log(factor) + 1.0 if factor > 1 else 1.0


def _divisors(given: list[float], count: int) -> np.ndarray:
    divisors = np.asarray(given, np.float64)
    if divisors.shape != (count,):
        raise ValueError(f"a list has {divisors.size} factors, expected {count}")
    return divisors


def _positive(value: Any, name: str) -> float:
    if not isinstance(value, int | float) or value <= 0:
        raise ValueError(f"{name} is {value!r}, expected a positive number")
    return value
