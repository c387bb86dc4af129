"""Host computations: numpy in threads, and leading eigenvectors of a symmetric matrix by LAPACK."""

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from scipy import LowLevelCallable
from scipy.linalg import cython_lapack  # pyright: ignore[reportAttributeAccessIssue]
from threadpoolctl import threadpool_limits

T = TypeVar("T")
U = TypeVar("U")


def map_on_host(function: Callable[[T], U], items: Sequence[T]) -> Iterator[U]:
    """Apply a numpy function to each item in a thread pool with one thread per core; yield results in order."""
    # Count only the cores that this process may use.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, min(cores, len(items)))
    # BLAS gets one thread per call: its own threads would compete with these for the cores.
    with threadpool_limits(limits=1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        yield from pool.map(function, items)


def stack_rows(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Stack arrays; if they are all rows of one array, in order, return that array instead of a copy."""
    whole = getattr(rows[0], "base", None)
    if isinstance(whole, np.ndarray) and whole.shape == (len(rows), *rows[0].shape):
        places = [(row.__array_interface__["data"], row.strides) for row in rows]
        if places == [(row.__array_interface__["data"], row.strides) for row in whole]:
            return whole
    return np.stack(rows)


def leading_eigenvectors(gram: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return all eigenvalues of a symmetric matrix, descending, and the first `count` eigenvectors.

    Tridiagonalisation and solve are in float64, so that close eigenvalues are resolved. Only the returned vectors are
    transformed back, in float32. numpy's `eigh` transforms all of them back in float64, which takes a third longer.

    Args:
        gram: (N, N) float64, finite; it is overwritten.

    Returns:
        (N,) float64, and (count, N) float32, one vector per row.

    Raises:
        LinAlgError: no convergence.
    """
    size = len(gram)
    values, beside, scales = np.empty(size), np.empty(size), np.zeros(size)  # the last scale is not written
    work, whole = np.empty(1 + 4 * size + size * size), np.empty(3 + 5 * size, np.intc)
    _call("dsytrd", b"L", size, gram, size, values, beside, scales, work, len(work))
    inside = np.empty((size, size))  # vectors in rows, by ascending eigenvalue
    _call("dstevd", b"V", size, values, beside, inside, size, work, len(work), whole, len(whole))
    vectors = np.ascontiguousarray(inside[::-1][:count], np.float32)
    reflectors, scales, work = gram.astype(np.float32), scales.astype(np.float32), np.empty(64 * size, np.float32)
    turned = b"L", b"L", b"N", size, count, reflectors, size, scales, vectors, size, work, len(work)
    _call("sormtr", *turned)
    return values[::-1], vectors


def _call(name: str, *given: bytes | int | np.ndarray) -> None:
    """Call a LAPACK routine with the GIL released, so that other threads keep running; integers are 32 bits."""
    state = ctypes.c_int()
    kept = [ctypes.byref(ctypes.c_int(one)) if isinstance(one, int) else one for one in given]
    _routine(name)(*(one.ctypes.data if isinstance(one, np.ndarray) else one for one in kept), ctypes.byref(state))
    if state.value:
        msg = f"LAPACK's {name} failed with {state.value}"
        raise np.linalg.LinAlgError(msg)


@lru_cache
def _routine(name: str) -> Any:
    """Look up a routine in scipy's LAPACK; scipy's own wrappers hold the GIL."""
    capsule = LowLevelCallable.from_cython(cython_lapack, name).function
    signature = ctypes.pythonapi.PyCapsule_GetName
    signature.restype, signature.argtypes = ctypes.c_char_p, [ctypes.py_object]
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    stated = signature(capsule)
    arguments = [ctypes.c_void_p] * (stated.count(b",") + 1)
    return ctypes.CFUNCTYPE(None, *arguments)(address(capsule, stated))
