"""LoHa: dW = s (W1a W1b) * (W2a W2b), an elementwise product of rank r^2 at most.

Row o of the product is the sum over (i, j) of (W1a[o, i] W2a[o, j]) (W1b[i] * W2b[j]), so the row-wise Khatri-Rao
products of the factors are factors of the update.

Source: FedPara (arXiv 2108.06098), proposition 1; peft 0.21, tuners/loha/layer.py.
"""

import numpy as np

from jcrosslora.adapter.kinds.adapter_file import AdapterFile
from jcrosslora.adapter.kinds.kind import Kind, Update, each_module
from jcrosslora.adapter.kinds.lycoris import check_lycoris, module_scale
from jcrosslora.adapter.kinds.truncate import full_rank_factors, truncate_product
from jcrosslora.errors import AdapterError


def _read(file: AdapterFile, module: str) -> Update:
    if "hada_t1" in file.modules[module]:
        msg = f"{file.path}: module {module!r} is a convolution: only adapters of linear layers are supported"
        raise AdapterError(msg)
    b1, a1, b2, a2 = (file.part(module, f"hada_{part}").astype(np.float64) for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
    rank = a1.shape[0]
    if b1.shape != b2.shape or a1.shape != a2.shape or b1.shape[1] != rank:
        shapes = ", ".join(str(list(matrix.shape)) for matrix in (b1, a1, b2, a2))
        msg = (
            f"{file.path}: module {module!r} has factors of shapes {shapes}: two pairs [out, r] and [r, in] were wanted"
        )
        raise AdapterError(msg)
    rows, columns = b1.shape[0], a1.shape[1]
    scale = module_scale(file, module, rank)
    file.check_size(module, min(rank**2, rows, columns) * (rows + columns), whole=True)
    if rank**2 < min(rows, columns):
        b = np.einsum("oi,oj->oij", b1, b2).reshape(rows, rank**2)
        a = np.einsum("in,jn->ijn", a1, a2).reshape(rank**2, columns)
        return truncate_product(scale * b, a, file.rank)
    # At full rank the product itself is smaller than its factors.
    return truncate_product(*full_rank_factors(scale * (b1 @ a1) * (b2 @ a2)), file.rank)


LOHA = Kind(
    name="LoHa",
    peft_type="LOHA",
    formula="s (W1a W1b) * (W2a W2b)",
    read=each_module(_read),
    check=check_lycoris,
)
