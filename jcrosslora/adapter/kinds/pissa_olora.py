"""PiSSA and OLoRA: training starts from factors that were subtracted from the base.

When peft loads such an adapter it subtracts them from the base again, so s B A alone is not the update. It is

    PiSSA   dW = s B A - Q Q' W     Q: the top r left singular vectors of W
    OLoRA   dW = s B A - s Q Q' W   Q: an orthonormal basis of the first r columns of W

(Q Q' W is the best approximation of W of rank r, and the product of the first r columns and rows of its QR.) Both are
exact at rank 2 r.

Sources: PiSSA (arXiv 2404.02948), OLoRA (arXiv 2406.01775); peft 0.21, tuners/lora/layer.py.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter.config import check_lora
from jcrosslora.adapter.kinds import config_tables
from jcrosslora.adapter.kinds.adapter_file import AdapterFile
from jcrosslora.adapter.kinds.kind import Kind, Update, each_module
from jcrosslora.adapter.kinds.plain import read_factors
from jcrosslora.adapter.kinds.truncate import truncate_product
from jcrosslora.linalg import decompose

# Error of the truncated subspace, in radians: the limit for float32 weights with close singular values at rank r.
_TOLERANCE = 1e-4

Basis = Callable[[np.ndarray, int], np.ndarray]


def _singular_vectors(weight: np.ndarray, rank: int) -> np.ndarray:
    svd, _ = decompose(jnp.asarray(weight)[None], rank, vectors=False, tolerance=_TOLERANCE)
    return np.asarray(svd.u[0])


def _first_columns(weight: np.ndarray, rank: int) -> np.ndarray:
    return weight[:, :rank]


def _reader(kind: str, basis: Basis, *, scaled: bool) -> Callable[[AdapterFile, str], Update]:
    def read(file: AdapterFile, module: str) -> Update:
        factors = read_factors(file, module)
        weight = file.weight(module, factors.shape, kind, "starts from factors of the base's weights")
        rank = min(factors.rank, *factors.shape)
        q, _ = np.linalg.qr(basis(weight, rank).astype(np.float64))
        taken = factors.scale if scaled else 1.0
        b = np.concatenate([factors.scale * np.asarray(factors.b).astype(np.float64), -taken * q], axis=1)
        a = np.concatenate([np.asarray(factors.a).astype(np.float64), q.T @ weight.astype(np.float64)])
        return truncate_product(b, a)

    return read


PISSA = Kind(
    name="PiSSA",
    peft_type="LORA",
    formula="s B A less the base's best approximation of rank r",
    read=each_module(_reader("PiSSA", _singular_vectors, scaled=False)),
    check=check_lora,
    applies=lambda config, _: config_tables.VARIANTS[config_tables.PISSA](config),
)

OLORA = Kind(
    name="OLoRA",
    peft_type="LORA",
    formula="s B A less s times the first r columns and rows of the base's QR",
    read=each_module(_reader("OLoRA", _first_columns, scaled=True)),
    check=check_lora,
    applies=lambda config, _: config_tables.VARIANTS[config_tables.OLORA](config),
)
