"""Truncated SVD of a stack of matrices to a tolerance, with an error estimate for each.

`decompose` chooses a kernel for the shape, and redoes the matrices whose estimated error is above the tolerance.
`over_layers` applies any function of one matrix to a stack, on one device or sharded over several.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jcrosslora.linalg.host import stack_rows
from jcrosslora.linalg.svd_float64 import gram_on_host, refine
from jcrosslora.linalg.svd_kernels import DEPTH, TruncatedSVD, full_svd, gram_svd, krylov_columns, krylov_svd

AXIS = "layers"
Kernel = Literal["auto", "full", "gram", "krylov"]

_DEEPER = 6
_IN_FLOAT64 = " in float64"
KERNELS: dict[str, Callable[..., TruncatedSVD]] = {
    "full": full_svd,
    "gram": gram_svd,
    "krylov": krylov_svd,
    "krylov, deeper": partial(krylov_svd, depth=_DEEPER),
}
# Kernels to try in order on a matrix that misses the tolerance.
_STRONGER = {
    "krylov": ("krylov, deeper", "gram", "full"),
    "gram": ("full",),
    "full": (),
}
# Triplets beyond the rank for `refine`. Over 32 neighbours, spectra of real weights fall by several per cent.
GUARD = 32
# Up to this short side a CPU solves the whole eigenproblem.
_GRAM_UP_TO = 1536
# Largest width of the subspace of `krylov`, as a share of the short side.
_NARROW = 2 / 3


def choose_kernel(shape: tuple[int, int], rank: int, platform: str) -> Kernel:
    """Choose the fastest kernel for matrices of one shape.

    `krylov` if its subspace is at most two thirds as wide as the short side, on a CPU only above a short side of 1,536;
    else `gram`. `full` is never first: on a GPU or TPU an SVD costs many times an eigensolve, and on a CPU it is only
    needed if no other kernel resolves a matrix. The rule has not been timed on a GPU or TPU.

    `platform` is a name from `jax.default_backend()`.
    """
    short = min(shape)
    narrow = krylov_columns(rank, guard=GUARD) <= _NARROW * short
    return "krylov" if narrow and (platform != "cpu" or short > _GRAM_UP_TO) else "gram"


def decompose(
    stack: jax.Array | np.ndarray, rank: int, *, vectors: bool = True, tolerance: float = 1e-2, kernel: Kernel = "auto"
) -> tuple[TruncatedSVD, tuple[str, ...]]:
    """Compute the truncated SVD of each matrix of a stack, to a tolerance.

    A matrix whose `error` is above the tolerance is refined in float64, then redone and refined by ever stronger
    kernels up to the full SVD. If none meets the tolerance (equal singular values have no individual vectors), the
    result with the smallest `error` is returned.

    Args:
        stack: (L, O, I), float32; may be sharded over L. For a numpy array the results are numpy arrays.
        rank: R, at most min(O, I).
        vectors: whether `error` is about individual vectors (True) or about their subspace.
        kernel: the first kernel; "auto" is `choose_kernel`.

    Returns:
        The decompositions with a leading axis L on every field, and the kernel that produced each (`describe_kernels`).
    """
    chex.assert_rank(stack, 3)
    chex.assert_scalar_in(rank, 1, min(stack.shape[1:]))
    _, rows, columns = stack.shape
    if kernel == "auto":
        kernel = choose_kernel((rows, columns), rank, jax.default_backend())
    if kernel == "krylov" and not _fits(kernel, (rows, columns), rank):
        kernel = "gram"
    # A CPU runs `gram` in threads on the host, unless other processes hold a part of the stack.
    whole = isinstance(stack, np.ndarray) or stack.is_fully_addressable
    if kernel == "gram" and jax.default_backend() == "cpu" and whole:
        return _decompose_in_threads(stack, kernel, rank, vectors, tolerance)
    if not isinstance(stack, np.ndarray):
        return _decompose_stack(stack, kernel, rank, vectors, tolerance)
    svd, used = _decompose_stack(to_device(stack), kernel, rank, vectors, tolerance)
    return jax.tree.map(np.asarray, svd), used


def _decompose_stack(
    stack: jax.Array, kernel: str, rank: int, vectors: bool, tolerance: float
) -> tuple[TruncatedSVD, tuple[str, ...]]:
    svd = _run_stack(stack, kernel, rank, vectors, mesh_of(stack))
    used = [kernel] * stack.shape[0]
    missed = _missed(svd.error, tolerance)
    if len(missed):
        better = []
        for index in missed:
            w, first = _row(stack, int(index)), jax.tree.map(lambda x, index=index: _row(x, int(index)), svd)
            one, used[index] = _redo(w, first, kernel, rank, vectors, tolerance)
            better.append(jax.device_get(one))
        svd = _replace_rows(svd, jnp.asarray(missed), jax.tree.map(lambda *leaves: np.stack(leaves), *better))
    return _cut(svd, rank), tuple(used)


def _decompose_in_threads(
    stack: jax.Array | np.ndarray, kernel: str, rank: int, vectors: bool, tolerance: float
) -> tuple[TruncatedSVD, tuple[str, ...]]:
    rows, name = list(np.asarray(stack)), kernel + _IN_FLOAT64
    svds, used = gram_on_host(rows, rank, vectors=vectors), [name] * len(rows)
    for index in _missed([svd.error for svd in svds], tolerance):
        found, used[index] = _redo(jnp.asarray(rows[index]), svds[index], name, rank, vectors, tolerance)
        svds[index] = jax.device_get(_cut(found, rank))
    svd = jax.tree.map(lambda *leaves: stack_rows(leaves), *svds)
    return svd if isinstance(stack, np.ndarray) else jax.device_put(svd, stack.sharding), tuple(used)


def _missed(errors: Any, tolerance: float) -> np.ndarray:
    return np.flatnonzero(~(np.asarray(errors) <= tolerance))  # not "error > tolerance", so that a NaN is redone too


def describe_kernels(used: Iterable[str]) -> str:
    """Count the kernels that produced the results: "gram 240, gram in float64 12"."""
    return ", ".join(f"{name} {number}" for name, number in Counter(used).most_common())


def _redo(
    w: jax.Array, svd: TruncatedSVD, name: str, rank: int, vectors: bool, tolerance: float
) -> tuple[TruncatedSVD, str]:
    """Redo one matrix until it meets the tolerance; return the result with the smallest error and its kernel's name.

    `name` is the kernel that produced `svd`, possibly in float64.
    """
    kernel = name.removesuffix(_IN_FLOAT64)

    def attempts() -> Iterator[tuple[TruncatedSVD, str]]:
        if name == kernel:
            yield refine(w, svd, rank, vectors=vectors), kernel + _IN_FLOAT64
        for stronger in _STRONGER[kernel]:
            if _fits(stronger, w.shape, rank):
                once = _run_one(w, stronger, rank, vectors)
                yield once, stronger
                yield refine(w, once, rank, vectors=vectors), stronger + _IN_FLOAT64

    best, label = svd, name
    for result, tried in attempts():
        # The error of a later result is more reliable: it wins ties, and replaces NaN.
        if not float(best.error) < float(result.error):
            best, label = result, tried
        if float(best.error) <= tolerance:
            break
    return best, label


def _fits(kernel: str, shape: tuple[int, ...], rank: int) -> bool:
    """Return whether a kernel fits a shape: `krylov_svd` needs a subspace narrower than the short side."""
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
    """Return one item of a stack, on the device that holds it."""
    for shard in stack.addressable_shards:
        first, stop, _ = shard.index[0].indices(stack.shape[0])
        if first <= row < stop:
            return cast("jax.Array", shard.data)[row - first]
    raise AssertionError(f"row {row} of the stack is not on this host")


def shard(stack: np.ndarray) -> jax.Array:
    """Shard an array along its first axis over the local devices; their number must divide its length."""
    devices = np.array(jax.local_devices())
    if devices.size == 1:
        return jax.device_put(stack)
    return jax.device_put(stack, NamedSharding(Mesh(devices, (AXIS,)), PartitionSpec(AXIS)))


def to_device(array: np.ndarray) -> jax.Array:
    """Shard an array over the local devices if their number divides its length, else put it on the first."""
    return shard(array) if len(array) % jax.local_device_count() == 0 else jax.device_put(array)


def mesh_of(stack: jax.Array) -> Mesh | None:
    """Return the mesh of a stack sharded by `shard`, None on one device."""
    sharding = stack.sharding
    divided = isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 and sharding.spec[:1] == (AXIS,)
    return sharding.mesh if divided else None  # type: ignore[return-value]


def over_layers(function: Callable[..., Any], mesh: Mesh | None, stacked: Any, shared: Any = None) -> Any:
    """Apply `function(item, shared)` to every item of a stack; call it under jit.

    Each device processes its items without communication. An accelerator batches its items with vmap. A CPU takes them
    one by one: LAPACK does so in any case, and its batched call waits for threads that the calls of other devices hold,
    a deadlock if there are no more threads than devices.

    The mesh comes from `mesh_of`; `stacked` is a pytree of arrays with the leading axis L, and `shared` a pytree that
    all items share.
    """

    def part(stacked: Any, shared: Any) -> Any:
        if jax.default_backend() == "cpu":
            return lax.map(lambda item: function(item, shared), stacked)
        return jax.vmap(function, in_axes=(0, None))(stacked, shared)

    if mesh is None:
        return part(stacked, shared)
    specs = (PartitionSpec(AXIS), PartitionSpec())
    # check_vma is off because loops in `function` start from constants, which are not marked as varying by device.
    divided = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(AXIS), check_vma=False)
    return divided(stacked, shared)
