"""Thresholds without labels: an adapter's is the score that 95% of its own samples exceed.

Each sample is compared with the adapter as if it were not one of its samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_MISSED = 0.05  # share of an adapter's own samples below its threshold
_ENOUGH = 8  # samples of an adapter, from which its own threshold is taken; of fewer, that of the whole shelf


def similarity_to_others(products: np.ndarray, squares: np.ndarray, total: np.ndarray | float) -> np.ndarray:
    """Compute the cosine of each of m vectors with the sum of the m - 1 others, from products alone.

    Args:
        products: (m,), of each vector x with the sum M of all.
        squares: (m,), x x.
        total: M M.
    """
    products, squares = np.asarray(products, np.float64), np.asarray(squares, np.float64)
    others = np.maximum(total - 2 * products + squares, 0)
    size = np.sqrt(squares * others)
    return np.divide(products - squares, size, out=np.zeros_like(size), where=size > 0)


def thresholds_of(similarities: Sequence[np.ndarray]) -> np.ndarray:
    """Choose the thresholds, float32 (N,).

    Args:
        similarities: of the own samples of each adapter; none of an adapter with fewer than two.

    Returns:
        Infinity, which accepts nothing, where neither an adapter nor the shelf has samples enough to tell.
    """
    pooled = np.concatenate([np.zeros(0), *similarities])
    common = np.quantile(pooled, _MISSED) if len(pooled) else np.inf
    found = [np.quantile(own, _MISSED) if len(own) >= _ENOUGH else common for own in similarities]
    return np.array(found, np.float32)
