"""Which kernel for which matrix, and a stack of matrices decomposed as exactly as was asked for."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jcrosslora.linalg.stacked import mesh_of, over_layers
from jcrosslora.linalg.svd.full import full_svd
from jcrosslora.linalg.svd.gram import gram_svd
from jcrosslora.linalg.svd.host import gram_on_host
from jcrosslora.linalg.svd.krylov import DEPTH, krylov_columns, krylov_svd
from jcrosslora.linalg.svd.record import TruncatedSVD
from jcrosslora.linalg.svd.refine import refine
from jcrosslora.linalg.svd.subspace import subspace_svd

Kernel = Literal["auto", "full", "gram", "krylov", "subspace"]

_DEEPER = 6
KERNELS: dict[str, Callable[..., TruncatedSVD]] = {
    "full": full_svd,
    "gram": gram_svd,
    "krylov": krylov_svd,
    "krylov, deeper": partial(krylov_svd, depth=_DEEPER),
    "subspace": subspace_svd,
}
# What a matrix that missed the tolerance is redone by, one after the other.
_STRONGER = {
    "subspace": ("krylov, deeper", "gram", "full"),
    "krylov": ("krylov, deeper", "gram", "full"),
    "gram": ("full",),
    "full": (),
}
# Triplets beyond the rank that `refine` may use; 32 neighbours apart, real spectra have fallen by several per cent.
GUARD = 32
# Short sides up to this are eigensolved whole on a CPU.
_GRAM_UP_TO = 1536
# Largest share of the short side that the subspace of `krylov` may take.
_NARROW = 2 / 3


def choose_kernel(shape: tuple[int, int], rank: int, platform: str) -> Kernel:
    """The kernel that is fastest for matrices of one shape.

    `krylov` where its subspace is at most two thirds as wide as the short side, on a CPU only above a short side of
    1,536; `gram` elsewhere. `full` is never first: on a GPU and a TPU an SVD costs many times an eigensolve, and on a
    CPU it is needed only where nothing else resolves a matrix. Nothing has been timed on a GPU or a TPU.

    Args:
        shape: (O, I).
        rank: R.
        platform: as `jax.default_backend()` names it.
    """
    short = min(shape)
    narrow = krylov_columns(rank, guard=GUARD) <= _NARROW * short
    return "krylov" if narrow and (platform != "cpu" or short > _GRAM_UP_TO) else "gram"


def decompose(
    stack: jax.Array,
    rank: int,
    *,
    vectors: bool = True,
    tolerance: float = 1e-2,
    kernel: Kernel = "auto",
) -> tuple[TruncatedSVD, tuple[str, ...]]:
    """Truncated SVD of a stack of matrices, each as exact as asked for or as can be had.

    A matrix whose `error` is above the tolerance is refined in float64; if that is not enough it is redone, and
    refined, by one stronger kernel after the other, the last of them the full SVD. Where even that misses the tolerance
    (equal singular values have no single vectors), the best is returned, and its `error` says so.

    Args:
        stack: (L, O, I), float32; may be sharded over L.
        rank: R, at most min(O, I).
        vectors: whether single vectors matter, or only the subspace that they span.
        tolerance: largest `error` accepted.
        kernel: which kernel to begin with; "auto" is `choose_kernel`.

    Returns:
        The decomposition with a leading axis L on every field, and for each matrix what its result is from; see
        `describe_kernels`.
    """
    chex.assert_rank(stack, 3)
    chex.assert_scalar_in(rank, 1, min(stack.shape[1:]))
    _, rows, columns = stack.shape
    if kernel == "auto":
        kernel = choose_kernel((rows, columns), rank, jax.default_backend())
    if kernel == "krylov" and not _fits(kernel, (rows, columns), rank):
        kernel = "gram"
    # On a CPU in threads. A stack that other processes hold a part of stays where it is.
    in_threads = kernel == "gram" and jax.default_backend() == "cpu" and stack.is_fully_addressable
    decompose_all = _decompose_in_threads if in_threads else _decompose_stack
    return decompose_all(stack, kernel, rank, vectors, tolerance)


def _decompose_stack(
    stack: jax.Array, kernel: str, rank: int, vectors: bool, tolerance: float
) -> tuple[TruncatedSVD, tuple[str, ...]]:
    svd = _run_stack(stack, kernel, rank, vectors, mesh_of(stack))
    used = [kernel] * stack.shape[0]
    missed = _missed(svd.error, tolerance)
    if len(missed):
        better = []
        for place in missed:
            w, first = _row(stack, int(place)), jax.tree.map(lambda x, place=place: _row(x, int(place)), svd)
            one, used[place] = _redo(w, first, kernel, kernel, rank, vectors, tolerance)
            better.append(jax.device_get(one))
        svd = _replace_rows(svd, jnp.asarray(missed), jax.tree.map(lambda *leaves: np.stack(leaves), *better))
    return _cut(svd, rank), tuple(used)


def _decompose_in_threads(
    stack: jax.Array, kernel: str, rank: int, vectors: bool, tolerance: float
) -> tuple[TruncatedSVD, tuple[str, ...]]:
    rows, name = list(np.asarray(stack)), f"{kernel} in float64"
    svds, used = gram_on_host(rows, rank, vectors=vectors), [name] * len(rows)
    for place in _missed([svd.error for svd in svds], tolerance):
        found, used[place] = _redo(jnp.asarray(rows[place]), svds[place], name, kernel, rank, vectors, tolerance)
        svds[place] = jax.device_get(_cut(found, rank))
    return jax.tree.map(lambda *leaves: jax.device_put(np.stack(leaves), stack.sharding), *svds), tuple(used)


def _missed(errors: Any, tolerance: float) -> np.ndarray:
    return np.flatnonzero(~(np.asarray(errors) <= tolerance))  # "not <=" so that a NaN is redone too


def describe_kernels(used: Iterable[str]) -> str:
    """What matrices were decomposed by, with their numbers: "gram 240, gram in float64 12"."""
    return ", ".join(f"{name} {number}" for name, number in Counter(used).most_common())


def _redo(
    w: jax.Array, svd: TruncatedSVD, name: str, kernel: str, rank: int, vectors: bool, tolerance: float
) -> tuple[TruncatedSVD, str]:
    """One matrix again, until it is good enough, or else the best of what was tried.

    `svd`, called `name`, is what `kernel` has made of it so far.
    """

    def attempts() -> Iterator[tuple[TruncatedSVD, str]]:
        if name == kernel:
            yield refine(w, svd, rank, vectors=vectors), f"{kernel} in float64"
        for stronger in _STRONGER[kernel]:
            if _fits(stronger, w.shape, rank):
                once = _run_one(w, stronger, rank, vectors)
                yield once, stronger
                yield refine(w, once, rank, vectors=vectors), f"{stronger} in float64"

    best, label = svd, name
    for result, tried in attempts():
        # The error of a later result is the more trustworthy, so ties and NaN go to it.
        if not float(best.error) < float(result.error):
            best, label = result, tried
        if float(best.error) <= tolerance:
            break
    return best, label


def _fits(kernel: str, shape: tuple[int, ...], rank: int) -> bool:
    """Whether a kernel does what its name says: without room for the subspace `krylov_svd` is `gram_svd`."""
    if not kernel.startswith("krylov"):
        return True
    depth = DEPTH if kernel == "krylov" else _DEEPER
    return krylov_columns(rank, guard=GUARD, depth=depth) < min(shape)


@partial(jax.jit, static_argnames=("kernel", "rank", "vectors", "mesh"))
def _run_stack(stack: jax.Array, kernel: str, rank: int, vectors: bool, mesh: Mesh | None) -> TruncatedSVD:
    return over_layers(lambda w, _: KERNELS[kernel](w, rank, vectors=vectors, guard=GUARD), mesh, stack)


@partial(jax.jit, static_argnames=("kernel", "rank", "vectors"))
def _run_one(w: jax.Array, kernel: str, rank: int, vectors: bool) -> TruncatedSVD:
    return KERNELS[kernel](w, rank, vectors=vectors, guard=GUARD)


@jax.jit
def _replace_rows(svd: TruncatedSVD, rows: jax.Array, better: TruncatedSVD) -> TruncatedSVD:
    return jax.tree.map(lambda whole, part: whole.at[rows].set(part), svd, better)


def _cut(svd: TruncatedSVD, rank: int) -> TruncatedSVD:
    cut = {name: getattr(svd, name)[..., :rank] for name in ("u", "s", "v", "residual")}
    return dataclasses.replace(svd, **cut)


def _row(stack: jax.Array, row: int) -> jax.Array:
    """One item of a stack, on the device that holds it, without moving the others."""
    for shard in stack.addressable_shards:
        first, stop, _ = shard.index[0].indices(stack.shape[0])
        if first <= row < stop:
            return cast("jax.Array", shard.data)[row - first]
    msg = f"row {row} of the stack is not on this host"
    raise AssertionError(msg)
