"""The Gram kernel on a CPU: LAPACK in float64 through numpy, one matrix per thread.

Compiled by XLA, a CPU takes the matrices of a stack one by one, because LAPACK calls in several of XLA's threads can
deadlock. numpy releases the interpreter lock in LAPACK, so Python threads use all cores, and nothing is compiled. On a
CPU float64 costs less than redoing the matrices for which float32 is too coarse.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from threadpoolctl import threadpool_limits

from jcrosslora.linalg.svd.record import TruncatedSVD
from jcrosslora.linalg.svd.refine import judge_refined


@dataclass(frozen=True)
class _Triplets:
    """Leading triplets of W (O, I).

    Attributes:
        u: (O, K), float32.
        v: (I, K), float32.
        s: (S,), all singular values, descending.
        residual: (K,), as in `truncate`.
        total: ||W||_F^2.
    """

    u: np.ndarray
    v: np.ndarray
    s: np.ndarray
    residual: np.ndarray
    total: np.ndarray


def gram_on_host(rows: Sequence[np.ndarray], rank: int, *, vectors: bool = True) -> list[TruncatedSVD]:
    """Compute the leading R triplets of each matrix from the Gram matrix of its short side, in float64.

    Args:
        rows: float32 matrices (O, I) of one shape.
        rank: R, at most min(O, I).
        vectors: as in the kernels.

    Returns:
        The decompositions in the order of `rows`, as numpy arrays in float32. Vectors are accurate to float32 unless
        their neighbours in the spectrum are too close for float64; singular values below 1e-7 of the largest are lost.
        `error` shows both, and is NaN if W is not finite.
    """
    threads = min(_worker_count(), len(rows))
    # BLAS gets one thread per call: its own threads would compete with these for the cores.
    with threadpool_limits(limits=1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        solved = pool.map(partial(_solve, columns=rank), rows)
        return [_judged(found, (w.shape[0], w.shape[1]), rank, vectors) for found, w in zip(solved, rows, strict=True)]


def _worker_count() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _solve(w: np.ndarray, *, columns: int) -> _Triplets:
    upright = w.shape[0] >= w.shape[1]
    single = w if upright else w.T
    tall = single.astype(np.float64)  # holds the squares of any float32
    gram = tall.T @ tall
    squares, short = _eigh(gram)
    s = np.sqrt(np.maximum(squares, 0))
    # The eigenvectors resolve close neighbours, so float32 is enough from here on.
    short, kept = np.ascontiguousarray(short[:, :columns], np.float32), s[:columns]
    long = single @ short
    long /= np.where(kept > 0, kept, 1).astype(np.float32)
    # The residual of the vectors as stored; W v = s u holds by construction.
    back = single.T @ long
    residual = np.linalg.norm(back - short * kept.astype(np.float32), axis=0) / 2**0.5
    u, v = (long, short) if upright else (short, long)
    return _Triplets(u, v, s, residual.astype(np.float64), np.trace(gram))


def _eigh(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return eigenvalues, descending, and eigenvectors; NaN, and with it a NaN `error`, if they cannot be had."""
    try:
        if np.isfinite(gram).all():
            squares, vectors = np.linalg.eigh(gram)
            return squares[::-1], vectors[:, ::-1]
    except np.linalg.LinAlgError:
        pass  # no convergence: `decompose` tries a stronger kernel
    return np.full(len(gram), np.nan), np.full_like(gram, np.nan)


def _judged(found: _Triplets, shape: tuple[int, int], rank: int, vectors: bool) -> TruncatedSVD:
    with np.errstate(all="ignore"):  # `error` is NaN for values that are not finite
        keep, fields = judge_refined(found.s, found.residual, found.total, shape, rank, vectors)  # type: ignore[arg-type]
    u, v = (x if keep.all() else np.where(keep, x, np.float32(0)) for x in (found.u, found.v))
    return TruncatedSVD(u=u, v=v, **fields)  # type: ignore[arg-type]
