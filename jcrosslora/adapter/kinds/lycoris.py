"""The kinds of LyCORIS that are read, LoHa and LoKr, with the settings `r`, `alpha` and patterns of both.

LoHa: dW = s (W1a W1b) * (W2a W2b), an elementwise product of rank r^2 at most.

Row o of the product is the sum over (i, j) of (W1a[o, i] W2a[o, j]) (W1b[i] * W2b[j]), so the row-wise Khatri-Rao
products of the factors are factors of the update.

Source: FedPara (arXiv 2108.06098), proposition 1; peft 0.21, tuners/loha/layer.py.

LoKr: dW = s kron(W1, W2), each stored whole or as a product of two factors.

The singular triplets of a Kronecker product are the products of those of its factors, so the update is decomposed and
truncated without being formed.

Source: LyCORIS (arXiv 2309.14859); peft 0.21, tuners/lokr/layer.py.
"""

import numpy as np

from jcrosslora.adapter.changes import LoRAFactors
from jcrosslora.adapter.config import Config, check_numbers, check_targets
from jcrosslora.adapter.kinds.kind import (
    AdapterFile,
    Kind,
    Update,
    each_module,
    full_rank_factors,
    product_svd,
    truncate_product,
)
from jcrosslora.adapter.kinds.plain import check_rank_of
from jcrosslora.adapter.patterns import module_alpha, module_rank, pattern_name
from jcrosslora.errors import AdapterError


def _check(config: Config, where: str) -> None:
    check_numbers(config, where, alpha="alpha")
    check_targets(config, where)


def _scale(file: AdapterFile, module: str) -> float:
    name = pattern_name(file.config, module)
    return module_alpha(file.config, name, default="alpha") / module_rank(file.config, name)


def _refuse_convolution(file: AdapterFile, module: str, part: str) -> None:
    if part in file.modules[module]:
        msg = f"{file.path}: module {module!r} is a convolution: only adapters of linear layers are supported"
        raise AdapterError(msg)


def _read_loha(file: AdapterFile, module: str) -> Update:
    _refuse_convolution(file, module, "hada_t1")
    b1, a1, b2, a2 = (file.part(module, f"hada_{part}").astype(np.float64) for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
    rank = a1.shape[0]
    if b1.shape != b2.shape or a1.shape != a2.shape or b1.shape[1] != rank:
        shapes = ", ".join(str(list(matrix.shape)) for matrix in (b1, a1, b2, a2))
        msg = f"{file.path}: module {module!r} has factors of shapes {shapes}: two pairs [out, r] and [r, in] were "
        raise AdapterError(msg + "wanted")
    check_rank_of(file, module, rank)
    rows, columns = b1.shape[0], a1.shape[1]
    scale = _scale(file, module)
    file.check_size(module, min(rank**2, rows, columns) * (rows + columns), whole=True)
    if rank**2 < min(rows, columns):
        b = np.einsum("oi,oj->oij", b1, b2).reshape(rows, rank**2)
        a = np.einsum("in,jn->ijn", a1, a2).reshape(rank**2, columns)
        return truncate_product(scale * b, a, file.rank)
    # At full rank the product itself is smaller than its factors.
    return truncate_product(*full_rank_factors(scale * (b1 @ a1) * (b2 @ a2)), file.rank)


def _read_lokr(file: AdapterFile, module: str) -> Update:
    _refuse_convolution(file, module, "lokr_t2")
    (u1, s1, vt1), (u2, s2, vt2) = (_triplets(file, module, f"lokr_{side}") for side in ("w1", "w2"))
    shape = u1.shape[0] * u2.shape[0], vt1.shape[1] * vt2.shape[1]
    rank = s1.size * s2.size if file.rank is None else min(file.rank, s1.size * s2.size)
    file.check_size(module, rank * sum(shape))
    scale = _scale(file, module)
    values = abs(scale) * np.outer(s1, s2)
    # In descending order, without values below the rounding error of the largest.
    order = np.argsort(-values, axis=None, kind="stable")
    noise = np.finfo(np.float32).eps * values.max()
    full = max(1, int(np.count_nonzero(values > noise)))
    kept = full if file.rank is None else min(file.rank, full)
    first, second = np.unravel_index(order[:kept], values.shape)
    root = np.sqrt(values[first, second])
    b = (u1[:, None, first] * u2[None, :, second]).reshape(-1, kept) * (np.sign(scale) * root)
    a = root[:, None] * (vt1[first][:, :, None] * vt2[second][:, None, :]).reshape(kept, -1)
    lost = float(np.sum(values.ravel()[order[kept:full]] ** 2))
    return Update(LoRAFactors(a=a.astype(np.float32), b=b.astype(np.float32)), lost)


def _triplets(file: AdapterFile, module: str, part: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the SVD of one side of the Kronecker product."""
    if part in file.modules[module]:
        return np.linalg.svd(file.part(module, part).astype(np.float64), full_matrices=False)
    b, a = file.part(module, f"{part}_a"), file.part(module, f"{part}_b")
    if b.shape[1] != a.shape[0]:
        msg = f"{file.path}: module {module!r} has {part}_a of shape {list(b.shape)} and {part}_b of shape "
        raise AdapterError(msg + f"{list(a.shape)}: [out, r] and [r, in] were wanted; the file is damaged")
    return product_svd(b, a)


LOHA = Kind(
    name="LoHa", peft_type="LOHA", formula="s (W1a W1b) * (W2a W2b)", read=each_module(_read_loha), check=_check
)
LOKR = Kind(name="LoKr", peft_type="LOKR", formula="s kron(W1, W2)", read=each_module(_read_lokr), check=_check)
