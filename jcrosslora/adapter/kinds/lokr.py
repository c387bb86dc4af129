"""LoKr: dW = s kron(W1, W2), each stored whole or as a product of two factors.

The singular triplets of a Kronecker product are the products of those of its factors, so the update is decomposed and
truncated without being formed.

Source: LyCORIS (arXiv 2309.14859); peft 0.21, tuners/lokr/layer.py.
"""

import numpy as np

from jcrosslora.adapter.factors import LoRAFactors
from jcrosslora.adapter.kinds.adapter_file import AdapterFile
from jcrosslora.adapter.kinds.kind import Kind, Update, each_module
from jcrosslora.adapter.kinds.lycoris import check_lycoris, module_scale
from jcrosslora.adapter.kinds.truncate import product_svd
from jcrosslora.errors import AdapterError

Triplets = tuple[np.ndarray, np.ndarray, np.ndarray]


def _read(file: AdapterFile, module: str) -> Update:
    if "lokr_t2" in file.modules[module]:
        msg = f"{file.path}: module {module!r} is a convolution: only adapters of linear layers are supported"
        raise AdapterError(msg)
    (u1, s1, vt1), (u2, s2, vt2) = (_triplets(file, module, f"lokr_{side}") for side in ("w1", "w2"))
    shape = u1.shape[0] * u2.shape[0], vt1.shape[1] * vt2.shape[1]
    rank = s1.size * s2.size if file.rank is None else min(file.rank, s1.size * s2.size)
    file.check_size(module, rank * sum(shape))
    values = abs(module_scale(file, module)) * np.outer(s1, s2)
    sign = np.sign(module_scale(file, module))
    # In descending order, without values below the rounding error of the largest.
    order = np.argsort(-values, axis=None, kind="stable")
    noise = np.finfo(np.float32).eps * values.max()
    full = max(1, int(np.count_nonzero(values > noise)))
    kept = full if file.rank is None else min(file.rank, full)
    first, second = np.unravel_index(order[:kept], values.shape)
    root = np.sqrt(values[first, second])
    b = (u1[:, None, first] * u2[None, :, second]).reshape(-1, kept) * (sign * root)
    a = root[:, None] * (vt1[first][:, :, None] * vt2[second][:, None, :]).reshape(kept, -1)
    lost = float(np.sum(values.ravel()[order[kept:full]] ** 2))
    return Update(LoRAFactors(a=a.astype(np.float32), b=b.astype(np.float32)), lost)


def _triplets(file: AdapterFile, module: str, part: str) -> Triplets:
    """Compute the SVD of one side of the Kronecker product."""
    if part in file.modules[module]:
        return np.linalg.svd(file.part(module, part).astype(np.float64), full_matrices=False)
    b, a = file.part(module, f"{part}_a"), file.part(module, f"{part}_b")
    if b.shape[1] != a.shape[0]:
        msg = f"{file.path}: module {module!r} has {part}_a of shape {list(b.shape)} and {part}_b of shape "
        msg += f"{list(a.shape)}: [out, r] and [r, in] were wanted; the file is damaged"
        raise AdapterError(msg)
    return product_svd(b, a)


LOKR = Kind(name="LoKr", peft_type="LOKR", formula="s kron(W1, W2)", read=each_module(_read), check=check_lycoris)
