"""The scaling of rotary frequencies in Llama 3."""

import numpy as np


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
