"""Kinds whose update depends on the base's weights W: PiSSA and OLoRA, and DoRA.

PiSSA and OLoRA: training starts from factors that were subtracted from the base. When peft loads such an adapter it
subtracts them from the base again, so s B A alone is not the update. It is

    PiSSA   dW = s B A - Q Q' W     Q: the top r left singular vectors of W
    OLoRA   dW = s B A - s Q Q' W   Q: an orthonormal basis of the first r columns of W

(Q Q' W is the best approximation of W of rank r, and the product of the first r columns and rows of its QR.) Both are
exact at rank 2 r.

DoRA: W' = diag(m / ||W + s B A||) (W + s B A), with the norm of each row. The update dW = W' - W = diag(c - 1) W +
diag(c) s B A, with c the ratio of m to the norms, has full rank. It is read as its best low-rank approximation, with
the error reported. `read_stored` returns B, A and m unchanged, which are exact but only valid for their own base.

Sources: PiSSA (arXiv 2404.02948), OLoRA (arXiv 2406.01775), DoRA (arXiv 2402.09353), equation 5; peft 0.21,
tuners/lora/layer.py and dora.py.
"""

from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter import config as keys
from jcrosslora.adapter.changes import LoRAFactors
from jcrosslora.adapter.config import is_variant
from jcrosslora.adapter.kinds.kind import Kind, ParsedAdapter, Update, each_module, full_rank_factors, truncate_product
from jcrosslora.adapter.kinds.products import PLAIN, read_factors
from jcrosslora.errors import AdapterError
from jcrosslora.linalg import decompose

# Error of the truncated subspace, in radians: the limit for float32 weights with close singular values at rank r.
_TOLERANCE = 1e-4
# Twice the rank of B A: one more direction for each, for the effect of the magnitudes.
_RANK_FACTOR = 2
_NEEDS = "DoRA rescales the rows of W + B A"


def _singular_vectors(weight: np.ndarray, rank: int) -> np.ndarray:
    svd, _ = decompose(jnp.asarray(weight)[None], rank, vectors=False, tolerance=_TOLERANCE)
    return np.asarray(svd.u[0])


def _less_initial(
    kind: str, basis: Callable[[np.ndarray, int], np.ndarray], *, scaled: bool
) -> Callable[[ParsedAdapter, str], Update]:
    def read(file: ParsedAdapter, module: str) -> Update:
        factors = read_factors(file, module)
        weight = file.weight(module, factors.shape, f"{kind} starts from factors of the base's weights")
        rank = min(factors.rank, *factors.shape)
        q, _ = np.linalg.qr(basis(weight, rank).astype(np.float64))
        taken = factors.scale if scaled else 1.0
        b = np.concatenate([factors.scale * np.asarray(factors.b).astype(np.float64), -taken * q], axis=1)
        a = np.concatenate([np.asarray(factors.a).astype(np.float64), q.T @ weight.astype(np.float64)])
        return truncate_product(b, a)

    return read


PISSA = Kind(
    name="PiSSA",
    formula="s B A less the base's best approximation of rank r",
    read=each_module(_less_initial("PiSSA", _singular_vectors, scaled=False)),
    applies=lambda config, _: is_variant(config, keys.PISSA),
)
OLORA = Kind(
    name="OLoRA",
    formula="s B A less s times the first r columns and rows of the base's QR",
    read=each_module(_less_initial("OLoRA", lambda weight, rank: weight[:, :rank], scaled=True)),
    applies=lambda config, _: is_variant(config, keys.OLORA),
)


def read_stored(file: ParsedAdapter) -> Iterator[tuple[str, tuple[LoRAFactors, np.ndarray]]]:
    """Yield the factors of s B A and m, float32 (O,), of each module of a DoRA.

    If training began from factors of the base (PiSSA, OLoRA), s B A includes what was removed from W for them.
    """
    inner = next(kind for kind in (PISSA, OLORA, PLAIN) if kind.applies(file.config, ()))
    for module, update in inner.read(file):
        magnitude = file.part(module, "dora", axes=1).astype(np.float32)
        rows, _ = update.factors.shape
        if magnitude.shape != (rows,):
            msg = f"{file.path}: module {module!r} has {magnitude.shape[0]} magnitudes for {rows} rows: magnitudes of "
            msg += "the other axis (LyCORIS's dora_scale) are not supported; save it as a DoRA of peft"
            raise AdapterError(msg)
        yield module, (update.factors, magnitude)


def _read_dora(file: ParsedAdapter) -> Iterator[tuple[str, Update]]:
    for module, (factors, magnitude) in read_stored(file):
        change = full_update(file.weight(module, factors.shape, _NEEDS), factors, magnitude)
        wanted = _RANK_FACTOR * factors.rank if file.rank is None else file.rank
        if wanted >= min(factors.shape):
            b, a = full_rank_factors(change)
            yield module, Update(LoRAFactors(a=a, b=b))
        else:
            yield module, _fitted(change, wanted)


def _fitted(change: np.ndarray, rank: int) -> Update:
    svd, _ = decompose(jnp.asarray(change)[None], rank, vectors=False)
    u, s, v = (np.asarray(field[0]) for field in (svd.u, svd.s, svd.v))
    total = float(np.sum(np.square(change, dtype=np.float64)))
    lost = max(0.0, total - float(np.sum(np.square(s, dtype=np.float64))))
    root = np.sqrt(s)
    return Update(LoRAFactors(a=np.ascontiguousarray((v * root).T), b=np.ascontiguousarray(u * root)), lost)


def full_update(weight: np.ndarray, factors: LoRAFactors, magnitude: np.ndarray) -> np.ndarray:
    """Compute dW = W' - W, float32 (O, I), with float64 sums because the two nearly cancel.

    `weight` is W, float32 (O, I); `factors` are of s B A; `magnitude` is m, float32 (O,).
    """
    a, b = (np.asarray(matrix).astype(np.float32) for matrix in (factors.a, factors.b))
    low = np.float32(factors.scale) * (b @ a)
    norms = np.sqrt(np.sum(np.square(weight + low, dtype=np.float64), axis=1))
    # A row of zeros stays zero with any magnitude.
    ratio = np.where(norms > 0, magnitude / np.where(norms > 0, norms, 1), 1)
    return (ratio - 1).astype(np.float32)[:, None] * weight + ratio.astype(np.float32)[:, None] * low


DORA = Kind(
    name="DoRA",
    formula="diag(m / ||W + s B A||) (W + s B A) - W",
    read=_read_dora,
    applies=lambda config, parts: is_variant(config, keys.DORA) or "dora" in parts,
    over=(PISSA.name, OLORA.name),
)
