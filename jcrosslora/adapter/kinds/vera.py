"""VeRA: dW = diag(b) B diag(d) A, with one random B and A for all modules, sliced to the shape of each.

If the two were not saved (`save_projection` false) they are drawn again, as torch's CPU generator draws them.

Source: VeRA (arXiv 2310.11454), equation 2; peft 0.21, tuners/vera.
"""

import math
from collections.abc import Collection, Iterator

import numpy as np

from jcrosslora.adapter.config import check_rank, check_targets, shown
from jcrosslora.adapter.factors import LoRAFactors
from jcrosslora.adapter.kinds.adapter_file import AdapterFile
from jcrosslora.adapter.kinds.kind import Config, Kind, Update
from jcrosslora.errors import AdapterError

_WHY = "slices its matrices to the shapes of the base's modules"


def _check(config: Config, where: str) -> None:
    check_rank(config, where)
    check_targets(config, where)
    seed = config.get("projection_prng_key", 0)
    if type(seed) is not int or seed < 0:
        msg = f"{where}: projection_prng_key is {shown(config, 'projection_prng_key')}, a seed was wanted: correct it"
        raise AdapterError(msg)


def _read(file: AdapterFile) -> Iterator[tuple[str, Update]]:
    shapes = {module: file.shape(module, "VeRA", _WHY) for module in (*file.modules, *file.others)}
    if not file.modules:
        return
    a, b = _projections(file, shapes.values())
    for module in file.modules:
        rows, columns = shapes[module]
        gain_b, gain_d = (file.part(module, f"vera_lambda_{side}", axes=1).astype(np.float64) for side in "bd")
        if gain_b.shape != (rows,) or gain_d.shape != (a.shape[0],) or a.shape[1] < columns or b.shape[0] < rows:
            msg = f"{file.path}: module {module!r} has {gain_b.size} gains for {rows} rows, {gain_d.size} for rank "
            msg += f"{a.shape[0]}, and matrices for {b.shape[0]} x {a.shape[1]}: give the base it was trained on"
            raise AdapterError(msg)
        factors = LoRAFactors(
            a=(gain_d[:, None] * a[:, :columns]).astype(np.float32), b=(gain_b[:, None] * b[:rows]).astype(np.float32)
        )
        yield module, Update(factors)


def _projections(file: AdapterFile, shapes: Collection[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return A (r, largest I) and B (largest O, r) in float64, from the file or drawn again."""
    if "vera_A" in file.shared or "vera_B" in file.shared:
        a, b = file.common("vera_A"), file.common("vera_B")
        if a.shape[0] != b.shape[1]:
            msg = f"{file.path}: vera_A has shape {list(a.shape)} and vera_B {list(b.shape)}: one rank was wanted"
            raise AdapterError(msg)
        return a.astype(np.float64), b.astype(np.float64)
    # By the length of the gains, because a damaged `r` could claim any size.
    ranks = {module: file.part(module, "vera_lambda_d", axes=1).size for module in file.modules}
    widest, rank = max(ranks.items(), key=lambda item: item[1])
    rows, columns = max(o for o, _ in shapes), max(i for _, i in shapes)
    file.check_size(widest, rank * (rows + columns))
    # RandomState seeds the Mersenne Twister as torch does; a Generator does not.
    draw = np.random.RandomState(file.config.get("projection_prng_key", 0) % 2**32)
    return _torch_kaiming(draw, rank, columns).astype(np.float64), _torch_kaiming(draw, rows, rank).astype(np.float64)


def _torch_kaiming(draw: np.random.RandomState, rows: int, columns: int) -> np.ndarray:
    """Draw float32 (rows, columns) as torch does for a uniform Kaiming initialisation of gain sqrt(2) on the CPU.

    torch takes the lower 24 bits of each number of the same generator; the bounds are +-sqrt(6 / columns).
    """
    bits = draw.randint(0, 2**32, rows * columns, dtype=np.uint32) & np.uint32(2**24 - 1)
    unit = bits.astype(np.float32) * np.float32(2.0**-24)
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))
    low, width = np.float32(-bound), np.float32(np.float32(bound) - np.float32(-bound))
    return (unit * width + low).reshape(rows, columns)


VERA = Kind(name="VeRA", peft_type="VERA", formula="diag(b) B diag(d) A", read=_read, check=_check)
