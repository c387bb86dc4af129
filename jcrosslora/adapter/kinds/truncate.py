"""An update at the lowest rank that holds it, or at a given rank.

In float64 on the host: if an update is the difference of two nearly equal ones (PiSSA), float32 keeps few digits of
the difference.
"""

import numpy as np

from jcrosslora.adapter.factors import LoRAFactors
from jcrosslora.adapter.kinds.kind import Update


def truncate_product(b: np.ndarray, a: np.ndarray, rank: int | None = None) -> Update:
    """Factor B @ A anew without directions that are rounding of float32, truncated optimally to `rank`.

    Singular values are split evenly over the two factors.

    Args:
        b: (O, K).
        a: (K, I).
        rank: at most this rank; None truncates nothing.

    Returns:
        Factors of float32 with scale 1 and at least rank 1, and what truncation loses.
    """
    u, s, vt = product_svd(b, a)
    # Relative to the factors and not to the product: if these nearly cancel, their difference is rounding.
    noise = np.finfo(np.float32).eps * np.linalg.norm(b) * np.linalg.norm(a)
    full = max(1, int(np.count_nonzero(s > noise)))
    kept = full if rank is None else min(rank, full)
    root = np.sqrt(s[:kept])
    factors = LoRAFactors(
        a=np.ascontiguousarray(root[:, None] * vt[:kept], np.float32),
        b=np.ascontiguousarray(u[:, :kept] * root, np.float32),
    )
    return Update(factors, float(np.sum(s[kept:full] ** 2)))


def truncate_update(update: Update, rank: int | None) -> Update:
    """Truncate an update to a rank and add the loss to what it had lost; return it as it is if its rank is no higher.

    Args:
        update: of one module.
        rank: at most this rank; None truncates nothing.
    """
    factors = update.factors
    if rank is None or factors.rank <= rank:
        return update
    a, b = (np.asarray(matrix).astype(np.float64) for matrix in (factors.a, factors.b))
    less = truncate_product(factors.scale * b, a, rank)
    return Update(less.factors, update.lost + less.lost)


def product_svd(b: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the SVD of b @ a in float64 by QR of both factors and the SVD of the small core.

    Args:
        b: (O, K).
        a: (K, I).

    Returns:
        u (O, M), s (M,) descending and vt (M, I), with M the smallest of O, K and I.
    """
    q_b, r_b = np.linalg.qr(b.astype(np.float64))
    q_a, r_a = np.linalg.qr(a.astype(np.float64).T)
    u, s, vt = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u, s, vt @ q_a.T


def full_rank_factors(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Write a matrix (O, I) of full rank as b @ a, one of them the identity of its short side."""
    rows, columns = matrix.shape
    one = np.eye(min(rows, columns), dtype=matrix.dtype)
    return (matrix, one) if columns <= rows else (one, matrix)
