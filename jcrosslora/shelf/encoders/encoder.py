"""The interface of encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from jcrosslora.text import Prompt


class Encoder(Protocol):
    """Turns prompts into vectors."""

    def encode(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Return float32 (P, D), each row with a root mean square of 1. Messages are read without a template."""
        ...


def unit_rms(vectors: np.ndarray) -> np.ndarray:
    """Scale rows (P, D) to a root mean square of 1, as float32; rows of zeros stay."""
    vectors = np.asarray(vectors, np.float32)
    size = np.sqrt(np.mean(vectors**2, axis=1, keepdims=True))
    return vectors / np.where(size > 0, size, np.float32(1))
