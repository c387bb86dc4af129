"""An update at the lowest rank that holds it, or at one that is wanted.

In float64 on the host: where a kind is the difference of two nearly equal updates (PiSSA), float32 keeps few digits of
what remains.
"""

import numpy as np

from jcrosslora.adapter.kinds.record import Update
from jcrosslora.adapter.records import LoRAFactors


def trimmed(b: np.ndarray, a: np.ndarray, rank: int | None = None) -> Update:
    """B @ a without the directions that are rounding of float32, and cut, optimally, to `rank`.

    Singular values are split evenly over the two factors.

    Args:
        b: (O, K).
        a: (K, I).
        rank: at most this rank; None cuts nothing.

    Returns:
        Factors of float32 with scale 1 and at least rank 1, and what the cut loses.
    """
    u, s, vt = product_svd(b, a)
    # Of the factors and not of the product: where these cancel, what is left of them is rounding.
    noise = np.finfo(np.float32).eps * np.linalg.norm(b) * np.linalg.norm(a)
    full = max(1, int(np.count_nonzero(s > noise)))
    kept = full if rank is None else min(rank, full)
    root = np.sqrt(s[:kept])
    factors = LoRAFactors(
        a=np.ascontiguousarray(root[:, None] * vt[:kept], np.float32),
        b=np.ascontiguousarray(u[:, :kept] * root, np.float32),
    )
    return Update(factors, float(np.sum(s[kept:full] ** 2)))


def product_svd(b: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The SVD of b @ a in float64: QR of both factors, then the SVD of the small core; the product is not formed.

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


def undivided(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A matrix (O, I) of full rank as a product b @ a, one of which is the identity of its short side."""
    rows, columns = matrix.shape
    return (
        (matrix, np.eye(columns, dtype=matrix.dtype)) if columns <= rows else (np.eye(rows, dtype=matrix.dtype), matrix)
    )


def cut(update: Update, rank: int | None) -> Update:
    """An update at no more than a rank, with what that loses added to what it had lost; itself where it is so already.

    Args:
        update: of one module.
        rank: at most this rank; None cuts nothing.
    """
    factors = update.factors
    if rank is None or factors.rank <= rank:
        return update
    a, b = (np.asarray(matrix).astype(np.float64) for matrix in (factors.a, factors.b))
    less = trimmed(factors.scale * b, a, rank)
    return Update(less.factors, update.lost + less.lost)
