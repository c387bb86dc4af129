"""The Gram kernel for a stack on a CPU: LAPACK in float64 through numpy, one matrix a thread.

What XLA compiles takes the matrices of a stack one after the other on a CPU, because LAPACK in several of its threads
can wait for itself for ever. numpy lets go of the interpreter inside LAPACK, so that threads of Python share the cores
evenly, and nothing has to be compiled. On a CPU float64 costs less than what float32 leaves to be done again.
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
        u: (O, K), v: (I, K), float32.
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
    """The leading R triplets of every matrix through the eigenvectors of the short side's Gram matrix, in float64.

    Args:
        rows: (O, I) each, float32, of one shape.
        rank: R, at most min(O, I).
        vectors: as in the kernels.

    Returns:
        The decompositions in the order of `rows`, of numpy arrays in float32. As much of a vector as float32 can hold
        is right unless neighbours in the spectrum are nearer than float64 tells apart; singular values below 1e-7 of
        the largest are lost. `error` says so, and is NaN where W is not finite.
    """
    threads = min(worker_count(), len(rows))
    # One thread for each call of BLAS: threads of its own under ours take the cores from each other.
    with threadpool_limits(limits=1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        solved = pool.map(partial(_solve, columns=rank), rows)
        return [_judged(found, (w.shape[0], w.shape[1]), rank, vectors) for found, w in zip(solved, rows, strict=True)]


def worker_count() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _solve(w: np.ndarray, *, columns: int) -> _Triplets:
    upright = w.shape[0] >= w.shape[1]
    single = w if upright else w.T
    tall = single.astype(np.float64)  # in which the squares of any float32 have room
    gram = tall.T @ tall
    squares, short = _eigh(gram)
    s = np.sqrt(np.maximum(squares, 0))
    # Neighbours are told apart by now, and float32 does for what is left.
    short, kept = np.ascontiguousarray(short[:, :columns], np.float32), s[:columns]
    long = single @ short
    long /= np.where(kept > 0, kept, 1).astype(np.float32)
    # Of the vectors as they are stored; W v = s u holds.
    back = single.T @ long
    residual = np.linalg.norm(back - short * kept.astype(np.float32), axis=0) / 2**0.5
    u, v = (long, short) if upright else (short, long)
    return _Triplets(u, v, s, residual.astype(np.float64), np.trace(gram))


def _eigh(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, descending, and eigenvectors; NaN where there are none, which `error` then says."""
    try:
        if np.isfinite(gram).all():
            squares, vectors = np.linalg.eigh(gram)
            return squares[::-1], vectors[:, ::-1]
    except np.linalg.LinAlgError:
        pass  # no convergence: a stronger kernel is next
    return np.full(len(gram), np.nan), np.full_like(gram, np.nan)


def _judged(found: _Triplets, shape: tuple[int, int], rank: int, vectors: bool) -> TruncatedSVD:
    with np.errstate(all="ignore"):  # values that are not finite say so themselves
        keep, fields = judge_refined(found.s, found.residual, found.total, shape, rank, vectors)  # type: ignore[arg-type]
    u, v = (x if keep.all() else np.where(keep, x, np.float32(0)) for x in (found.u, found.v))
    return TruncatedSVD(u=u, v=v, **fields)  # type: ignore[arg-type]
