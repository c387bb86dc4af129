"""Updates of LoRA-X, which trains a change of the singular values of a frozen weight W = U S V' alone.

    dW = U diag(d) V'   or   dW = U D V', with D (R, R)

It has no public file format, so the trained numbers are given as arrays. A vector d is complete with the base's
weights, because the signs of u_i and v_i cancel. A matrix D also needs the U and V that it was trained with.

Source: LoRA-X (arXiv 2501.16559).
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter.changes import LoRAFactors
from jcrosslora.adapter.records import Adapter, AdapterInfo
from jcrosslora.checkpoint import BaseModel
from jcrosslora.errors import AdapterError
from jcrosslora.linalg import decompose

# Error of the worst vector in radians: vectors of closer singular values mix between any two SVDs.
_APART = 1e-2
Vectors = tuple[np.ndarray, np.ndarray]


def lora_x_update(
    base: BaseModel, changes: Mapping[str, np.ndarray], vectors: Mapping[str, Vectors] | None = None
) -> Adapter:
    """Compute the update of a LoRA-X adapter as factors.

    Args:
        base: the model that it was trained on.
        changes: module, as the base names it (a fused module as a whole), to d (R,) of its leading singular values, or
            to D (R, R).
        vectors: module to U (O, R) and V (I, R) that were frozen in training; those of other modules are taken from
            the base's weights.

    Returns:
        The adapter, float32 and scale 1, of rank R.

    Raises:
        AdapterError: a change that is not a finite d or D of a possible rank, vectors of other shapes, D without its
            vectors, or singular values of the base that are too close for their vectors to be determined.
    """
    modules = {}
    for name, change in changes.items():
        weight = base.stored_weight(name)
        _check_change(name, change, min(weight.shape))
        if vectors is not None and name in vectors:
            u, v = vectors[name]
        elif change.ndim == 1:
            u, v = _leading_vectors(name, np.array(weight, np.float32), len(change))
        else:
            msg = f"module {name!r} has a matrix of changes: the signs of the singular vectors that it was trained "
            raise AdapterError(msg + "with are not known from the weights; give U and V (vectors=...)")
        rank = len(change)
        if u.shape != (weight.shape[0], rank) or v.shape != (weight.shape[1], rank):
            msg = f"module {name!r} of {weight.shape[0]} x {weight.shape[1]} has U of shape {list(u.shape)} and V of "
            msg += f"shape {list(v.shape)} for changes of rank {rank}: they must be (O, R) and (I, R)"
            raise AdapterError(msg)
        middle = np.diag(change) if change.ndim == 1 else change
        b = u.astype(np.float64) @ middle.astype(np.float64)
        modules[name] = LoRAFactors(a=np.ascontiguousarray(v.T, np.float32), b=b.astype(np.float32))
    base.release()
    return Adapter(modules, AdapterInfo(name="LoRA-X", base_name=base.name, kind="LoRA-X"))


def _check_change(name: str, change: np.ndarray, most: int) -> None:
    square = change.ndim in (1, 2) and set(change.shape) == {len(change)}
    if not square or not 1 <= len(change) <= most or not np.isfinite(change).all():
        msg = f"module {name!r} has a change of shape {list(change.shape)}: finite numbers (R,) or (R, R) with R "
        raise AdapterError(msg + f"from 1 to {most} were wanted")


def _leading_vectors(name: str, weight: np.ndarray, rank: int) -> Vectors:
    svd, _ = decompose(jnp.asarray(weight)[None], rank, tolerance=_APART)
    if not float(svd.error[0]) <= _APART:
        msg = f"module {name!r}: singular values among the first {rank} lie too close together for their vectors to be "
        raise AdapterError(msg + "determined from the weights; give U and V (vectors=...)")
    return np.asarray(svd.u[0]), np.asarray(svd.v[0])
