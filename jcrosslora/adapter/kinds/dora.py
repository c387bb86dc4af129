"""DoRA: W' = diag(m / ||W + s B A||) (W + s B A), the norm taken of each row.

The update dW = W' - W = diag(c - 1) W + diag(c) s B A, with c the ratio of m to the norms, is of full rank: it is read
as its best approximation of a lower rank, together with the loss. `read_stored` gives B, A and m themselves, which are
exact, but only on the base that they were trained on.

Source: DoRA (arXiv 2402.09353), equation 5; peft 0.21, tuners/lora/dora.py.
"""

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from jcrosslora.adapter.config import check_lora
from jcrosslora.adapter.factors import LoRAFactors
from jcrosslora.adapter.kinds import config_tables
from jcrosslora.adapter.kinds.adapter_file import AdapterFile
from jcrosslora.adapter.kinds.kind import Kind, Update
from jcrosslora.adapter.kinds.pissa_olora import OLORA, PISSA
from jcrosslora.adapter.kinds.plain import PLAIN
from jcrosslora.adapter.kinds.truncate import full_rank_factors
from jcrosslora.errors import AdapterError
from jcrosslora.linalg import decompose

# One more direction for each one of B A, for the effect of the magnitudes.
_RANK_FACTOR = 2

_WHY = "rescales the rows of W + B A"


def _read(file: AdapterFile) -> Iterator[tuple[str, Update]]:
    for module, (factors, magnitude) in read_stored(file):
        yield module, _fitted(file, module, factors, magnitude)


def read_stored(file: AdapterFile) -> Iterator[tuple[str, tuple[LoRAFactors, np.ndarray]]]:
    """Yield the factors of s B A and m, float32 (O,), of each module.

    If training began from factors of the base (PiSSA, OLoRA), s B A includes what was removed from W for them.

    Raises:
        AdapterError: a part is missing or damaged, or the base is needed and was not given.
    """
    inner = next(kind for kind in (PISSA, OLORA, PLAIN) if kind.applies(file.config, ()))
    for module, update in inner.read(file):
        yield module, (update.factors, _magnitude(file, module, update.factors))


def _magnitude(file: AdapterFile, module: str, factors: LoRAFactors) -> np.ndarray:
    magnitude = file.part(module, "dora", axes=1).astype(np.float32)
    rows, _ = factors.shape
    if magnitude.shape != (rows,):
        msg = f"{file.path}: module {module!r} has {magnitude.shape[0]} magnitudes for {rows} rows"
        msg += ": magnitudes of the other axis (LyCORIS's dora_scale) are not supported; save it as a DoRA of peft"
        raise AdapterError(msg)
    return magnitude


def _fitted(file: AdapterFile, module: str, factors: LoRAFactors, magnitude: np.ndarray) -> Update:
    weight = file.weight(module, factors.shape, "DoRA", _WHY)
    change = full_update(weight, factors, magnitude)
    wanted = _RANK_FACTOR * factors.rank if file.rank is None else file.rank
    if wanted >= min(factors.shape):
        b, a = full_rank_factors(change)
        return Update(LoRAFactors(a=a, b=b))
    svd, _ = decompose(jnp.asarray(change)[None], wanted, vectors=False)
    u, s, v = (np.asarray(field[0]) for field in (svd.u, svd.s, svd.v))
    total = float(np.sum(np.square(change, dtype=np.float64)))
    lost = max(0.0, total - float(np.sum(np.square(s, dtype=np.float64))))
    root = np.sqrt(s)
    return Update(LoRAFactors(a=np.ascontiguousarray((v * root).T), b=np.ascontiguousarray(u * root)), lost)


def full_update(weight: np.ndarray, factors: LoRAFactors, magnitude: np.ndarray) -> np.ndarray:
    """Compute dW = W' - W, float32 (O, I), with float64 sums because the two nearly cancel.

    Args:
        weight: float32 (O, I), W.
        factors: of s B A.
        magnitude: float32 (O,), m.
    """
    a, b = (np.asarray(matrix).astype(np.float32) for matrix in (factors.a, factors.b))
    low = np.float32(factors.scale) * (b @ a)
    norms = np.sqrt(np.sum(np.square(weight + low, dtype=np.float64), axis=1))
    # A row of zeros stays zero, whatever its magnitude.
    ratio = np.where(norms > 0, magnitude / np.where(norms > 0, norms, 1), 1)
    return (ratio - 1).astype(np.float32)[:, None] * weight + ratio.astype(np.float32)[:, None] * low


DORA = Kind(
    name="DoRA",
    peft_type="LORA",
    formula="diag(m / ||W + s B A||) (W + s B A) - W",
    read=_read,
    check=check_lora,
    applies=lambda config, parts: config_tables.VARIANTS[config_tables.DORA](config) or "dora" in parts,
    over=(PISSA.name, OLORA.name),
)
